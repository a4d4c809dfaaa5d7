"""The quickstart end to end: a short run must beat a replayed demonstration, on data sets it must end in a report."""

import html
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml
from repwam_core.cli import main
from repwam_core.quickstart.runner import StageRunner
from repwam_core.quickstart.stages import CONTROLS

# Seconds to minutes of training: enough to tell a working pipeline from a broken one.
SHORT = ["--budget", "0.4", "--episodes", "25"]
TASKS = ["button-press-topdown", "handle-press-side", "window-open"]


def _rates(out, stage, name):
    (path,) = out.glob(f"{stage}-*/{name}/results.json")
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
    assert not re.search(r'(?:src|href)="https?://', page)


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_controls_train_every_arm_and_stand_in_the_report(tmp_path):
    out = tmp_path / "run"
    tiny = ["--budget", "0.004", "--episodes", "2", "--eval-episodes", "2", "--size", "32", "32"]
    assert main(["quickstart", "--out", str(out), "--tasks", "reach", *tiny, "--controls"]) == 0
    page = (out / "report.html").read_text()
    numbers = json.loads((out / "report.json").read_text())
    assert json.loads((out / "results.json").read_text()) == numbers["closed_loop"]
    assert set(CONTROLS) < set(numbers["closed_loop"]["methods"])
    assert [rollout["method"] for rollout in numbers["rollouts"]] == ["expert", "policy", "replay"]
    for control in CONTROLS:
        assert f"Trained {control.replace('untrained', 'on the latents of an untrained')}" in page
    steps = {
        stage: json.loads(next(out.glob(f"{stage}-*/stage.json")).read_text())["settings"]["steps"]
        for stage in ("pretrain", "adapt", "no-latent-actions-adapt")
    }
    assert steps["no-latent-actions-adapt"] == steps["pretrain"] + steps["adapt"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_data_set_run_ends_in_a_report_and_a_second_run_reuses_it(tmp_path, gapped_video_dataset, capsys):
    """Of episodes 2, 5, 9 and 40 three, and of two cameras the one that was recorded."""
    out = tmp_path / "run"
    command = ["quickstart", "--dataset", str(gapped_video_dataset), "--out", str(out), "--size", "32", "48"]
    command += ["--budget", "0.005", "--cameras", "observation.images.top", "--episodes", "2", "5,40"]
    assert main(command) == 0
    page = (out / "report.html").read_text()
    for said in ("grip", "move the square", "Open loop", "episode 40: move the square", "1 held-out episodes"):
        assert said in page
    assert "observation.images.side" not in page
    numbers = json.loads((out / "report.json").read_text())
    assert (numbers["format"], numbers["measured"], numbers["closed_loop"]) == ("repwam-report", "held-out", None)
    assert numbers["command"].startswith("repwam ")
    assert [stage["name"] for stage in numbers["stages"]][-2:] == ["pretrain", "adapt"]
    assert numbers["imagination"]["reconstructed_psnr_db"] > 0
    assert "val/psnr" in numbers["curves"]["visual tokenizer"]
    chosen = {"cameras": ["observation.images.top"], "episodes": ["2", "5,40"], "depth_range": None}
    for stage in ("tokenizer", "encode"):
        settings = json.loads(next(out.glob(f"{stage}-*/stage.json")).read_text())["settings"]
        assert {name: settings[name] for name in chosen} == chosen
    assert yaml.safe_load(html.unescape(page.split("# config\n")[1].split("# tokenizer")[0]))["data"] == {
        "dataset": str(gapped_video_dataset),
        **chosen,
    }
    capsys.readouterr()
    started_s = time.monotonic()
    assert main(command) == 0
    told = capsys.readouterr().err
    assert told.count("done before") == 6
    assert "starting" not in told
    assert time.monotonic() - started_s < 60


COMMAND = [sys.executable, "-c", "import sys; from repwam_core.cli import main; sys.exit(main(sys.argv[1:]))"]
SMALL = ["--size", "32", "48", "--budget", "0.02"]


def _stopped_while_training_the_tokenizer(dataset, out, how):
    """Starts a data set run, sends a signal once the tokenizer has begun to learn, and returns how it ended."""
    command = [*COMMAND, "quickstart", "--dataset", str(dataset), *SMALL, "--out", str(out)]
    child = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in a shell's background ignores it
    )
    _wait_for(lambda: list(out.glob("tokenizer-*/fit/config.yaml")), child)
    child.send_signal(how)
    _, told = child.communicate(timeout=120)
    assert not list(out.glob("tokenizer-*/stage.json"))
    return child.returncode, told


@pytest.mark.slow
def test_ctrl_c_is_exit_code_130(tmp_path, shared_video_dataset):
    code, told = _stopped_while_training_the_tokenizer(shared_video_dataset, tmp_path / "run", signal.SIGINT)
    assert code == 130
    assert "interrupted" in told
    assert "Traceback" not in told


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_run_resumes_and_ends_as_if_it_had_not_been(tmp_path, shared_video_dataset, capfd):
    """The same tokenizer and the same policy come out as of an undisturbed run."""
    from repvitok import RepViTok
    from repwam_core import WorldActionModel

    code, _ = _stopped_while_training_the_tokenizer(shared_video_dataset, tmp_path / "killed", signal.SIGKILL)
    assert code == -signal.SIGKILL
    options = ["quickstart", "--dataset", str(shared_video_dataset), *SMALL]
    for name in ("killed", "whole"):
        assert main([*options, "--out", str(tmp_path / name)]) == 0
    assert "tokenizer: resuming" in capfd.readouterr().err
    for folder, model in (("tokenizer-*/tokenizer", RepViTok), ("adapt-*/policy/wam", WorldActionModel)):
        digests = [model.from_pretrained(next((tmp_path / run).glob(folder))).digest() for run in ("killed", "whole")]
        assert digests[0] == digests[1]


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
        (["--episodes", "0-9"], "--episodes must be one number"),
        (["--depth-range", "0", "5"], "so they need --dataset"),
        (["--cameras", "corner"], "--cameras and --depth-range are of a data set"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(arguments, told, tmp_path, capfd):
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert main(["quickstart", "--out", str(tmp_path / "run"), *given]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert told in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "declares the camera observation.images.side, but it was never recorded"),
        ([], "leave it out: --cameras observation.images.top"),
        (["--depth-range", "9", "5"], "MIN below MAX; got [9.0, 5.0]"),
        (["--cameras", "observation.images.back"], "no camera 'observation.images.back'"),
        (["--cameras", "observation.images.top", "--episodes", "3"], "no episodes 3; there are 2,5,9,40"),
        (["--cameras", "observation.images.top", "--episodes", "a"], "numbers and ranges like 0-9,12, got 'a'"),
    ],
)
def test_what_a_data_set_lacks_is_said_before_the_first_stage(arguments, told, tmp_path, gapped_video_dataset, capfd):
    options = ["--dataset", str(gapped_video_dataset), "--out", str(tmp_path / "run"), *arguments]
    assert main(["quickstart", *options]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert told in line
    assert not (tmp_path / "run").exists()


def test_data_without_actions_or_of_short_episodes_are_refused_before_the_first_stage(tmp_path, write_squares, capfd):
    root = write_squares(tmp_path / "short", {3: 8, 4: 5})
    assert main(["quickstart", "--dataset", str(root), "--out", str(tmp_path / "run")]) == 2
    assert "learned from episodes of 9 frames or more, the longest has 8" in capfd.readouterr().err
    info = root / "meta/info.json"
    info.write_text(info.read_text().replace('"action"', '"actions"'))
    assert main(["quickstart", "--dataset", str(root), "--out", str(tmp_path / "run")]) == 2
    told = capfd.readouterr().err
    assert 'has no column "action". `repwam prepare' in told
    assert "column: actions" in told
    assert not (tmp_path / "run").exists()


def test_a_full_disk_stops_before_the_stage_and_keeps_what_is_done(tmp_path, monkeypatch, capfd, shared_video_dataset):
    out = tmp_path / "run"
    StageRunner(out).run("before", lambda folder: {}, settings={}, inputs={})
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert main(["quickstart", "--dataset", str(shared_video_dataset), "--out", str(out)]) == 2
    assert "free some space" in capfd.readouterr().err
    assert list(out.glob("before-*/stage.json"))
