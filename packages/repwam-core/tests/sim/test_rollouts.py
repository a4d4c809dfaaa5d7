"""A rollout that was killed goes on where it stood and ends as one that was not; another one's folder is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repvitok.runtime.errors import UserError
from repwam_core.cli import main
from repwam_core.sim.evaluate import RolloutFolder
from repwam_core.sim.results import EpisodeResult, load_films, load_results

ABOUT = {"tasks": ["push", "reach"], "execute": None, "settings": {"size": (32, 32)}, "policy": "here"}
PLANNED = [EpisodeResult(task, seed, "go", False, 0) for seed in range(4) for task in ABOUT["tasks"]]


def played(episode: EpisodeResult) -> EpisodeResult:
    filmed = np.full((3, 2, 2, 3), episode.seed, np.uint8) if episode.seed < 2 else None
    return EpisodeResult(episode.task, episode.seed, episode.instruction, episode.seed % 2 == 0, 7, frames=filmed)


class Killed(BaseException):
    """As if the process had ended here: nothing in the rollout's code may be run for it."""


def rollout(folder, parts, killed_before=None, about=ABOUT):
    """Plays the parts; what was played. Ends before a part, or before the results, if it is to be killed there."""
    began = []
    with RolloutFolder(folder, about) as kept:
        for number, part in enumerate(parts):
            if kept.ended(part) is None:
                if number == killed_before:
                    raise Killed
                began.append(number)
                kept.keep([played(episode) for episode in part])
        if killed_before == len(parts):
            raise Killed
        kept.finish(kept.ended(PLANNED) or [])
    return began


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@settings(deadline=None, max_examples=15)
@given(st.integers(1, len(PLANNED)), st.lists(st.integers(0, len(PLANNED)), max_size=4))
def test_killed_anywhere_any_number_of_times_it_ends_alike(tmp_path_factory, size, kills):
    root = tmp_path_factory.mktemp("rollouts")
    parts = [PLANNED[first : first + size] for first in range(0, len(PLANNED), size)]
    for kill in sorted(min(kill, len(parts)) for kill in kills):
        with pytest.raises(Killed):
            rollout(root / "killed", parts, kill)
    already = max((min(kill, len(parts)) for kill in kills), default=0)
    assert rollout(root / "killed", parts) == list(range(already, len(parts)))
    assert rollout(root / "whole", parts) == list(range(len(parts)))
    names = {"results.json", "films.npz"}
    killed, whole = files(root / "killed"), files(root / "whole")
    assert set(killed) == set(whole) == names
    assert killed["results.json"] == whole["results.json"]
    films = [load_films(root / name / "films.npz") for name in ("killed", "whole")]
    assert list(films[0]) == list(films[1]) == [f"{e.task}/{e.seed}" for e in PLANNED if e.seed < 2]
    assert all((films[0][name] == films[1][name]).all() for name in films[0])
    assert rollout(root / "killed", parts) == []  # it is finished: nothing is played again


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"execute": 4}, "execute null, not 4"),
        ({"tasks": ["push"]}, r"tasks \[\"push\", \"reach\"\], not \[\"push\"\]"),
        ({"settings": {"size": [64, 64]}}, "settings"),
        ({"guidance": 2.0}, r"guidance null, not 2\.0"),
    ],
)
def test_a_folder_of_another_rollout_is_refused_and_stays(tmp_path, finished, other, said):
    parts = [PLANNED[:4], PLANNED[4:]]
    if finished:
        rollout(tmp_path, parts)
    else:
        with pytest.raises(Killed):
            rollout(tmp_path, parts, 1)
    before = files(tmp_path)
    with pytest.raises(UserError, match=f"ran with .*{said}.*name another folder"):
        rollout(tmp_path, parts, about={**ABOUT, **other})
    assert files(tmp_path) == before
    assert rollout(tmp_path, parts, about={**ABOUT, "policy": "moved"}) == ([] if finished else [1])


@pytest.mark.parametrize("name", ["policy.json", "meta.json", "meta/info.json", "last.ckpt"])
def test_what_is_anothers_gets_no_results(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="give a rollout a folder of its own"):
        rollout(tmp_path, [PLANNED])
    assert files(tmp_path).keys() == {Path(name).name}


def test_other_instructions_are_another_rollout(tmp_path):
    rollout(tmp_path, [PLANNED])
    told = [EpisodeResult(e.task, e.seed, "stop", False, 0) for e in PLANNED]
    with RolloutFolder(tmp_path, ABOUT) as folder, pytest.raises(UserError, match="under other instructions"):
        folder.ended(told)


def test_two_rollouts_in_one_folder(tmp_path):
    code = f"""
import time
from repwam_core.sim.evaluate import RolloutFolder
with RolloutFolder({str(tmp_path)!r}, {{}}):
    print("held", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is writing"), RolloutFolder(tmp_path, {}):
            pass
    finally:
        other.kill()
        other.wait()


@pytest.mark.sim
def test_the_verb_goes_on_after_kill_9(tmp_path, capsys):
    command = ["rollout", "--baseline", "random", "--tasks", "reach", "push", "--episodes", "3", "--workers", "1"]
    command += ["--max-env-steps", "60"]
    code = "import sys; from repwam_core.cli import main; sys.exit(main(sys.argv[1:]))"
    killed = [*command, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen([sys.executable, "-c", code, *killed])
    try:
        while process.poll() is None and not list((tmp_path / "killed" / "unfinished").glob("*.json")):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.wait()
    assert process.returncode == -signal.SIGKILL
    kept = len(list((tmp_path / "killed" / "unfinished").glob("*.json")))
    assert 0 < kept < 6
    assert main(killed) == main([*command, "--out", str(tmp_path / "whole")]) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    about = load_results(tmp_path / "whole" / "results.json")[1]
    assert (about["baseline"], about["tasks"], len(about["seeds"])) == ("random", ["reach", "push"], 3)
    capsys.readouterr()
    assert main([*killed, "--act-repeat", "4"]) == 2
    assert "name another folder" in capsys.readouterr().err
    assert main(killed) == 0
    assert json.loads((tmp_path / "killed" / "results.json").read_text())["rates"]["all"]["episodes"] == 6


def test_what_version_0_1_left_unfinished_goes_on_as_meta_world_s(tmp_path):
    """It named no suite."""
    parts = [PLANNED[:2], PLANNED[2:]]
    with pytest.raises(Killed):
        rollout(tmp_path, parts, killed_before=1)
    with pytest.raises(UserError, match='suite "metaworld", not "toy"'):
        rollout(tmp_path, parts, about={"suite": "toy", **ABOUT})
    assert rollout(tmp_path, parts, about={"suite": "metaworld", **ABOUT}) == [1]
