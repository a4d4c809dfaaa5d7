"""A data set's own columns become named channels, and the prepared data set is an ordinary one."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from repvitok.data import LeRobotReader, LeRobotWriter
from repwam_core.data.layout import DatasetLayout, known_layouts, prepare
from repwam_core.embodiment import ChannelLayout

CAMERAS = ("images.rgb.head", "images.rgb.wrist")
LAYOUT = {
    "embodiment": "arm",
    "action": [
        {"column": "actions.joints", "select": [1, 3], "names": ["right", "left"], "unit": "rad"},
        {"column": "actions.gripper", "names": ["gripper"]},
    ],
    "state": [{"column": "states.joints", "names": ["right", "left"]}],
    "cameras": ["images.rgb.head"],
}


@pytest.fixture(params=["v2.1", "v3.0"])
def source(request, tmp_path):
    """A data set with one column per part; actions.joints of row r of episode e holds 100 e + r + 0.1 k."""
    root = tmp_path / "source"
    writer = LeRobotWriter(
        root, version=request.param, fps=20, cameras=dict.fromkeys(CAMERAS, (16, 16)),
        state_names=["x"], action_names=["x"], robot_type="arm",
    )  # fmt: skip
    for index in range(2):
        frames = {camera: np.full((5, 16, 16, 3), 40 * index, np.uint8) for camera in CAMERAS}
        writer.add_episode(index, frames=frames, state=np.zeros((5, 1), "f4"), action=np.zeros((5, 1), "f4"), task="go")
    writer.finalize()
    for path in root.glob("data/**/*.parquet"):
        table = pq.read_table(path).drop(["action", "observation.state"])
        first = 100 * np.array(table["episode_index"]) + np.array(table["frame_index"])
        parts = {"actions.joints": 3, "actions.gripper": 1, "states.joints": 2}
        for key, size in parts.items():
            rows = (first[:, None] + 0.1 * np.arange(size)).astype("f4")
            table = table.append_column(key, pa.array(rows[:, 0] if size == 1 else list(rows)))
        pq.write_table(table, path)
    info = json.loads((root / "meta/info.json").read_text())
    for key, size in parts.items():
        info["features"][key] = {"dtype": "float32", "shape": [size], "names": None}
    for key in ("action", "observation.state"):
        del info["features"][key]
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def _layout(tmp_path, **changes):
    path = tmp_path / "layout.yaml"
    path.write_text(yaml.safe_dump(LAYOUT | changes))
    return DatasetLayout.load(path)


def test_columns_become_named_channels(source, tmp_path):
    robot = prepare(source, tmp_path / "out", _layout(tmp_path))
    assert (robot.action_names, robot.action_units) == (("right", "left", "gripper"), ("rad", "rad", "1"))
    reader = LeRobotReader(tmp_path / "out")
    assert reader.camera_keys == ["images.rgb.head"]
    assert reader.channel_names("action") == ("right", "left", "gripper")
    episode = reader.episode(1)
    rows = 100 + np.arange(5)[:, None]
    np.testing.assert_allclose(episode["action"], rows + np.array([0.1, 0.2, 0.0]), rtol=1e-6)
    np.testing.assert_allclose(episode["observation.state"], rows + np.array([0.0, 0.1]), rtol=1e-6)
    assert reader.episodes[1].task == "go"
    np.testing.assert_array_equal(reader.frames(1, CAMERAS[0], [2]), LeRobotReader(source).frames(1, CAMERAS[0], [2]))


def test_a_second_run_returns_and_another_layout_is_refused(source, tmp_path):
    out = tmp_path / "out"
    prepare(source, out, _layout(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in out.glob("data/**/*.parquet")}
    prepare(source, out, _layout(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in out.glob("data/**/*.parquet")} == before
    with pytest.raises(ValueError, match="prepared otherwise"):
        prepare(source, out, _layout(tmp_path, embodiment="other"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cameras": ["top"]}, r"no cameras \['top'\]; there are"),
        ({"state": [{"column": "qpos", "names": ["x"]}]}, "no column 'qpos'"),
        ({"state": [{"column": "states.joints", "names": ["x"]}]}, "has 2 numbers, the layout expects 1"),
        ({"state": [{"column": "states.joints", "select": [1, 3], "names": ["x", "y"]}]}, "the layout expects 3"),
    ],
)
def test_what_the_data_set_lacks_is_named_and_nothing_is_written(source, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(source, tmp_path / "out", _layout(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"robot": 1}, "expected the keys"),
        ({"action": [{"column": "a", "names": ["x"], "kind": 1}]}, "expected a part"),
        ({"action": [{"column": "a", "names": ["x"], "units": ["m", "m"]}]}, "as many names as units"),
        ({"action": [{"column": "a", "names": ["x"]}, {"column": "b", "names": ["x"]}]}, "distinct"),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        _layout(tmp_path, **changes)


def test_the_known_layouts_share_one_order_of_channels():
    robots = [DatasetLayout.load(name).robot(30.0) for name in known_layouts()]
    shared = ChannelLayout.of(robots)
    assert len(shared.names) == 20
    agibot = next(robot for robot in robots if robot.name == "agibot-a2d")
    genie = next(robot for robot in robots if robot.name == "interndata-genie1")
    assert shared.mask(agibot).sum() == 20
    actions = np.arange(16, dtype=np.float32)
    np.testing.assert_array_equal(shared.gather(shared.scatter(actions, genie), genie), actions)
    with pytest.raises(ValueError, match="one of"):
        DatasetLayout.load("nowhere")
