"""Whatever is wrong in a data set's meta folder is one error that names the file and the field; the rest is right."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from repvitok.data.folders import folder_kind, open_episodes, split_folder
from repvitok.data.lerobot.format import PathTemplate, number_ranges
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.sources import lerobot_sources
from repvitok.runtime.errors import UserError

VERSIONS = ("v2.1", "v3.0")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
CAMERA = "observation.images.front"
NAN = float("nan")


def refused(root: Path, *words: str, read: bool = False) -> None:
    """Opening the data set, or reading all of it, is one UserError that names its folder and the words."""
    with pytest.raises(UserError) as error:
        list(LeRobotReader(root)) if read else LeRobotReader(root)
    for word in (str(root), *words):
        assert word in str(error.value), str(error.value)


def as_written(data, reader: LeRobotReader) -> None:
    """Every episode's numbers are those that `PlainDataSet` wrote."""
    for info in reader.episodes:
        assert info.length == data.lengths[info.index]
        counter = 100 * info.index + np.arange(info.length)
        action = reader.episode(info.index, ["action"])["action"]
        np.testing.assert_array_equal(action.reshape(info.length, 2), np.stack([counter, -counter], axis=1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fps": None}, ["'fps'", "got null"]),
        ({"fps": 0}, ["'fps'", "(0)"]),
        ({"fps": -30}, ["'fps'", "(-30)"]),
        ({"fps": NAN}, ["'fps'", "finite", "nan"]),
        ({"fps": float("inf")}, ["'fps'", "finite", "inf"]),
        ({"fps": "30"}, ["'fps'", '("30")']),
        ({"fps": True}, ["'fps'", "bool"]),
        ({"fps": [30]}, ["'fps'", "array"]),
        ({"codebase_version": "v1.6"}, ["'codebase_version'", "v1.6", "v2.0, v2.1 or v3.0"]),
        ({"codebase_version": "v4.0"}, ["'codebase_version'", "v4.0"]),
        ({"codebase_version": 2.1}, ["'codebase_version'", "float"]),
        ({"codebase_version": None}, ["'codebase_version'", "null"]),
        ({"features": None}, ["'features'", "null"]),
        ({"features": []}, ["'features'", "array"]),
        ({"features": {}}, ["'features'"]),
        ({"features": {"action": None}}, ["'action'", "null"]),
        ({"features": {"action": {"shape": [2]}}}, ["'action'", "'dtype'", "missing"]),
        ({"features": {"action": {"dtype": None, "shape": [2]}}}, ["'action'", "'dtype'", "null"]),
        ({"features": {"action": {"dtype": "flaot32", "shape": [2]}}}, ["'action'", "'dtype'", "flaot32"]),
        ({"features": {"action": {"dtype": "string", "shape": [2]}}}, ["'action'", "'dtype'", "string"]),
        ({"features": {"action": {"dtype": "float32"}}}, ["'action'", "'shape'", "missing"]),
        ({"features": {"action": {"dtype": "float32", "shape": None}}}, ["'action'", "'shape'", "null"]),
        ({"features": {"action": {"dtype": "float32", "shape": 2}}}, ["'action'", "'shape'", "int"]),
        ({"features": {"action": {"dtype": "float32", "shape": [0]}}}, ["'action'", "'shape[0]'", "(0)"]),
        ({"features": {"action": {"dtype": "float32", "shape": [2, -1]}}}, ["'action'", "'shape[1]'", "(-1)"]),
        ({"features": {"action": {"dtype": "float32", "shape": [2.0]}}}, ["'action'", "'shape[0]'", "float"]),
        ({"features": {"action": {"dtype": "float32", "shape": [10**12]}}}, ["'action'", "'shape[0]'"]),
        ({"features": {"action": {"dtype": "float32", "shape": [10**6, 10**6]}}}, ["'action'", "'shape'"]),
        ({"features": {"action": {"dtype": "float32", "shape": [1] * 9}}}, ["'action'", "'shape'"]),
        ({"features": {CAMERA: {"dtype": "video", "shape": [4, 4, 3]}}}, ["'video_path'", "null", CAMERA]),
        ({"chunks_size": 0}, ["'chunks_size'", "(0)"]),
        ({"chunks_size": None}, ["'chunks_size'", "null"]),
        ({"data_path": None}, ["'data_path'", "null"]),
        ({"data_path": "/etc/{episode_index}.parquet"}, ["data_path", "beneath"]),
        ({"data_path": "a/../../{episode_index}.parquet"}, ["data_path", "beneath"]),
        ({"data_path": "data/{episode_index:0999999999d}.parquet"}, ["data_path", ":06d"]),
        ({"data_path": "data/{episode}.parquet"}, ["data_path", "{episode_index}"]),
        ({"data_path": "data/{episode_index.__class__}.parquet"}, ["data_path", "placeholders"]),
        ({"data_path": "data/{episode_index!r}.parquet"}, ["data_path", "placeholders"]),
        ({"data_path": "data/{episode_index"}, ["data_path", "placeholders"]),
        ({"data_path": "data/{}.parquet"}, ["data_path", "placeholders"]),
        ({"data_path": "data/\0.parquet"}, ["data_path", "beneath"]),
        ({"data_path": "d" * 3000}, ["data_path", "beneath"]),
        ({"data_path": ""}, ["data_path", "beneath"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("version", VERSIONS)
def test_wrong_info_is_named(plain, version, change, words):
    data = plain(version)
    data.write_info(data.described() | change)
    refused(data.root, "info.json", *words)


@pytest.mark.parametrize("key", ["codebase_version", "fps", "features", "data_path"])
def test_missing_info_is_named(plain, key):
    data = plain()
    data.write_info({name: value for name, value in data.described().items() if name != key})
    refused(data.root, "info.json", f"'{key}'", "missing")


def test_what_nobody_reads_may_be_anything(plain):
    data = plain()
    described = data.described()
    described |= {"splits": NAN, "total_frames": "many", "robot_type": None}
    described["features"]["language_events"] = {"dtype": "language", "shape": None}
    described["features"]["action"] |= {"info": {"unit": None}, "names": {"motors": ["x", "y"]}}
    data.write_info(described)
    reader = LeRobotReader(data.root)
    as_written(data, reader)
    assert reader.channel_names("action") == ("x", "y")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"episode_index": 1}, ["'length'", "missing"]),
        ({"length": 3}, ["'episode_index'", "missing"]),
        ({"episode_index": 1, "length": None}, ["'length'", "null"]),
        ({"episode_index": 1, "length": 0}, ["'length'", "(0)"]),
        ({"episode_index": 1, "length": -3}, ["'length'", "(-3)"]),
        ({"episode_index": 1, "length": 3.5}, ["'length'", "float"]),
        ({"episode_index": 1, "length": "3"}, ["'length'", "str"]),
        ({"episode_index": -1, "length": 3}, ["'episode_index'", "(-1)"]),
        ({"episode_index": 0, "length": 3}, ["'episode_index'", "once"]),
        ({"episode_index": 1, "length": 3, "tasks": [{}]}, ["'tasks'", "texts"]),
        ([1, 3], ["array"]),
        (None, ["null"]),
    ],
    ids=str,
)
def test_wrong_episode_lines_are_named(plain, row, words):
    data = plain()
    data.write_lines("episodes", [{"episode_index": 0, "length": 4}, row])
    refused(data.root, "episodes.jsonl, line 2", *words)


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("episode_index", None, ["missing"]),
        ("length", None, ["missing"]),
        ("length", [4, None, 5], ["row 1", "None"]),
        ("length", [4, 0, 5], ["row 1", "0"]),
        ("length", [4, -3, 5], ["row 1", "-3"]),
        ("length", [4.0, 3.5, 5.0], ["row 1", "3.5"]),
        ("length", ["4", "3", "5"], ["row 0", "'4'"]),
        ("episode_index", [0, 0, 2], ["row 1", "once"]),
        ("episode_index", [0, -1, 2], ["row 1", "-1"]),
        ("episode_index", [0.0, NAN, 2.0], ["row 1", "nan"]),
        ("data/chunk_index", [0, -1, 0], ["row 1", "-1"]),
        ("data/file_index", [[0], [0], [0]], ["row 0"]),
        ("dataset_from_index", [0, 3, 7], ["episode 1", "length"]),
        ("tasks", [[1.5], [], []], ["row 0", "texts"]),
    ],
    ids=str,
)
def test_wrong_episode_tables_are_named(plain, column, values, words):
    data = plain("v3.0")
    if values is None:
        data.change(lambda table: table.drop_columns([column]), data.episode_table)
    else:
        data.set_column(column, pa.array(values), data.episode_table)
    refused(data.root, "meta/episodes", column.removeprefix("dataset_from_"), *words)


def test_whole_numbers_that_pandas_made_floats_are_numbers(plain):
    data = plain("v3.0")
    for column in ("length", "data/file_index"):
        data.set_column(column, lambda table, key=column: table[key].cast(pa.float64()), data.episode_table)
    as_written(data, LeRobotReader(data.root))


@pytest.mark.parametrize("column", ["data/chunk_index", "data/file_index"])
def test_a_table_that_is_nowhere_is_named(plain, column):
    data = plain("v3.0")
    data.set_column(column, pa.array([0, None, 0]), data.episode_table)
    reader = LeRobotReader(data.root)
    assert len(reader.episode(0)["action"]) == 4
    with pytest.raises(UserError, match=f"meta/episodes.*'{column}' for episode 1"):
        reader.episode(1)


def test_two_episodes_never_share_rows_or_frames(plain):
    data = plain("v3.0")
    data.set_column("dataset_from_index", pa.array([0, 2, 7]), data.episode_table)
    data.set_column("dataset_to_index", pa.array([4, 5, 12]), data.episode_table)
    refused(data.root, "episodes 0 and 1", "row 2")
    with_camera(data := plain("v3.0"))
    times = {"from_timestamp": [0.0, 0.4, 0.4], "to_timestamp": [0.4, 0.7, 1.2]}
    for key, values in times.items():
        data.set_column(f"videos/{CAMERA}/{key}", pa.array(values), data.episode_table)
    refused(data.root, "episodes 1 and 2", CAMERA, "0.4 s")
    data.set_column(f"videos/{CAMERA}/from_timestamp", pa.array([0.0, 0.4, 0.5]), data.episode_table)
    refused(data.root, "episodes 1 and 2", CAMERA, "0.5 s")
    data.set_column(f"videos/{CAMERA}/from_timestamp", pa.array([0.0, 0.4, 0.7]), data.episode_table)
    as_written(data, LeRobotReader(data.root))
    with_camera(data := plain("v3.0"), video_path="videos/{video_key}.mp4")
    for key, values in (("file_index", [0, 1, 2]), ("from_timestamp", [0.0, 0.0, 0.0])):
        data.set_column(f"videos/{CAMERA}/{key}", pa.array(values), data.episode_table)
    refused(data.root, "episodes 0 and 1", CAMERA, f"videos/{CAMERA}.mp4")  # files that their path does not tell apart
    with_camera(data := plain(), video_path="videos/{video_key}.mp4")
    refused(data.root, "video_path", "{episode_index}")
    with_camera(data := plain(), CAMERA, "wrist", video_path="videos/{episode_index}.mp4")
    refused(data.root, "video_path", "{video_key}")


def with_camera(data, *cameras: str, video_path: str | None = None) -> None:
    """Declares cameras, and gives version 3 rows that place them in one file each."""
    cameras = cameras or (CAMERA,)
    old = "videos/{video_key}/{episode_index}.mp4"
    described = data.described()
    described["video_path"] = video_path or (old if data.version != "v3.0" else f"videos/{{video_key}}/{data.v3}.mp4")
    for camera in cameras:
        described["features"][camera] = {"dtype": "video", "shape": [16, 16, 3], "names": None}
        if data.version == "v3.0":
            for key in ("chunk_index", "file_index"):
                data.set_column(f"videos/{camera}/{key}", pa.array([0, 0, 0]), data.episode_table)
            starts = np.cumsum([0, *data.lengths.values()])[:-1] / 10
            data.set_column(f"videos/{camera}/from_timestamp", pa.array(starts), data.episode_table)
    data.write_info(described)


@pytest.mark.parametrize(
    ("version", "camera"),
    [("v2.1", "../../outside"), ("v3.0", "a/../../../b"), ("v3.0", "c" * 300)],
)
def test_cameras_lead_nowhere_outside(plain, version, camera):
    data = plain(version)
    with_camera(data, camera)
    refused(data.root, "video_path", "beneath")


def test_a_camera_named_by_half_a_character_is_refused(plain):
    with_camera(data := plain(), "\ud800")
    refused(data.root, "info.json", "'features'", "half a character")


@pytest.mark.parametrize("path", ["/etc/{video_key}/{episode_index}.mp4", "../{video_key}/{episode_index}.mp4"])
def test_videos_lead_nowhere_outside(plain, path):
    with_camera(data := plain(), video_path=path)
    refused(data.root, "video_path", "beneath")


def test_a_camera_that_was_never_recorded_is_named_when_it_is_used(plain):
    with_camera(data := plain("v3.0"))
    data.change(
        lambda table: table.drop_columns([name for name in table.column_names if name.startswith("videos/")]),
        data.episode_table,
    )
    reader = LeRobotReader(data.root)
    as_written(data, reader)
    with pytest.raises(UserError, match=rf"meta/episodes.*videos/{CAMERA}/chunk_index.*episode 1.*never recorded"):
        reader.frames(1, CAMERA)


@pytest.mark.parametrize(("value", "words"), [(None, "from_timestamp"), (NAN, "from_timestamp"), (-1.0, "-1.0")])
def test_a_start_that_is_no_time_is_named(plain, value, words):
    with_camera(data := plain("v3.0"))
    data.set_column(f"videos/{CAMERA}/from_timestamp", pa.array([0.0, value, 0.7]), data.episode_table)
    with pytest.raises(UserError, match=f"meta/episodes.*{words}"):
        LeRobotReader(data.root).metadata.video_start_s(1, CAMERA)


def test_both_dialects_of_paths_in_both_versions(plain):
    moved = {
        "v2.1": {
            "data/chunk-{chunk_index:03d}/episode_{episode_index:06d}.parquet": "data/chunk-001/episode_001002.parquet",
            "data/{chunk_index}/{file_index:03d}.parquet": "data/1/002.parquet",
            "data/{file_index:06d}.parquet": "data/001002.parquet",
            "{episode_chunk}/{episode_index}.parquet": "1/1002.parquet",
        },
        "v3.0": {
            "data/train/episode_{episode_index:06d}.parquet": "data/train/episode_001002.parquet",
            "data/{episode_chunk:03d}/{episode_index}.parquet": "data/001/1002.parquet",
            "data/{chunk_index:03d}/{episode_index}.parquet": "data/000/1002.parquet",
        },
    }
    for version, paths in moved.items():
        for template, path in paths.items():
            data = plain(version, {1002: 5})
            (data.root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(data.data_files[0], data.root / path)
            described = data.described() | {"data_path": template}
            described.pop("chunks_size")  # LeRobot's own 1000
            data.write_info(described)
            as_written(data, LeRobotReader(data.root))


def test_a_file_of_its_own_needs_no_place_in_the_table(plain):
    data = plain("v3.0", {7: 5})
    data.change(lambda table: table.drop_columns(["data/chunk_index", "data/file_index"]), data.episode_table)
    shutil.move(data.data_files[0], data.root / "data/0-7.parquet")
    data.write_info(data.described() | {"data_path": "data/{chunk_index}-{episode_index}.parquet"})
    as_written(data, LeRobotReader(data.root))


@given(
    st.sampled_from(["episode_index", "episode_chunk", "chunk_index", "file_index"]),
    st.text("0123456789d<^+,.x{}[]!r", max_size=4),
    st.integers(0, 10**6),
)
def test_placeholders_are_filled_in_as_written_or_refused(name, form, number):
    text = f"data/{{{name}:{form}}}.parquet"
    try:
        path = PathTemplate(text, "info.json").fill({name: number})
    except UserError as error:
        assert str(error).startswith("info.json")  # noqa: PT017
        return
    assert path == text.format(**{name: number})
    assert len(path) < 120
    if "}" not in form:  # else the placeholder ends there, and text follows
        assert int(path.removeprefix("data/").removesuffix(".parquet")) == number


@pytest.mark.parametrize("version", VERSIONS)
def test_pointers_that_git_lfs_left_say_so(plain, version):
    files = plain(version).files
    assert len(files) >= 4
    for name in files:
        data = plain(version)
        (data.root / name).write_bytes(LFS)
        refused(data.root, name, "git lfs pull", read=True)


def test_a_video_that_git_lfs_left_says_so(plain):
    with_camera(data := plain())
    video = data.root / f"videos/{CAMERA}/0.mp4"
    video.parent.mkdir(parents=True)
    video.write_bytes(LFS)
    with pytest.raises(UserError, match=r"0\.mp4.*git lfs pull"):
        LeRobotReader(data.root).frames(0, CAMERA)


@pytest.mark.parametrize("version", VERSIONS)
def test_damaged_tables_are_named(plain, version):
    for name in [name for name in plain(version).files if name.endswith(".parquet")]:
        data = plain(version)
        whole = (data.root / name).read_bytes()
        for content in (b"", b"PAR1", b"PAR1PAR1", b"\0" * 100, whole[: len(whole) // 2], whole[len(whole) // 2 :]):
            (data.root / name).write_bytes(content)
            refused(data.root, name, "not a readable parquet", read=True)


def test_a_table_cut_between_its_lines_is_told(plain, caplog):
    data = plain()
    data.write_lines("episodes", [{"episode_index": 0, "length": 4, "tasks": ["open it"]}])
    as_written(data, LeRobotReader(data.root))
    assert "1 episodes in meta, info.json counts 3" in caplog.text
    data.write_lines("episodes", [])
    refused(data.root, "at least one episode")


def test_texts_may_hold_any_character(plain):
    text = "öffne\u2028das\x85Fenster \U0001f916"
    data = plain(tasks=(text,))
    (data.root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": text}, ensure_ascii=False))
    assert LeRobotReader(data.root)[0]["task"] == text
    data.write_lines("tasks", [{"task_index": 0, "task": "\ud800"}])
    refused(data.root, "tasks.jsonl, line 1", "half a character")


@pytest.mark.parametrize(
    "kept",
    [
        ["meta/episodes.jsonl"],
        ["meta/tasks.jsonl"],
        ["data/chunk-000/episode_000000.parquet"],
        ["videos/chunk-000/observation.images.top/episode_000000.mp4"],
        ["videos/observation.images.top/chunk-000/file-000.mp4"],
        ["meta/tasks.parquet", "clip.mp4"],
        ["meta/episodes/chunk-000/file-000.parquet", "clip.mp4"],
    ],
)
def test_a_data_set_without_info_is_no_folder_of_videos(tmp_path, kept):
    for name in kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert folder_kind(str(tmp_path)) == "lerobot"
    with pytest.raises(UserError, match=r"not a LeRobot data set: it has no meta/info\.json"):
        open_episodes(str(tmp_path))


def test_other_folders_are_what_they_were(tmp_path, plain):
    (tmp_path / "films/meta").mkdir(parents=True)
    (tmp_path / "films/meta/notes.txt").write_text("")
    (tmp_path / "films/clip.mp4").write_bytes(b"")
    assert folder_kind(str(tmp_path / "films")) == "videos"
    (tmp_path / "films/clip.mp4").rename(tmp_path / "films/picture.png")
    assert folder_kind(str(tmp_path / "films")) == "images"
    data = plain()
    with pytest.raises(UserError, match=rf"folder of LeRobot data sets, \['{data.root.name}'\]"):
        folder_kind(str(data.root.parent))


@pytest.mark.parametrize("version", VERSIONS)
def test_episodes_are_named_by_their_numbers(plain, data_sets, version):
    data = plain(version, {3: 4, 7: 5, 1004: 6})
    reader = LeRobotReader(data.root)
    as_written(data, reader)
    assert [info.index for info in reader.episodes] == [3, 7, 1004]
    assert [reader[index]["episode_index"] for index in (0, 4, 9, -1)] == [3, 7, 1004, 1004]
    assert [reader[index]["index"] for index in range(len(reader))] == list(range(15))
    for missing in (0, 1, 2, -1, 1003):
        with pytest.raises(UserError, match=rf"no episode {missing}; there are 3, numbered 3, 7, 1004"):
            reader.episode(missing)


def test_videos_of_a_data_set_are_chosen_by_number(tmp_path, data_sets, read_number):
    root = tmp_path / "gaps"
    shutil.copytree(data_sets["v2.1"], root)
    rows = [json.loads(line) for line in (root / "meta/episodes.jsonl").read_text().splitlines()]
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["episode_index"]))
    (source,) = lerobot_sources(root, cameras=["observation.images.wrist"], episodes=[3, 1])
    assert [read_number(source.read(video, [0])[0]) for video in range(2)] == [30, 10]
    with pytest.raises(UserError, match=r"no episodes \[0\]; there are 1\.\.3"):
        lerobot_sources(root, episodes=[0])
    split = split_folder(str(root), held_out=0.3)
    told = {part.describe(video) for part in (*split.train, *split.held_out) for video in range(len(part))}
    assert len(told) == 6
    assert not any("episode 0" in name for name in told)


@given(st.sets(st.integers(0, 30)))
def test_numbers_in_few_words(numbers):
    told: set[int] = set()
    for part in number_ranges(numbers, most=99).split(", "):
        first, _, last = part.partition("..")
        told |= set(range(int(first), int(last or first) + 1)) if part != "none" else set()
    assert told == numbers


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**13)
    | st.floats()
    | st.sampled_from(["", "float64", "int64", "v3.0"]),
    lambda values: st.lists(values, max_size=2) | st.dictionaries(st.sampled_from(["action", "dtype"]), values),
    max_leaves=3,
)
generated = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def broken(document: Any, draw) -> Any:
    """A copy with one value, anywhere, replaced, removed or moved."""
    document = copy.deepcopy(document)
    place, key = document, draw(st.sampled_from(sorted(document)))
    while isinstance(place[key], dict) and draw(st.integers(0, 3)):
        place, key = place[key], draw(st.sampled_from(sorted(place[key])))
    if draw(st.booleans()):
        place[key] = draw(anything)
    else:
        del place[key]
    return document


def right_or_refused(data, info: dict[str, Any]) -> None:
    """What is read is what was written; else the error names a file of the data set."""
    try:
        reader = LeRobotReader(data.root)
        assert reader.fps == info["fps"]
        items = [reader[index] for index in range(len(reader))]
        as_written(data, reader)
    except (UserError, FileNotFoundError) as error:
        assert str(data.root) in str(error)  # noqa: PT017
        return
    rows = {(item["episode_index"].item(), item["frame_index"].item()): item for item in items} if items else {}
    for (episode, frame), item in rows.items():
        assert item["task"] == ("open it", "close it")[episode % 2]
        assert "timestamp" not in item or item["timestamp"] == np.float32(frame / 10)


@generated
@given(st.data(), st.sampled_from(VERSIONS))
def test_any_info_is_read_right_or_refused(plain, draws, version):
    data = plain(version, {0: 2, 1: 1})
    info = broken(data.described(), draws.draw)
    for key in ("frame_index", "episode_index"):  # by which the check itself finds its way
        if not isinstance(info.get("features"), dict) or key not in info["features"]:
            info = data.described()
    data.write_info(info)
    right_or_refused(data, info)


@generated
@given(st.data())
def test_any_line_is_read_right_or_refused(plain, draws):
    data = plain("v2.1", {0: 2, 1: 1})
    rows = [json.loads(line) for line in (data.root / "meta/episodes.jsonl").read_text().splitlines()]
    rows[1] = broken(rows[1], draws.draw) if draws.draw(st.booleans()) else draws.draw(anything)
    data.write_lines("episodes", rows)
    right_or_refused(data, data.described())


@generated
@given(st.data())
def test_any_episode_table_is_read_right_or_refused(plain, draws):
    data = plain("v3.0", {0: 2, 1: 1})
    column = draws.draw(st.sampled_from(pq.read_schema(data.episode_table).names))
    values = draws.draw(
        st.lists(st.none() | st.integers(-2, 3), min_size=2, max_size=2)
        | st.lists(st.none() | st.floats() | st.sampled_from([0.0, 1.0]), min_size=2, max_size=2)
        | st.lists(st.none() | st.sampled_from(["", "0", "open it"]), min_size=2, max_size=2)
        | st.lists(st.lists(st.integers(0, 1), max_size=2), min_size=2, max_size=2)
    )
    data.set_column(column, pa.array(values), data.episode_table)
    right_or_refused(data, data.described())
