"""A bar on a terminal; in a log a line now and then, and nothing of what is over before."""

import time

import pytest
from repvitok.runtime import progress as module
from repvitok.runtime.progress import progress


def test_what_is_quick_says_nothing_without_a_terminal(capsys):
    assert list(progress(range(3), "encode")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(progress(range(3), "encode", unit="clip", force=True)) == [0, 1, 2]
    assert "encode" in capsys.readouterr().err


def test_lines_come_at_their_time_and_one_at_the_end(capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.2)
    with progress(desc="train", total=40, unit="step") as bar:
        for number in range(40):
            time.sleep(0.02)
            bar.set_postfix(loss=number)
            bar.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 6
    assert all(line.startswith("train: ") and "left" in line and "loss=" in line for line in lines)
    assert "40 of 40 steps" in lines[-1]


@pytest.mark.parametrize("total", [None, 2])
def test_a_total_that_is_not_known(capsys, monkeypatch, total):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    bar = progress(total=total, desc="read")
    time.sleep(0.15)  # tqdm's own interval
    bar.update(2)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(f"read: 2 of {total or '?'} its") for line in lines)
    assert len(lines) == 2
    bar.close()
    assert not capsys.readouterr().err


def test_a_line_is_due_while_nothing_ends(capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.1)
    with progress(desc="evaluate", total=100, unit="episode") as bar:
        bar.update(5)
        for _ in range(10):
            time.sleep(0.02)
            bar.update(0)
        lines = capsys.readouterr().err.splitlines()
        assert lines
        assert all(line.startswith("evaluate: 5 of 100 episodes") for line in lines)
