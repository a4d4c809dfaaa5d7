"""A data set's own columns become named channels, and the prepared data set is an ordinary one."""

import io
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from repvitok.data import LeRobotReader, LeRobotWriter
from repvitok.data.lerobot import writer as writer_module
from repwam_core.cli import main
from repwam_core.data import layout as layout_module
from repwam_core.data.layout import DatasetLayout, known_layouts, prepare
from repwam_core.interface import shared_channels

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


@pytest.fixture(params=["v2.0", "v2.1", "v3.0"])
def source(request, tmp_path):
    """A data set with one column per part; actions.joints of row r of episode e holds 100 e + r + 0.1 k.

    Its other columns are of every sort, and its files are more than a reader needs.
    """
    root, version = tmp_path / "source", request.param
    writer = LeRobotWriter(
        root, version="v3.0" if version == "v3.0" else "v2.1", fps=20, cameras=dict.fromkeys(CAMERAS, (16, 16)),
        state_names=["x"], action_names=["x"], robot_type="arm",
    )  # fmt: skip
    for index in range(2):
        frames = {camera: np.full((5, 16, 16, 3), 40 * index, np.uint8) for camera in CAMERAS}
        state, action = np.zeros((5, 1), "f4"), np.zeros((5, 1), "f4")
        writer.add_episode(
            index, frames=frames, state=state, action=action, task=f"go {index}", metadata={"seed": index}
        )
    writer.finalize()
    for path in root.glob("data/**/*.parquet"):
        table = pq.read_table(path).drop(["action", "observation.state"])
        first = 100 * np.array(table["episode_index"]) + np.array(table["frame_index"])
        table = table.append_column("next.reward", pa.array([np.nan, 1, 2, 3, 4] * (len(first) // 5), pa.float64()))
        table = table.append_column("language", pa.array([["take", "it"]] * len(first), pa.large_list(pa.string())))
        table = table.append_column("grid", pa.array([[[1, 2], [3, None]]] * len(first)))
        table = table.append_column("note", pa.array([{"who": "me", "when": 1}] * len(first)))
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
    info["features"] |= {
        "next.reward": {"dtype": "float64", "shape": [1], "names": None},
        "language": {"dtype": "language", "shape": [1], "names": None},
    }
    info["codebase_version"] = version
    (root / "meta/info.json").write_text(json.dumps(info))
    if version == "v2.0":
        (root / "meta/episodes_stats.jsonl").unlink()
        (root / "meta/stats.json").write_text(json.dumps({"index": {"min": [0]}, "action": {"min": [7]}}))
    (root / "meta/modality.json").write_text("{}")
    (root / "README.md").write_text("words")
    (root / ".cache").mkdir()
    return root


def _columns(root):
    """All rows of all tables, without the columns that prepare writes."""
    tables = [pq.read_table(path) for path in sorted(root.glob("data/**/*.parquet"))]
    names = [name for name in tables[0].column_names if name not in ("action", "observation.state")]
    return [(table.select(names).schema.types, table.select(names).to_pydict()) for table in tables]


def _pictures(root, version="v2.1", embedded=True, camera=CAMERAS[0]):
    """A data set whose first camera is pictures in the tables, or in files beside them, and whose second is depth."""
    writer = LeRobotWriter(
        root, version=version, fps=20, cameras={CAMERAS[1]: (16, 16)}, state_names=["x", "y"], action_names=["x", "y"],
        robot_type="arm",
    )  # fmt: skip
    for index in range(2):
        numbers = np.arange(8, dtype="f4").reshape(4, 2) + 10 * index
        frames = {CAMERAS[1]: np.full((4, 16, 16, 3), 40 * index, np.uint8)}
        writer.add_episode(index, frames=frames, state=numbers, action=numbers, task="go")
    writer.finalize()
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][CAMERAS[1]]["info"]["video.is_depth_map"] = True
    info["features"][camera] = {"dtype": "image", "shape": [8, 8, 3], "names": ["height", "width", "channel"]}
    (root / "meta/info.json").write_text(json.dumps(info))
    for path in root.glob("data/**/*.parquet"):
        table, rows = pq.read_table(path), []
        for row in range(len(table)):
            buffer = io.BytesIO()
            shade = 9 * row + 100 * table["episode_index"][row].as_py()
            Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(buffer, "PNG")
            name = f"images/{path.stem}-{row}.png"
            (root / name).parent.mkdir(exist_ok=True)
            if not embedded:
                (root / name).write_bytes(buffer.getvalue())
            rows.append({"bytes": buffer.getvalue() if embedded else None, "path": name})
        pq.write_table(table.append_column(camera, pa.array(rows)), path)
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
    assert reader.episodes[1].task == "go 1"
    np.testing.assert_array_equal(reader.frames(1, CAMERAS[0], [2]), LeRobotReader(source).frames(1, CAMERAS[0], [2]))


def test_everything_else_is_kept(source, tmp_path):
    out, before = tmp_path / "out", {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    prepare(source, out, _layout(tmp_path))
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    assert repr(_columns(out)) == repr(_columns(source))
    old, new = LeRobotReader(source), LeRobotReader(out)
    assert (new.version, new.fps, new.tasks, list(new.episodes)) == (
        old.version,
        old.fps,
        old.tasks,
        list(old.episodes),
    )
    assert new.episodes[1].metadata["seed"] == 1
    assert set(new.features) == {*old.features, "action", "observation.state"} - {CAMERAS[1]}
    names = {str(path.relative_to(source)) for path in before}
    kept = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {".lock", "meta/prepared.json"}
    assert kept == {name for name in names if CAMERAS[1] not in name}
    for video in out.glob("videos/**/*.mp4"):
        assert os.path.samefile(video, source / video.relative_to(out))
    label = out / "meta/modality.json"
    label.write_text("changed")
    assert (source / "meta/modality.json").read_text() == "{}"


def test_statistics_are_those_of_what_was_written(source, tmp_path):
    prepare(source, out := tmp_path / "out", _layout(tmp_path))
    reader = LeRobotReader(out)
    episodes = [reader.episode(episode.index)["action"] for episode in reader.episodes]
    whole = json.loads((out / "meta/stats.json").read_text()) if (out / "meta/stats.json").exists() else {}
    assert (reader.version == "v2.1") == (not whole)
    if whole:
        np.testing.assert_allclose(whole["action"]["max"], np.concatenate(episodes).max(0), rtol=1e-6)
        np.testing.assert_allclose(whole["action"]["std"], np.concatenate(episodes).std(0), rtol=1e-5)
        assert whole["index"]["min"] == [0]
    if reader.version == "v2.1":
        lines = [json.loads(line)["stats"] for line in (out / "meta/episodes_stats.jsonl").read_text().splitlines()]
    if reader.version == "v3.0":
        table = pq.read_table(next(out.glob("meta/episodes/*/*.parquet"))).to_pylist()
        lines = [
            {"action": {"mean": row["stats/action/mean"]}, "index": {"min": row["stats/index/min"]}} for row in table
        ]
        assert not any(CAMERAS[1] in name for name in table[0])
    if reader.version != "v2.0":
        for line, values in zip(lines, episodes, strict=True):
            np.testing.assert_allclose(line["action"]["mean"], values.mean(0), rtol=1e-6)
        assert [line["index"]["min"] for line in lines] == [[0], [5]]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("embedded", [True, False])
def test_pictures_in_tables_are_kept_and_depth_maps_left_alone(tmp_path, version, embedded):
    source, out = _pictures(tmp_path / "source", version, embedded), tmp_path / "out"
    parts = {"action": [{"column": "action", "select": [1, 2], "names": ["y"]}], "state": []}
    prepare(source, out, _layout(tmp_path, **parts))
    shutil.rmtree(source / "images")
    reader = LeRobotReader(out)
    assert CAMERAS[0] in reader.camera_keys
    assert set(reader.features) >= {CAMERAS[1], "action"}
    assert "observation.state" not in reader.features
    np.testing.assert_array_equal(
        reader.frames(1, CAMERAS[0])[:, 0, 0, 0] % 100, 9 * np.arange(4) + 36 * (version == "v3.0")
    )
    np.testing.assert_array_equal(reader.episode(1)["action"].reshape(-1), 11 + 2 * np.arange(4))
    assert len(list(out.glob("videos/**/*.mp4"))) == len(list(source.glob("videos/**/*.mp4")))


@pytest.mark.parametrize("source", ["v2.1"], indirect=True)
def test_neither_the_source_nor_what_is_anothers_is_written_to(source, tmp_path):
    layout = _layout(tmp_path)
    for out in (source, source / "prepared", source.parent):
        with pytest.raises(ValueError, match="apart from the data set"):
            prepare(source, out, layout)
    (other := tmp_path / "other").mkdir()
    (other / "thesis.tex").write_text("words")
    with pytest.raises(ValueError, match=r"something else \(thesis.tex\)"):
        prepare(source, other, layout)
    with pytest.raises(ValueError, match="is a file"):
        prepare(source, other / "thesis.tex", layout)
    prepare(source, tmp_path / "out", layout)
    for path in source.glob("data/**/*.parquet"):
        pq.write_table(pq.read_table(path).append_column("more", pa.array(np.arange(5.0))), path)
    with pytest.raises(ValueError, match="prepared otherwise"):
        prepare(source, tmp_path / "out", layout)
    assert (other / "thesis.tex").read_text() == "words"


@pytest.mark.parametrize("source", ["v3.0"], indirect=True)
@pytest.mark.parametrize(("module", "name", "calls"), [(os, "replace", 6), (os, "link", 1), (pq, "write_table", 2)])
def test_whenever_a_run_is_killed_the_next_one_is_whole(source, tmp_path, monkeypatch, module, name, calls):
    layout, out, call = _layout(tmp_path), tmp_path / "out", getattr(module, name)
    prepare(source, whole := tmp_path / "whole", layout)
    for last in range(calls):
        left = last

        def killed(*arguments, **options):
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            return call(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, killed)
            with pytest.raises(KeyboardInterrupt):
                prepare(source, out, layout)
        assert not (out / "meta/info.json").exists()
    prepare(source, out, layout)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*"))
    assert sorted(path.relative_to(out) for path in out.rglob("*")) == files
    assert all((out / file).read_bytes() == (whole / file).read_bytes() for file in files if (out / file).is_file())
    assert len(LeRobotReader(out)) == len(LeRobotReader(source))


@pytest.mark.parametrize("source", ["v2.1"], indirect=True)
@pytest.mark.parametrize("damage", ["column", "action", "video"])
def test_what_was_written_is_compared_with_the_source(source, tmp_path, monkeypatch, damage):
    fill = layout_module._fill

    def damaged(partial, *arguments):
        fill(partial, *arguments)
        path = next(partial.glob("data/**/*.parquet"))
        table = pq.read_table(path)
        if damage == "video":
            video = next(partial.glob("videos/**/*.mp4"))
            shutil.copyfile(video, other := video.with_suffix(".other"))
            os.replace(other, video)
        elif damage == "column":
            later = pc.add(table["timestamp"], pa.scalar(0.001, pa.float32()))
            pq.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", later), path)
        else:
            pq.write_table(
                table.set_column(table.column_names.index("action"), "action", table["actions.joints"]), path
            )

    monkeypatch.setattr(layout_module, "_fill", damaged)
    with pytest.raises(ValueError, match="otherwise than it is there"):
        prepare(source, tmp_path / "out", _layout(tmp_path))
    assert not (tmp_path / "out/meta").exists()


@pytest.mark.parametrize("source", ["v2.1"], indirect=True)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array([2**24 + 1] * 5), "episode 0, row 0, actions.gripper, channel 'gripper': .* got 16777217"),
        (pa.array([1.0, 2.0, 3.0, 1e300, 4.0]), "episode 0, row 3, actions.gripper, channel 'gripper': .* got 1e.300"),
        (
            pa.array([1.0, 2.0, np.inf, 3.0, 4.0]),
            "source/data/.*: episode 0, row 2, actions.gripper, channel 'gripper': .* got inf",
        ),
    ],
)
def test_numbers_that_cannot_be_written_are_named(source, tmp_path, values, message):
    info = json.loads((source / "meta/info.json").read_text())
    info["features"]["actions.gripper"]["dtype"] = "int64" if pa.types.is_integer(values.type) else "float64"
    (source / "meta/info.json").write_text(json.dumps(info))
    for path in source.glob("data/**/*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.set_column(table.column_names.index("actions.gripper"), "actions.gripper", values), path)
    with pytest.raises(ValueError, match=message):
        prepare(source, tmp_path / "out", _layout(tmp_path))
    assert not (tmp_path / "out/meta").exists()


@pytest.mark.parametrize("source", ["v2.1"], indirect=True)
def test_statistics_of_other_programs_are_kept_or_named(source, tmp_path):
    stats, of_episodes = source / "meta/stats.json", source / "meta/episodes_stats.jsonl"
    of_episodes.write_text('{"episode_index": 0}\n{"episode_index": 1, "stats": null, "by": "me"}\n')
    stats.write_text('{"index": {"min": NaN, "q99": [3]}}')
    prepare(source, tmp_path / "out", _layout(tmp_path))
    kept = json.loads((tmp_path / "out/meta/stats.json").read_text())
    assert kept["index"]["q99"] == [3]
    lines = [json.loads(line) for line in (tmp_path / "out/meta/episodes_stats.jsonl").read_text().splitlines()]
    assert lines[1]["by"] == "me"
    assert lines[1]["stats"]["action"]["max"] == pytest.approx([104.1, 104.2, 104.0])
    for path, text in ((of_episodes, "[1]"), (of_episodes, '{"episode_index": 0, "stats": 3}'), (stats, "[1]")):
        before = path.read_text()
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"source/meta/{path.name}.*: expected (an )?object"):
            prepare(source, tmp_path / path.stem, _layout(tmp_path))
        path.write_text(before)


@pytest.mark.parametrize(("version", "own_files"), [("v2.0", 1), ("v2.1", 1), ("v3.0", 1), ("v3.0", 0)])
def test_some_episodes_alone_read_as_they_did(tmp_path, version, own_files, capsys, monkeypatch):
    """Of five episodes three; in version 3 they share a table and videos with the others, or each has its own."""
    source, out = tmp_path / "source", tmp_path / "out"
    if own_files:
        monkeypatch.setattr(writer_module, "DATA_FILE_MB", 1e-9)
        monkeypatch.setattr(writer_module, "VIDEO_FILE_MB", 1e-9)
    _written(source, "v3.0" if version == "v3.0" else "v2.1", (4, 5, 6, 7, 5))
    info = json.loads((source / "meta/info.json").read_text()) | {"codebase_version": version}
    (source / "meta/info.json").write_text(json.dumps(info))
    command = ["prepare", "--dataset", str(source), "--out", str(out), "--layout", str(tmp_path / "layout.yaml")]
    parts = {
        key: [{"column": column, "names": ["x"]}]
        for key, column in (("action", "action"), ("state", "observation.state"))
    }
    _layout(tmp_path, **parts)
    for _ in range(2):  # the second run finds it done
        assert main([*command, "--episodes", "1", "3-4"]) == 0
    for others in (["--episodes", "1"], []):
        assert main([*command, *others]) == 2
        assert "prepared otherwise" in capsys.readouterr().err

    old, new, row = LeRobotReader(source), LeRobotReader(out), 0
    assert [(e.index, e.length, e.task) for e in new.episodes] == [(1, 5, "go 1"), (3, 7, "go 1"), (4, 5, "go 0")]
    for episode in new.episodes:
        before, after = old.episode(episode.index), new.episode(episode.index)
        assert after.pop("index").tolist() == list(range(row, row := row + episode.length))
        del before["index"]
        assert before.keys() == after.keys()
        for key, values in before.items():
            np.testing.assert_array_equal(after[key], values)
        assert (new.episodes[0].metadata, new.num_episodes) == (old.episodes[1].metadata, 3)
        np.testing.assert_array_equal(new.frames(episode.index, CAMERAS[0]), old.frames(episode.index, CAMERAS[0]))
    info = new.metadata.info
    assert (info["total_episodes"], info["total_frames"], info["splits"]) == (3, 17, {"train": "0:3"})
    assert len(list(out.glob("videos/**/*.mp4"))) == len(list(out.glob("data/**/*.parquet"))) == (3 if own_files else 1)
    if version == "v3.0":
        whole = json.loads((out / "meta/stats.json").read_text())
        shown = np.concatenate([new.frames(episode.index, CAMERAS[0]) for episode in new.episodes]) / 255
        np.testing.assert_allclose(np.ravel(whole[CAMERAS[0]]["mean"]), shown.mean(axis=(0, 1, 2)), atol=0.01)
        assert (whole["episode_index"]["min"], whole["index"]["max"], whole["action"]["count"]) == ([1], [16], [17])
        assert [row.rows for row in new.metadata.episodes.values()] == [(0, 5), (5, 12), (12, 17)]
    elif version == "v2.1":
        lines = [json.loads(line) for line in (out / "meta/episodes_stats.jsonl").read_text().splitlines()]
        assert [(line["episode_index"], line["stats"]["index"]["min"]) for line in lines] == [
            (1, [0]),
            (3, [5]),
            (4, [12]),
        ]


def _written(root, version, lengths):
    writer = LeRobotWriter(
        root, version=version, fps=10, cameras={CAMERAS[0]: (16, 16)}, state_names=["x"], action_names=["x"],
        robot_type="arm",
    )  # fmt: skip
    for index, length in enumerate(lengths):
        rows = (10 * index + np.arange(length, dtype="f4"))[:, None]
        shade = np.broadcast_to(4 * rows.astype(np.uint8)[..., None, None], (length, 16, 16, 3))
        frames, task = {CAMERAS[0]: shade}, f"go {index % 2}"
        writer.add_episode(index, frames=frames, state=rows, action=-rows, task=task, metadata={"seed": index})
    writer.finalize()


@pytest.mark.parametrize("source", ["v3.0"], indirect=True)
def test_a_table_of_no_episodes_is_kept(source, tmp_path):
    first = source / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(first).slice(0, 0), first.with_name("file-001.parquet"))
    prepare(source, tmp_path / "out", _layout(tmp_path))
    assert len(LeRobotReader(tmp_path / "out").episodes) == 2


@pytest.mark.parametrize("source", ["v2.1"], indirect=True)
def test_what_was_not_recorded_is_told_with_what_this_command_can_do(source, tmp_path):
    layout = _layout(tmp_path, cameras=list(CAMERAS))
    for missing, told in (
        (
            f"videos/chunk-000/{CAMERAS[1]}/episode_000001.mp4",
            rf"episodes 1 .*cameras: \[{CAMERAS[0]}\] in the layout, or",
        ),
        ("data/chunk-000/episode_000001.parquet", "tables of episodes 1 are missing"),
    ):
        (source / missing).unlink()
        with pytest.raises(ValueError, match=rf"{told}.* --episodes 0$"):
            prepare(source, tmp_path / "out", layout)
    prepare(source, tmp_path / "out", layout, [0])
    assert [episode.index for episode in LeRobotReader(tmp_path / "out").episodes] == [0]


def test_a_broken_layout_is_one_line(tmp_path, capsys):
    for text, said in (
        ("a: [", "not a YAML document"),
        ("embodiment: 3\naction: []\nstate: []\ncameras: []", "expected str"),
        ("embodiment: x\naction: [{column: a, names: [1]}]\nstate: []\ncameras: []", "names[0]"),
        ("embodiment: x\naction: [7]\nstate: []\ncameras: []", "action[0]"),
        ("embodiment: x\naction: [{column: a, names: [y]}]\nstate: []\ncameras: [c, c]", "twice"),
    ):
        (path := tmp_path / "layout.yaml").write_text(text)
        assert main(["prepare", "--dataset", str(tmp_path), "--layout", str(path), "--out", str(tmp_path / "o")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert str(path) in error
        assert said in error


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
        ({"robot": 1}, r"unknown fields \['robot'\]"),
        ({"action": [{"column": "a", "names": ["x"], "kind": 1}]}, r"unknown fields \['action\[0\]\.kind'\]"),
        ({"action": [{"column": "a", "names": ["x"], "units": ["m", "m"]}]}, "as many names as units"),
        ({"action": [{"column": "a", "names": ["x"]}, {"column": "b", "names": ["x"]}]}, "distinct"),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        _layout(tmp_path, **changes)


def test_the_known_layouts_share_one_order_of_channels():
    robots = [DatasetLayout.load(name).robot(30.0) for name in known_layouts()]
    assert len(shared_channels(robots)) == 20
    agibot = next(robot for robot in robots if robot.name == "agibot-a2d")
    genie = next(robot for robot in robots if robot.name == "interndata-genie1")
    assert len(agibot.action_names) == 20
    assert len(set(genie.action_names) & set(agibot.action_names)) == 16
    with pytest.raises(ValueError, match="one of"):
        DatasetLayout.load("nowhere")
