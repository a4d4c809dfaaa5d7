"""Our reader agrees with LeRobot's own on real recordings, and with what was written on small ones."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from einops import reduce
from PIL import Image
from repvitok.data.lerobot.format import flat_names
from repvitok.data.lerobot.reader import LeRobotReader

VERSIONS = ("v2.1", "v3.0")


@pytest.mark.parametrize("version", VERSIONS)
def test_agrees_with_lerobot_on_real_recordings(shared_data, version):
    reader = LeRobotReader(shared_data / f"unitree-g1-lerobot-{version}")
    reference = json.loads((shared_data / "unitree-g1-reference.json").read_text())
    assert (len(reader), reader.num_episodes, reader.fps) == (1630, 6, 30.0)
    for expected in reference["items"]:
        item = reader[expected["index"]]
        for ours, theirs in (("action", "action"), ("observation.state", "state"), ("timestamp", "timestamp")):
            assert item[ours].dtype == np.float32
            np.testing.assert_allclose(item[ours], expected[theirs], rtol=0, atol=5.1e-7)  # the file has 6 digits
        for key in ("index", "episode_index", "frame_index", "task"):
            assert item[key] == expected[key]
        frame = item["observation.images.cam_high"]
        means = reduce(frame / 255.0, "(r h) (c w) rgb -> rgb r c", "mean", r=6, c=8)
        assert np.abs(means - np.array(expected["rgb_mean_6x8"])).max() < 2 / 255


@pytest.mark.slow
def test_both_versions_of_a_real_recording_are_the_same(shared_data):
    old, new = (LeRobotReader(shared_data / f"unitree-g1-lerobot-{version}") for version in VERSIONS)
    camera = old.camera_keys[0]
    for info in old.episodes:
        for key, column in old.episode(info.index).items():
            np.testing.assert_array_equal(column, new.episode(info.index)[key])
        wanted = [0, 1, info.length // 2, info.length - 1]
        np.testing.assert_array_equal(old.frames(info.index, camera, wanted), new.frames(info.index, camera, wanted))
    assert len(old.frames(0, camera)) == 221
    assert old.channel_names("action")[13] == "kRightWristYaw"


def test_versions_give_the_same_items(data_sets):
    old, new = (LeRobotReader(data_sets[version]) for version in VERSIONS)
    assert (old.version, new.version) == VERSIONS
    assert old.episodes == new.episodes
    assert len(old) == len(new) == 40
    for index in range(len(old)):
        first, second = old[index], new[index]
        assert first.keys() == second.keys()
        for key in first:
            np.testing.assert_array_equal(first[key], second[key])


@pytest.mark.parametrize("version", VERSIONS)
def test_items_are_what_was_written(data_sets, make_episode, read_number, version):
    reader = LeRobotReader(data_sets[version])
    index = 0
    for number, info in enumerate(reader.episodes):
        written = make_episode(number)
        assert (info.index, info.task, info.metadata) == (number, written["task"], written["metadata"])
        for frame in range(info.length):
            item = reader[index]
            np.testing.assert_array_equal(item["action"], written["action"][frame].astype(np.float32))
            np.testing.assert_array_equal(item["observation.state"], written["state"][frame].astype(np.float32))
            np.testing.assert_array_equal(item["contact"], written["extra"]["contact"][frame])
            assert item["next.success"] == (frame == info.length - 1)
            assert (item["index"], item["frame_index"], item["episode_index"]) == (index, frame, number)
            assert item["timestamp"] == np.float32(frame / 20)
            assert item["task"] == written["task"]
            for camera in reader.camera_keys:
                assert read_number(item[camera]) == 10 * number + frame
                assert np.abs(item[camera].astype(int) - written["frames"][camera][frame]).mean() < 4
            index += 1
    assert reader[-1]["index"] == index - 1
    with pytest.raises(IndexError):
        reader[index]


@pytest.mark.parametrize("version", VERSIONS)
def test_episodes_come_whole_or_in_part(data_sets, read_number, version):
    reader = pickle.loads(pickle.dumps(LeRobotReader(data_sets[version])))
    columns = reader.episode(1)
    assert columns["action"].shape == (14, 2)
    assert columns["action"].dtype == np.float32
    assert columns["next.success"].dtype == bool
    assert columns["frame_index"].tolist() == list(range(14))
    frames = reader.frames(1, "observation.images.wrist", [13, 2, 2])
    assert [read_number(frame) for frame in frames] == [23, 12, 12]
    assert reader.frames(2, "observation.images.top").shape == (6, 32, 48, 3)
    with pytest.raises(ValueError, match=r"episode 2 has frames 0\.\.5, asked for 3\.\.6"):
        reader.frames(2, "observation.images.top", [3, 6])
    with pytest.raises(ValueError, match=r"no camera 'left'; there are \['observation"):
        reader.frames(2, "left")
    with pytest.raises(ValueError, match="no episode 4; there are 4"):
        reader.episode(4)


def test_channel_names_in_every_form():
    assert flat_names([["a", "b"], ["c"]]) == ("a", "b", "c")
    assert flat_names(["a", "b"]) == ("a", "b")
    assert flat_names({"motors": ["a", "b"]}) == ("a", "b")
    assert flat_names({"b": 1, "a": 0}) == ("a", "b")
    assert flat_names(None) == ()


def test_columns_without_names_are_numbered(data_sets):
    reader = LeRobotReader(data_sets["v2.1"])
    assert reader.channel_names("action") == ("dx", "dy")
    assert reader.channel_names("contact") == ("contact_0", "contact_1", "contact_2", "contact_3")
    feature = reader.metadata.features["action"]
    for names in (["x", "x"], {"left": ["x"], "right": ["x"]}, ["x", ""], ["x", " "], ["x"], ["x", "y", "z"]):
        # A name that is there twice would pair actions with the wrong state.
        assert dataclasses.replace(feature, names=names).channel_names("action") == ("action_0", "action_1")
    with pytest.raises(ValueError, match="no feature 'torque'"):
        reader.channel_names("torque")


def test_what_is_no_data_set_says_what_was_looked_for(tmp_path, data_sets):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        LeRobotReader(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"not a LeRobot data set: it has no meta/info\.json"):
        LeRobotReader(tmp_path)
    (tmp_path / "meta").mkdir()
    info = tmp_path / "meta/info.json"
    info.write_text("{")
    with pytest.raises(ValueError, match=r"info\.json: not a whole JSON document"):
        LeRobotReader(tmp_path)
    info.write_text('{"fps": 30}')
    with pytest.raises(ValueError, match=r"'codebase_version'.* missing"):
        LeRobotReader(tmp_path)
    known = json.loads((data_sets["v2.1"] / "meta/info.json").read_text())
    info.write_text(json.dumps({**known, "codebase_version": "v1.6"}))
    with pytest.raises(ValueError, match=r"v1\.6 is not supported; expected v2\.0, v2\.1 or v3\.0"):
        LeRobotReader(tmp_path)


def test_damaged_data_sets_name_the_file(tmp_path, data_sets):
    root = tmp_path / "copy"
    shutil.copytree(data_sets["v2.1"], root)
    parquet = root / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(parquet)
    pq.write_table(table.slice(0, 5), parquet)
    with pytest.raises(ValueError, match=r"episode_000001\.parquet: expected 14 rows for episode 1, found 5"):
        LeRobotReader(root).episode(1)
    pq.write_table(table.drop_columns(["action"]), parquet)
    with pytest.raises(ValueError, match=r"columns \['action'\] are missing"):
        LeRobotReader(root).episode(1)
    ragged = pa.array([[1.0]] * 14, pa.list_(pa.float32()))
    pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", ragged), parquet)
    with pytest.raises(ValueError, match=r"column 'action' should hold \[2\] numbers"):
        LeRobotReader(root).episode(1)
    parquet.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ValueError, match=r"episode_000001\.parquet: not a readable parquet"):
        LeRobotReader(root).episode(1)
    parquet.unlink()
    with pytest.raises(FileNotFoundError, match=r"episode_000001\.parquet"):
        LeRobotReader(root).episode(1)
    (root / "videos/chunk-000/observation.images.top/episode_000000.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"episode_000000\.mp4"):
        LeRobotReader(root)[0]
    (root / "meta/episodes.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"episodes\.jsonl"):
        LeRobotReader(root)


def with_pictures(source: Path, root: Path, *, files: bool = False) -> LeRobotReader:
    """The data set with every camera stored as PNG in its tables, or as files that the tables name, and no video."""
    videos = LeRobotReader(source)
    shutil.copytree(source, root, ignore=shutil.ignore_patterns("videos"))
    info = json.loads((root / "meta/info.json").read_text())
    for table in sorted((root / "data").rglob("*.parquet")):
        columns = pq.read_table(table)
        numbers = list(zip(columns["episode_index"].to_pylist(), columns["frame_index"].to_pylist(), strict=True))
        for camera in videos.camera_keys:
            stored = []
            for episode, frame in numbers:
                png = io.BytesIO()
                Image.fromarray(videos.frames(episode, camera, [frame])[0]).save(png, "PNG")
                name = f"images/{camera}/{episode}_{frame}.png"
                if files:
                    (root / name).parent.mkdir(parents=True, exist_ok=True)
                    (root / name).write_bytes(png.getvalue())
                stored.append({"bytes": None if files else png.getvalue(), "path": name})
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            columns = columns.append_column(camera, pa.array(stored, kind))
            info["features"][camera]["dtype"] = "image"
        pq.write_table(columns, table)
    info["video_path"] = None
    (root / "meta/info.json").write_text(json.dumps(info))
    return LeRobotReader(root)


@pytest.mark.parametrize("files", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_pictures_in_tables_are_cameras_too(tmp_path, data_sets, version, files):
    videos, pictures = LeRobotReader(data_sets[version]), with_pictures(data_sets[version], tmp_path / "p", files=files)
    assert pictures.camera_keys == videos.camera_keys
    for index in (0, 13, 39):
        old, new = videos[index], pictures[index]
        assert old.keys() == new.keys()
        for key in old:
            np.testing.assert_array_equal(old[key], new[key])
    camera = videos.camera_keys[1]
    np.testing.assert_array_equal(pictures.frames(1, camera, [13, 2, 2]), videos.frames(1, camera, [13, 2, 2]))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(pictures)).frames(2, camera), videos.frames(2, camera))
    assert pictures.frames(1, camera, []).shape == videos.frames(1, camera, []).shape
    with pytest.raises(ValueError, match=r"episode 2 has frames 0\.\.5, asked for 3\.\.6"):
        pictures.frames(2, camera, [3, 6])


def test_damaged_pictures_name_their_row(tmp_path, data_sets):
    pictures = with_pictures(data_sets["v2.1"], tmp_path / "p")
    camera, path = pictures.camera_keys[0], tmp_path / "p/data/chunk-000/episode_000001.parquet"
    table = pq.read_table(path)
    whole = table[camera].to_pylist()
    column = table.schema.get_field_index(camera)
    for broken, told in (
        ({"bytes": whole[3]["bytes"][:40], "path": None}, "not a readable picture"),
        ({"bytes": b"no picture", "path": None}, "not a readable picture"),
        ({"bytes": b"version https://git-lfs.github.com/spec/v1\noid", "path": None}, "git lfs pull"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        ({"bytes": None, "path": "../../outside.png"}, "lies outside the data set"),
        ({"bytes": None, "path": "images/none.png"}, "No such file"),
    ):
        stored = pa.array([*whole[:3], broken, *whole[4:]], table[camera].type)
        pq.write_table(table.set_column(column, camera, stored), path)
        reader = LeRobotReader(tmp_path / "p")
        assert len(reader.frames(1, camera, [0, 1, 2])) == 3
        with pytest.raises(ValueError, match=rf"episode_000001\.parquet, {camera}, row 3.*{told}"):
            reader.frames(1, camera, [2, 3])
    pq.write_table(table.set_column(column, camera, pa.array([b""] * len(table))), path)
    with pytest.raises(ValueError, match="expected pictures as structs of bytes and path, got binary"):
        LeRobotReader(tmp_path / "p").frames(1, camera)
    pq.write_table(table.drop_columns([camera]), path)
    with pytest.raises(ValueError, match=rf"no column '{camera}', .*never recorded, leave it out"):
        LeRobotReader(tmp_path / "p").frames(1, camera)


def test_frame_size_whatever_the_order_of_the_axes(tmp_path, data_sets):
    root = tmp_path / "copy"
    shutil.copytree(data_sets["v2.1"], root)
    info = json.loads((root / "meta/info.json").read_text())
    camera = "observation.images.top"
    for shape, names in (
        ([32, 48, 3], ["height", "width", "channel"]),
        ([3, 32, 48], ["channels", "height", "width"]),
        ([3, 32, 48], None),
        ([32, 48, 3], None),
    ):
        info["features"][camera] |= {"shape": shape, "names": names}
        (root / "meta/info.json").write_text(json.dumps(info))
        assert LeRobotReader(root).frame_size(camera) == (32, 48)
    with pytest.raises(ValueError, match="no camera 'left'"):
        LeRobotReader(root).frame_size("left")
