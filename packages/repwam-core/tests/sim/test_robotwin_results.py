"""RoboTwin's filed results as the paper's table."""

import json

import pytest
from repvitok.runtime.errors import UserError
from repwam_core.cli import main
from repwam_core.sim.results import wilson_interval
from repwam_core.sim.robotwin import load_horizons, read_results, summarise

HORIZONS = load_horizons()


def file_result(root, task, share, config="demo_clean", name="tiny", time="2026-11-28 10:00:00", kind="unseen"):
    """As RoboTwin's eval_policy.py writes it."""
    folder = root / task / "repwam" / config / name / time
    folder.mkdir(parents=True)
    (folder / "_result.txt").write_text(f"Timestamp: {time}\n\nInstruction Type: {kind}\n\n{share}")


def test_the_papers_groups():
    assert {name: len(tasks) for name, tasks in HORIZONS.items()} == {"1": 30, "2": 15, "3": 5}
    assert "stack_blocks_three" in HORIZONS["3"]
    assert "place_dual_shoes" in HORIZONS["2"]


def test_means_by_horizon_easy_beside_hard(tmp_path, capsys):
    for tasks, share in zip(HORIZONS.values(), (0.87, 0.5, 0.06), strict=True):
        for number, task in enumerate(tasks):
            file_result(tmp_path, task, share + 0.01 * (number % 2))
    for task in HORIZONS["3"][:2]:
        file_result(tmp_path, task, 1.0, config="demo_randomized")
    out = tmp_path / "summary.json"
    assert main(["robotwin", "--results", str(tmp_path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    solved = [30 * 87 + 15, 15 * 50 + 7, 5 * 6 + 2]
    bounds = [wilson_interval(*counts) for counts in zip(solved, (3000, 1500, 500), strict=True)]
    cells = [
        f"{100 * count / total:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        for count, total, (low, high) in zip(solved, (3000, 1500, 500), bounds, strict=True)
    ]
    assert [line.split() for line in printed[:2]] == [
        ["horizon", "tasks", "Easy", "demo_clean", "Hard", "demo_randomized"],
        ["1", "30", *cells[0].split(), "not", "run"],
    ]
    assert printed[2].split("  ")[-1] == "not run"
    assert cells[2] in printed[3]
    assert printed[3].endswith("100.0 (98.1 to 100.0), 2 of 5 tasks")
    assert printed[4].split()[:3] == ["all", "50", f"{sum(solved) / 50:.1f}"]
    assert printed[4].endswith("2 of 50 tasks")
    assert printed[5].endswith("instructions: unseen")
    stored = json.loads(out.read_text())
    assert stored["rates"]["demo_clean"]["all"]["successes"] == sum(solved)
    assert len(stored["runs"]) == 52


def test_several_runs_of_a_task_are_a_mistake_unless_said_otherwise(tmp_path):
    file_result(tmp_path, "click_bell", 0.25, time="2026-11-28 10:00:00")
    file_result(tmp_path, "click_bell", 0.75, time="2026-11-28 11:00:00")
    with pytest.raises(UserError, match=r"click_bell, demo_clean: expected one run, .*10:00:00.*11:00:00"):
        read_results(tmp_path)
    (last,) = read_results(tmp_path, repeats="last")
    (pooled,) = read_results(tmp_path, repeats="pool")
    assert [(run.successes, run.episodes) for run in (last, pooled)] == [(75, 100), (100, 200)]


def test_names_are_not_mixed(tmp_path):
    file_result(tmp_path, "click_bell", 0.25, name="first")
    file_result(tmp_path, "click_bell", 0.5, name="runs/second")
    with pytest.raises(UserError, match=r"under one name, say which of \['first', 'runs/second'\]"):
        read_results(tmp_path)
    assert read_results(tmp_path, name="runs/second")[0].successes == 50
    with pytest.raises(UserError, match="under 'third' name, found names"):
        read_results(tmp_path, name="third")
    with pytest.raises(UserError, match=r"results of 'other' under any name, found names \[\]"):
        read_results(tmp_path, "other")


def test_a_share_is_of_as_many_episodes_as_there_were(tmp_path):
    file_result(tmp_path, "click_bell", 0.125)
    with pytest.raises(UserError, match=r"0.125 is no share of 100 episodes; .*--test-num"):
        read_results(tmp_path)
    assert read_results(tmp_path, episodes=8)[0].successes == 1


@pytest.mark.parametrize(
    "text", ["", "Timestamp: now\n", "Instruction Type: unseen\n\nnan", "Instruction Type: seen\n7"]
)
def test_a_file_of_something_else_is_refused(tmp_path, text):
    file_result(tmp_path, "click_bell", 0.5)
    next(tmp_path.rglob("_result.txt")).write_text(text)
    with pytest.raises(UserError, match="expected RoboTwin's result"):
        read_results(tmp_path)


def test_what_cannot_be_compared_is_refused(tmp_path):
    file_result(tmp_path, "click_bell", 0.5)
    file_result(tmp_path, "turn_switch", 0.5, kind="seen")
    with pytest.raises(UserError, match=r"one kind of instruction in all runs, got \['seen', 'unseen'\]"):
        read_results(tmp_path)
    file_result(tmp_path / "other", "fold_clothes", 0.5)
    with pytest.raises(UserError, match=r"expected tasks of the groups, got \['fold_clothes'\]"):
        summarise(read_results(tmp_path / "other"), HORIZONS)
    file_result(tmp_path / "uneven", "click_bell", 0.5)
    file_result(tmp_path / "uneven", "click_bell", 0.5, time="later")
    file_result(tmp_path / "uneven", "turn_switch", 0.5)
    with pytest.raises(UserError, match=r"demo_clean: expected as many episodes of every task, got \[100, 200\]"):
        summarise(read_results(tmp_path / "uneven", repeats="pool"), HORIZONS)


def test_groups_of_ones_own(tmp_path):
    (tmp_path / "groups.yaml").write_text("short: [fold_clothes]\nlong: [tidy_up, fold_clothes]\n")
    with pytest.raises(UserError, match=r"every task in one group, got \['fold_clothes'\]"):
        load_horizons(tmp_path / "groups.yaml")
    (tmp_path / "groups.yaml").write_text("short: [fold_clothes]\n")
    file_result(tmp_path / "results", "fold_clothes", 0.5)
    table = summarise(read_results(tmp_path / "results"), load_horizons(tmp_path / "groups.yaml"))
    assert table["demo_clean"]["short"].rate == 0.5
