"""What the writer writes is a LeRobot data set: complete, resumable, the same from any number of processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from repvitok.data.lerobot import writer as lerobot_writer
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.lerobot.writer import LeRobotWriter, column_statistics, image_statistics, pooled_statistics
from repvitok.runtime.errors import UserError

VERSIONS = ("v2.1", "v3.0")


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


ADD_ONE = """
import sys
from pathlib import Path

import numpy as np
from repvitok.data import LeRobotWriter

root, version, index, length = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
writer = LeRobotWriter(
    root, version=version, fps=10, cameras={"cam": (16, 16)}, state_names=[], action_names=["a"], robot_type="r"
)
frames = np.full((length, 16, 16, 3), 20 * index, dtype=np.uint8)
writer.add_episode(index, frames={"cam": frames}, action=np.ones((length, 1)), task=f"task {index}")
"""


def add_one(root, version, index, length):
    """Starts a process that adds one episode."""
    return subprocess.Popen([sys.executable, "-c", ADD_ONE, str(root), version, str(index), str(length)])


@pytest.mark.parametrize("version", VERSIONS)
def test_finalizing_again_and_another_order_change_nothing(tmp_path, data_sets, make_writer, make_episode, version):
    expected = contents(data_sets[version])
    writer = make_writer(tmp_path, version)
    for index in range(4):
        writer.add_episode(index, **make_episode(index))
    writer.finalize()
    assert contents(tmp_path) == expected
    writer.finalize()
    make_writer(tmp_path, version).finalize()
    assert contents(tmp_path) == expected
    assert not [name for name in expected if "pending" in name or "partial" in name or "staging" in name]


@pytest.mark.slow
def test_processes_may_write_side_by_side(tmp_path):
    version = "v3.0"
    together = [add_one(tmp_path / "many", version, index, 3 + index) for index in range(4)]
    assert [process.wait() for process in together] == [0, 0, 0, 0]
    for index in (3, 1, 0, 2):
        assert add_one(tmp_path / "one", version, index, 3 + index).wait() == 0
    for name in ("many", "one"):
        LeRobotWriter(
            tmp_path / name,
            version=version,
            fps=10,
            cameras={"cam": (16, 16)},
            state_names=[],
            action_names=["a"],
            robot_type="r",
        ).finalize()
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    reader = LeRobotReader(tmp_path / "many")
    assert [episode.task for episode in reader.episodes] == [f"task {index}" for index in range(4)]
    assert reader.episode(1)["action"].shape == (4,)  # LeRobot stores one channel as a scalar column


@pytest.mark.parametrize("version", VERSIONS)
def test_an_interrupted_episode_does_not_count(tmp_path, make_writer, make_episode, monkeypatch, version):
    writer = make_writer(tmp_path, version)
    writer.add_episode(0, **make_episode(0))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("repvitok.data.lerobot.writer._write_table", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.add_episode(1, **make_episode(1))
    writer = make_writer(tmp_path, version)
    assert [writer.episode_exists(index) for index in range(3)] == [True, False, False]
    writer.add_episode(1, **make_episode(1))
    writer.finalize()
    assert [episode.length for episode in LeRobotReader(tmp_path).episodes] == [9, 14]
    assert [writer.episode_exists(index) for index in range(3)] == [True, True, False]


@pytest.mark.parametrize("step", ["_groups_by_size", "_join_videos", "_write_tasks", "_info"])
def test_an_interrupted_finalize_is_done_again(tmp_path, data_sets, make_writer, make_episode, monkeypatch, step):
    writer = make_writer(tmp_path, "v3.0")
    for index in range(4):
        writer.add_episode(index, **make_episode(index))

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lerobot_writer, step, killed)
        with pytest.raises(KeyboardInterrupt):
            writer.finalize()
    writer.finalize()
    assert contents(tmp_path) == contents(data_sets["v3.0"])


def test_a_v21_data_set_grows(tmp_path, data_sets, make_writer, make_episode):
    for last in (2, 4):
        writer = make_writer(tmp_path, "v2.1")
        for index in range(4):
            if index < last and not writer.episode_exists(index):
                writer.add_episode(index, **make_episode(index))
        writer.finalize()
        assert LeRobotReader(tmp_path).num_episodes == last
    assert contents(tmp_path) == contents(data_sets["v2.1"])


@pytest.mark.parametrize("name", ["info.json", "episodes.jsonl", "episodes_stats.jsonl", "pending/episode_000003.json"])
@pytest.mark.parametrize("text", ["", "{}", "null", '{"length": "x"}'])
def test_what_is_damaged_of_an_earlier_writing_is_named(tmp_path, data_sets, make_writer, make_episode, name, text):
    shutil.copytree(data_sets["v2.1"], tmp_path / "copy")
    writer = make_writer(tmp_path / "copy", "v2.1")
    last = len(list((tmp_path / "copy/data").rglob("*.parquet")))
    writer.add_episode(last, **make_episode(0))
    path = tmp_path / "copy/meta" / name.replace("000003", f"{last:06d}")
    assert path.is_file()
    path.write_text(text)
    with pytest.raises(UserError, match=r"copy"):
        writer.finalize()


def test_a_joined_v30_data_set_does_not(tmp_path, data_sets, make_writer, make_episode):
    shutil.copytree(data_sets["v3.0"], tmp_path / "copy")
    with pytest.raises(ValueError, match=r"finished v3\.0 data set; write new episodes to another folder"):
        make_writer(tmp_path / "copy", "v3.0").add_episode(4, **make_episode(0))


def test_v30_files_are_split_by_size(tmp_path, data_sets, make_writer, make_episode, monkeypatch):
    monkeypatch.setattr(lerobot_writer, "VIDEO_FILE_MB", 0.003)
    monkeypatch.setattr(lerobot_writer, "DATA_FILE_MB", 0.002)
    writer = make_writer(tmp_path, "v3.0")
    for index in range(4):
        writer.add_episode(index, **make_episode(index))
    writer.finalize()
    assert len(list(tmp_path.glob("data/chunk-000/file-*.parquet"))) > 1
    assert len(list(tmp_path.glob("videos/observation.images.top/chunk-000/file-*.mp4"))) > 1
    split, whole = LeRobotReader(tmp_path), LeRobotReader(data_sets["v3.0"])
    for index in range(0, len(whole), 3):
        for key, value in whole[index].items():
            np.testing.assert_array_equal(split[index][key], value)


def test_v30_files_have_the_columns_lerobot_writes(shared_data, data_sets):
    theirs, ours = shared_data / "unitree-g1-lerobot-v3.0", data_sets["v3.0"]
    camera = {"observation.images.cam_high": "observation.images.top"}

    def schema(root: Path, name: str, rename: bool = False) -> dict[str, str]:
        fields = {field.name: str(field.type) for field in pq.read_schema(root / name)}
        for old, new in camera.items() if rename else ():
            fields = {key.replace(old, new): kind for key, kind in fields.items()}
        return fields

    episodes = "meta/episodes/chunk-000/file-000.parquet"
    assert schema(theirs, episodes, rename=True).items() <= schema(ours, episodes).items()
    assert schema(theirs, "meta/tasks.parquet") == schema(ours, "meta/tasks.parquet")
    described = [json.loads(pq.read_schema(root / "meta/tasks.parquet").metadata[b"pandas"]) for root in (theirs, ours)]
    assert described[0]["index_columns"] == described[1]["index_columns"] == ["task"]
    data = "data/chunk-000/file-000.parquet"
    assert set(schema(theirs, data)) <= set(schema(ours, data))
    infos = [json.loads((root / "meta/info.json").read_text()) for root in (theirs, ours)]
    assert set(infos[0]) == set(infos[1])
    assert infos[0]["features"]["timestamp"] == {**infos[1]["features"]["timestamp"], "fps": 30}
    stats = [json.loads((root / "meta/stats.json").read_text()) for root in (theirs, ours)]
    assert set(stats[0]["action"]) == set(stats[1]["action"])
    assert np.shape(stats[1]["observation.images.top"]["mean"]) == (3, 1, 1)


def test_v21_files_have_the_fields_lerobot_writes(shared_data, data_sets):
    theirs, ours = shared_data / "unitree-g1-lerobot-v2.1", data_sets["v2.1"]
    first = [json.loads((root / "meta/info.json").read_text()) for root in (theirs, ours)]
    assert set(first[0]) == set(first[1])
    cameras = first[0]["features"]["observation.images.cam_high"], first[1]["features"]["observation.images.top"]
    assert set(cameras[0]["info"]) == set(cameras[1]["info"])
    for name in ("episodes.jsonl", "tasks.jsonl", "episodes_stats.jsonl"):
        lines = [json.loads((root / "meta" / name).read_text().splitlines()[0]) for root in (theirs, ours)]
        assert set(lines[0]) <= set(lines[1])
    data = "data/chunk-000/episode_000000.parquet"
    schemas = [pq.read_schema(root / data) for root in (theirs, ours)]
    assert set(schemas[0].names) <= set(schemas[1].names)
    assert str(schemas[1].field("action").type).startswith("fixed_size_list")


@pytest.mark.slow
def test_our_statistics_are_those_lerobot_stored(shared_data):
    root = shared_data / "unitree-g1-lerobot-v2.1"
    lines = [json.loads(line)["stats"] for line in (root / "meta/episodes_stats.jsonl").read_text().splitlines()]
    reader = LeRobotReader(root)
    for key in ("action", "observation.state", "index"):
        ours = column_statistics(reader.episode(0)[key])
        for name, value in ours.items():
            np.testing.assert_allclose(value, lines[0][key][name], rtol=1e-4, atol=1e-5)
    sampled = np.linspace(0, 220, 100).round().astype(int).tolist()
    frames = image_statistics(reader.frames(0, reader.camera_keys[0], sampled))
    assert frames["count"] == [100]
    np.testing.assert_allclose(frames["mean"], lines[0][reader.camera_keys[0]]["mean"], atol=0.005)
    stored = json.loads((shared_data / "unitree-g1-lerobot-v3.0/meta/stats.json").read_text())
    for key in ("action", reader.camera_keys[0]):
        pooled = pooled_statistics([line[key] for line in lines])
        for name, value in pooled.items():
            np.testing.assert_allclose(value, stored[key][name], rtol=1e-6, atol=1e-9)


def test_pooled_statistics_are_those_of_all_rows():
    random = np.random.default_rng(0)
    parts = [random.normal(size=(n, 3)) * n for n in (4, 9, 1)]
    pooled, whole = (
        pooled_statistics([column_statistics(part) for part in parts]),
        column_statistics(np.concatenate(parts)),
    )
    for name, value in whole.items():
        np.testing.assert_allclose(pooled[name], value)


def test_gaps_and_emptiness_are_errors(tmp_path, make_writer, make_episode):
    writer = make_writer(tmp_path, "v2.1")
    with pytest.raises(ValueError, match="no complete episode"):
        writer.finalize()
    writer.add_episode(2, **make_episode(2))
    with pytest.raises(ValueError, match=r"episodes \[0, 1\] are missing"):
        writer.finalize()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": np.zeros((9, 3))}, r"action: expected \(T, 2\), got \(9, 3\)"),
        ({"action": None}, "action: the data set names its channels"),
        ({"state": np.zeros((8, 3))}, "need one length above 0"),
        ({"frames": {}}, r"expected cameras \["),
        ({"extra": {"timestamp": np.zeros(9)}}, "extra columns \\['timestamp'\\]"),
        ({"extra": {"words": np.array(["a"] * 9)}}, "dtype must be one of"),
        ({"metadata": {"length": 3}}, "metadata \\['length'\\]"),
    ],
)
def test_episodes_that_do_not_fit_are_refused(tmp_path, make_writer, make_episode, change, message):
    with pytest.raises(ValueError, match=message):
        make_writer(tmp_path, "v2.1").add_episode(0, **{**make_episode(0), **change})
    assert not list(tmp_path.rglob("*.parquet"))


def test_episodes_with_other_columns_are_refused(tmp_path, make_writer, make_episode):
    writer = make_writer(tmp_path, "v2.1")
    writer.add_episode(0, **make_episode(0))
    writer.add_episode(1, **{**make_episode(1), "extra": {}})
    with pytest.raises(ValueError, match="episode 1 has other columns"):
        writer.finalize()
    with pytest.raises(ValueError, match=r"version must be one of \['v2.1', 'v3.0'\], got 'v2'"):
        make_writer(tmp_path, "v2")
