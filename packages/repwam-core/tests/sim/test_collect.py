"""Collecting: the same files for any number of workers and interruptions, and clear refusals."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from repvitok.data import LeRobotReader
from repvitok.data.lerobot.metadata import read_hand_projection
from repvitok.runtime.errors import UserError
from repwam_core.sim.collect import NOISE_MODES, collect, read_plan, record_demonstration
from repwam_core.sim.metaworld import MetaWorldSettings, MetaWorldTask, paraphrases

SMALL = MetaWorldSettings(size=(32, 32))
TASKS = ("handle-press-side", "reach")
COLLECT = """
import sys
from repwam_core.sim.collect import collect
from repwam_core.sim.metaworld import MetaWorldSettings
if __name__ == "__main__":
    collect(sys.argv[1], {tasks}, episodes_per_task=3, seed=7, workers=2, settings=MetaWorldSettings(size=(32, 32)))
"""

pytestmark = [pytest.mark.sim, pytest.mark.usefixtures("rendering")]


def files_of(root: Path) -> dict[str, str]:
    """Every file's digest."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Path:
    """Six episodes collected in one go by this process."""
    root = tmp_path_factory.mktemp("collected") / "data"
    summary = collect(root, TASKS, episodes_per_task=3, seed=7, settings=SMALL, workers=1)
    assert (summary.episodes, summary.recorded) == (6, 6)
    return root


def test_the_data_set_says_what_it_holds(collected):
    reader = LeRobotReader(collected)
    assert reader.fps == 40.0
    assert reader.camera_keys == ["observation.images.corner2"]
    assert reader.channel_names("action") == ("ee_delta_x", "ee_delta_y", "ee_delta_z", "gripper_effort")
    for episode in reader.episodes:
        task = TASKS[episode.index % 2]
        assert episode.metadata["task_name"] == task
        assert episode.metadata["environment_seed"] == 70_000 + episode.index // 2
        assert episode.task in paraphrases(task)
        columns = reader.episode(episode.index)
        assert len(columns["action"]) == episode.length
        assert np.abs(columns["action"][:, :3]).max() <= 0.02 + 1e-6


def test_the_hand_is_projected_to_where_the_pictures_change(collected):
    """Where the projected hand moves the frames change more than where it would in a picture that is upside down."""
    reader, hand = LeRobotReader(collected), read_hand_projection(collected)
    assert hand is not None
    assert hand.channels == ["ee_x", "ee_y", "ee_z"]
    found = []
    for episode in range(6):
        columns, frames = reader.episode(episode), reader.frames(episode, reader.camera_keys[0])
        names = reader.channel_names("observation.state")
        assert hand.serves(names, reader.camera_keys)
        down_right = hand.places(columns["observation.state"], names, reader.camera_keys)[:, 0]
        assert ((down_right > 0) & (down_right < 1)).mean() > 0.9
        row, column = np.rint(down_right[4:-4] * 32 - 0.5).astype(int).clip(2, 29).T
        change = np.abs(frames[8:].astype(float) - frames[:-8]).mean(axis=-1)
        around = np.arange(-2, 3)
        for rows in (row, 31 - row):
            near = change[
                np.arange(len(rows))[:, None, None],
                rows[:, None, None] + around[:, None],
                column[:, None, None] + around,
            ]
            found.append(near.mean() / change.mean())
    right, upside_down = np.array(found).reshape(6, 2).mean(axis=0)
    assert right > 1.5
    assert right > 1.5 * upside_down


def test_the_state_follows_the_actions(collected):
    columns = LeRobotReader(collected).episode(0)
    moved = np.diff(columns["observation.state"][:, :3], axis=0).sum(axis=0)
    asked = columns["action"][:-1, :3].sum(axis=0)
    assert np.abs(moved - asked).max() < 0.15
    assert np.corrcoef(moved, asked)[0, 1] > 0.9


@pytest.mark.slow
def test_two_workers_write_the_same_files_and_a_killed_run_is_continued(collected, tmp_path):
    root = tmp_path / "data"
    script = tmp_path / "run.py"
    script.write_text(COLLECT.format(tasks=TASKS))
    command = [sys.executable, str(script), str(root)]
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(root.glob("data/*/*.parquet"))) < 2 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not (root / "meta/info.json").exists()
    time.sleep(1.0)  # the orphaned workers finish what they are at, and end
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert files_of(root) == files_of(collected)


def test_a_finished_collection_is_left_as_it_is_and_can_grow(collected, tmp_path):
    root = tmp_path / "data"
    first = collect(root, TASKS, episodes_per_task=1, seed=7, settings=SMALL, workers=1)
    again = collect(root, TASKS, episodes_per_task=1, seed=7, settings=SMALL, workers=1)
    grown = collect(root, TASKS, episodes_per_task=3, seed=7, settings=SMALL, workers=1)
    assert (first.recorded, again.recorded, grown.recorded) == (2, 0, 4)
    assert files_of(root) == files_of(collected)
    with pytest.raises(UserError, match="episodes_per_task 3, not 2"):
        collect(root, TASKS, episodes_per_task=2, seed=7, settings=SMALL, workers=1)


def test_other_settings_and_other_folders_are_refused(collected, tmp_path):
    with pytest.raises(UserError, match="seed 7, not 8"):
        collect(collected, TASKS, episodes_per_task=3, seed=8, settings=SMALL)
    with pytest.raises(UserError, match="holds a collection with noise"):
        collect(collected, TASKS, episodes_per_task=3, seed=7, settings=SMALL, noise=NOISE_MODES["pushes"])
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(UserError, match="holds no data set made by `repwam collect`"):
        collect(tmp_path, TASKS, episodes_per_task=1)
    with pytest.raises(UserError, match="was not made by `repwam collect`"):
        read_plan(tmp_path)


def test_bad_requests_leave_nothing_behind(tmp_path):
    root = tmp_path / "data"
    with pytest.raises(UserError, match="did you mean"):
        collect(root, ["buton-press"], episodes_per_task=1)
    with pytest.raises(UserError, match="episodes per task"):
        collect(root, TASKS, episodes_per_task=0)
    with pytest.raises(UserError, match="the data set's seed"):
        collect(root, TASKS, episodes_per_task=1, seed=100)
    with pytest.raises(ValueError, match="version must be one of"):
        collect(root, TASKS, episodes_per_task=1, version="v9")
    assert not root.exists()


def test_v3_holds_the_same_numbers(collected, tmp_path):
    collect(tmp_path / "v3", TASKS, episodes_per_task=1, seed=7, settings=SMALL, version="v3.0", workers=1)
    old, new = LeRobotReader(collected), LeRobotReader(tmp_path / "v3")
    for index in range(2):
        np.testing.assert_array_equal(old.episode(index)["action"], new.episode(index)["action"])
        np.testing.assert_array_equal(
            old.frames(index, "observation.images.corner2"), new.frames(index, "observation.images.corner2")
        )


def test_pushed_demonstrations_still_succeed(tmp_path):
    pushes = NOISE_MODES["pushes"]
    noisy = collect(tmp_path / "n", ["handle-press-side"], episodes_per_task=2, settings=SMALL, noise=pushes, workers=1)
    assert noisy.episodes == 2
    assert list(noisy.failed_attempts) == ["handle-press-side"]


def test_frames_in_the_data_set_are_close_to_what_was_drawn(collected):
    reader, task = LeRobotReader(collected), MetaWorldTask(TASKS[0], SMALL)
    seen = record_demonstration(task, reader.episodes[0].metadata["environment_seed"])
    task.close()
    (camera,) = reader.camera_keys
    error = reader.frames(0, camera, None).astype(float) - seen.frames[camera]
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 36  # 4:2:0 at crf 18 leaves 30 dB
