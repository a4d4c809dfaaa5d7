"""LeRobot as published: what it writes we read, what we write it reads, every row and key.

It runs in an environment of its own, made once by uv in pytest's cache: `pytest --lerobot` or `--lerobot=PYTHON`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.lerobot.writer import LeRobotWriter
from repvitok.data.video import write_video

PEER = Path(__file__).with_name("lerobot_peer.py")
pytestmark = [pytest.mark.lerobot, pytest.mark.timeout(3600)]


@pytest.fixture(scope="session")
def lerobot(lerobot_environment) -> Path:
    """The interpreter of an environment with LeRobot and nothing of ours."""
    return lerobot_environment("alone", ["lerobot[dataset]>=0.4"], older=True)


def peer(lerobot: Path, tmp_path: Path, *arguments: str | Path) -> str:
    """Runs a verb of lerobot_peer.py, offline and with a home of its own, so that nothing is asked of a hub."""
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_LEROBOT_HOME": str(tmp_path / "hf/lerobot"), "HF_HUB_OFFLINE": "1"}
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", **home}
    command = [str(lerobot), "-I", str(PEER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def require_same(reader: LeRobotReader, theirs: dict[str, np.ndarray]) -> None:
    """Row by row and key by key: numbers exactly, pictures within what two decoders' colours differ by."""
    assert set(reader[0]) == set(theirs) - set(reader.depth_keys)
    assert len(reader) == len(theirs["index"])
    for index in range(len(reader)):
        for key, value in reader[index].items():
            other = theirs[key][index]
            if key in reader.camera_keys:
                assert np.abs(value.astype(float) - 255 * other).max() <= 3, (index, key)
            elif key == "task":
                assert value == str(other)
            else:
                value = np.reshape(value, other.shape).astype(other.dtype)  # theirs has no float64
                np.testing.assert_array_equal(value, other, err_msg=f"{index}, {key}")


def read_by_lerobot(lerobot: Path, tmp_path: Path, root: Path) -> dict[str, np.ndarray]:
    peer(lerobot, tmp_path, "read", root, tmp_path / "rows.npz")
    return dict(np.load(tmp_path / "rows.npz"))


def test_what_lerobot_writes_we_read(lerobot, tmp_path):
    peer(lerobot, tmp_path, "write", tmp_path / "data")
    reader = LeRobotReader(tmp_path / "data")
    theirs = read_by_lerobot(lerobot, tmp_path, tmp_path / "data")
    require_same(reader, theirs)
    assert [episode.length for episode in reader.episodes] == [9, 14, 5]
    assert [episode.task for episode in reader.episodes] == ["open the window", "close the door", "open the window"]
    assert reader.channel_names("observation.state") == ("x", "y", "z")
    assert reader.camera_keys == ["observation.images.video", "observation.images.picture"]
    known = json.loads((tmp_path / "data/meta/info.json").read_text())["features"]
    assert reader.depth_keys == [key for key in known if "dep" in key or "deep" in key]
    if reader.depth_keys:
        asked = LeRobotReader(tmp_path / "data", depth_range=(1000, 2000))
        grey = asked.frames(1, "observation.images.deep_picture")[:, 0, 0, 0]
        np.testing.assert_allclose(grey, np.minimum(25.5 * np.arange(14), 255), atol=0.51)
        film = asked.frames(1, "observation.images.depth").astype(float)
        depth = theirs["observation.images.depth"][9:23].clip(1000, 2000)  # in millimetres
        np.testing.assert_allclose(film, np.repeat((depth - 1000) * 0.255, 3, -1), atol=0.51)


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_what_we_write_lerobot_reads(lerobot, tmp_path, data_sets, version):
    """Version 2.1 by LeRobot's own converter, which is how it reads it."""
    shutil.copytree(data_sets[version], tmp_path / "data")
    reader = LeRobotReader(data_sets[version])
    if version == "v2.1":
        peer(lerobot, tmp_path, "convert", tmp_path / "data")
        require_same(LeRobotReader(tmp_path / "data"), read_by_lerobot(lerobot, tmp_path, tmp_path / "data"))
    require_same(reader, read_by_lerobot(lerobot, tmp_path, tmp_path / "data"))


def test_rows_slower_than_the_film_get_the_frames_that_lerobot_gives(lerobot, tmp_path, make_frames, read_number):
    writer = LeRobotWriter(
        tmp_path / "data",
        version="v3.0",
        fps=10,
        cameras={"cam": (32, 32)},
        state_names=["x"],
        action_names=["x"],
        robot_type="arm",
    )
    for index in range(2):
        numbers = np.zeros((5, 1), np.float32)
        writer.add_episode(index, frames={"cam": make_frames(5, (32, 32))}, state=numbers, action=numbers, task="do it")
    writer.finalize()
    # The film is replaced by one of three times the rate, of which frames 0 3 6 ... are those of the rows.
    (film,) = (tmp_path / "data").rglob("*.mp4")
    write_video(film, make_frames(30, (32, 32)), 30)
    reader = LeRobotReader(tmp_path / "data")
    require_same(reader, read_by_lerobot(lerobot, tmp_path, tmp_path / "data"))
    assert [read_number(frame) for frame in reader.frames(1, "cam")] == [15, 18, 21, 24, 27]
