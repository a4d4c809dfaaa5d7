"""The quickstart end to end: a short run must beat a replayed demonstration, on data sets it must end in a report."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from repwam_core.cli import main
from repwam_core.quickstart.stages import StageRunner

# Seconds to minutes of training: enough to tell a working pipeline from a broken one.
SHORT = ["--budget", "0.5", "--episodes", "25"]
TASKS = ["button-press-topdown", "handle-press-side", "window-open"]


def _rates(out, stage, name):
    (path,) = out.glob(f"{stage}-*/{name}.json")
    return json.loads(path.read_text())["rates"]["all"]


@pytest.mark.pipeline
@pytest.mark.sim
@pytest.mark.timeout(2400)
def test_short_run_beats_replay_by_15_of_60(tmp_path):
    out = tmp_path / "run"
    assert main(["quickstart", "--out", str(out), "--tasks", *TASKS, *SHORT]) == 0
    policy, replay = _rates(out, "rollouts", "policy"), _rates(out, "baselines", "replay")
    assert policy["episodes"] == replay["episodes"] == 60
    assert policy["successes"] >= replay["successes"] + 15, (policy, replay)
    assert _rates(out, "baselines", "expert")["successes"] >= 57
    page = (out / "report.html").read_text()
    assert "absent" not in re.sub(r"<style.*?</style>", "", page, flags=re.S) or "Language" in page
    assert not re.search(r'(?:src|href)="https?://', page)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_data_set_run_ends_in_a_report_and_a_second_run_reuses_it(tmp_path, shared_video_dataset, capsys):
    out = tmp_path / "run"
    command = ["quickstart", "--dataset", str(shared_video_dataset), "--out", str(out), "--size", "32", "48"]
    command += ["--budget", "0.005"]
    assert main(command) == 0
    page = (out / "report.html").read_text()
    for said in ("grip", "move the square", "Open loop"):
        assert said in page
    capsys.readouterr()
    started_s = time.monotonic()
    assert main(command) == 0
    told = capsys.readouterr().err
    assert told.count("done before") == 6
    assert "starting" not in told
    assert time.monotonic() - started_s < 60


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_resumes_and_ends_as_if_it_had_not_been(tmp_path, shared_video_dataset, how):
    """Stopped in the middle of training the tokenizer: the same weights come out as of an undisturbed run."""
    options = ["--dataset", str(shared_video_dataset), "--size", "32", "48", "--budget", "0.05"]
    code = "import sys; from repwam_core.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "quickstart", *options, "--out", str(tmp_path / "stopped")]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _wait_for(lambda: list((tmp_path / "stopped").glob("tokenizer-*/fit/metrics.csv")), child)
    child.send_signal(how)
    _, told = child.communicate(timeout=120)
    assert child.returncode == (130 if how == signal.SIGINT else -9), told
    assert not list((tmp_path / "stopped").glob("tokenizer-*/stage.json"))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    whole = subprocess.run([*command[:-1], str(tmp_path / "whole")], capture_output=True, text=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    weights = [next(tmp_path.glob(f"{run}/tokenizer-*/tokenizer/model.safetensors")) for run in ("stopped", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def _wait_for(condition, child, limit_s=300):
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < deadline_s, "the child did not get there"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tasks", "button-pres-topdown"], "button-press-topdown"),
        (["--dataset", "{tmp}/nothing"], "nothing"),
        (["--dataset", "{tmp}"], "info.json"),
        (["--size", "60", "64"], "multiples of 16"),
        (["--budget", "0"], "--budget"),
        (["--episodes", "1"], "--episodes"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(arguments, told, tmp_path, capfd):
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert main(["quickstart", "--out", str(tmp_path / "run"), *given]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert told in line


def test_a_full_disk_stops_before_the_stage_and_keeps_what_is_done(tmp_path, monkeypatch, capfd, shared_video_dataset):
    out = tmp_path / "run"
    StageRunner(out).run("before", lambda folder: {}, settings={}, inputs={})
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert main(["quickstart", "--dataset", str(shared_video_dataset), "--out", str(out)]) == 2
    assert "free some space" in capfd.readouterr().err
    assert list(out.glob("before-*/stage.json"))
