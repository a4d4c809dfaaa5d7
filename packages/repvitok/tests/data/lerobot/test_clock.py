"""Rows of a LeRobot table and frames of its videos are paired by time; where the clocks contradict, it is said."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from repvitok.data.clips import ClipDataset
from repvitok.data.lerobot import reader as lerobot
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.sources import lerobot_sources
from repvitok.data.video import VideoFile
from repvitok.runtime.errors import UserError

CAMERA = "observation.images.front"
VERSIONS = ("v2.1", "v3.0")


def painted(number: int, size: int = 32) -> np.ndarray:
    """A frame that shows its number: the upper half number // 16, the lower half number % 16, in steps of 14 greys."""
    frame = np.empty((size, size, 3), np.uint8)
    frame[: size // 2], frame[size // 2 :] = 20 + 14 * (number // 16), 20 + 14 * (number % 16)
    return frame


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers that frames show."""
    half = frames.shape[1] // 2
    upper, lower = (part.mean(axis=(1, 2, 3)) for part in (frames[:, : half - 4], frames[:, half + 4 :]))
    return [round((a - 20) / 14) * 16 + round((b - 20) / 14) for a, b in zip(upper, lower, strict=True)]


def film(
    path: Path,
    times_s: Sequence[float],
    codec: str = "mpeg4",
    *,
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    rate: int = 30,
    tick: Fraction = Fraction(1, 60000),
) -> None:
    """Frame i of the film shows i, at times_s[i]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {"b": "4000000", "g": "5"})
        stream.width = stream.height = 32
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = tick
        stream.codec_context.thread_count = 1
        for number, time_s in enumerate(times_s):
            frame = av.VideoFrame.from_ndarray(painted(number), format="rgb24")
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(time_s / frame.time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def recording(
    root: Path,
    version: str,
    timestamps: Sequence[Any],
    film_times_s: Sequence[Sequence[float]],
    *,
    fps: float = 30,
    starts_s: Sequence[float] | None = None,
    suffix: str = "mp4",
    **how: Any,
) -> LeRobotReader:
    """A data set of one column and one camera.

    Args:
        root: its folder.
        version: v2.1, with a film per episode, or v3.0, with one film in which episode i starts at starts_s[i].
        timestamps: of each episode, an arrow array or what becomes a float32 one; a number: so many rows and no column.
        film_times_s: of each film's frames.
        fps: of info.json.
        starts_s: v3.0's from_timestamp.
        suffix: of the films.
        how: they are coded.
    """
    feature = {"dtype": "float32", "shape": [1], "names": None}
    features = {CAMERA: {"dtype": "video", "shape": [32, 32, 3], "names": ["height", "width", "channel"]}}
    tables, rows = [], []
    for episode, column in enumerate(timestamps):
        length = column if isinstance(column, int) else len(column)
        table = {"episode_index": pa.array([episode] * length), "frame_index": pa.array(range(length))}
        table |= {"index": pa.array(range(length)), "task_index": pa.array([0] * length)}
        if not isinstance(column, int):
            table["timestamp"] = column if isinstance(column, pa.Array) else pa.array(column, pa.float32())
        features |= {key: feature | {"dtype": "int64"} for key in table if key != "timestamp"}
        features |= {"timestamp": feature} if "timestamp" in table else {}
        tables.append(pa.table(table))
        rows.append({"episode_index": episode, "tasks": ["do it"], "length": length})
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "data/chunk-000").mkdir(parents=True, exist_ok=True)
    info: dict[str, Any] = {"codebase_version": version, "fps": fps, "features": features, "chunks_size": 1000}
    if version == "v2.1":
        info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}." + suffix
        for episode, table in enumerate(tables):
            pq.write_table(table, root / f"data/chunk-000/episode_{episode:06d}.parquet")
            film(root / f"videos/chunk-000/{CAMERA}/episode_{episode:06d}.{suffix}", film_times_s[episode], **how)
        (root / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "do it"}) + "\n")
    else:
        info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}." + suffix
        pq.write_table(pa.concat_tables(tables), root / "data/chunk-000/file-000.parquet")
        film(root / f"videos/{CAMERA}/chunk-000/file-000.{suffix}", film_times_s[0], **how)
        first = 0
        for row, start_s in zip(rows, starts_s or [0.0], strict=True):
            row |= {"dataset_from_index": first, "dataset_to_index": first + row["length"]}
            first += row["length"]
            row |= {f"{what}/{key}_index": 0 for what in ("data", f"videos/{CAMERA}") for key in ("chunk", "file")}
            row[f"videos/{CAMERA}/from_timestamp"] = start_s
        (root / "meta/episodes/chunk-000").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
        pq.write_table(pa.table({"task_index": [0], "task": ["do it"]}), root / "meta/tasks.parquet")
    (root / "meta/info.json").write_text(json.dumps(info))
    return LeRobotReader(root)


def clock(count: int, rate_hz: float, start_s: float = 0.0) -> list[float]:
    """So many times of an even clock."""
    return (start_s + np.arange(count) / rate_hz).tolist()


@pytest.mark.parametrize("version", VERSIONS)
def test_slow_rows_beside_a_fast_film(tmp_path, version):
    films, starts = ([clock(12, 30)] * 3, None) if version == "v2.1" else ([clock(36, 30)], [0.0, 0.4, 0.8])
    reader = recording(tmp_path, version, [clock(4, 10)] * 3, films, fps=10, starts_s=starts)
    for episode in range(3):
        first = 0 if version == "v2.1" else 12 * episode
        expected = [first, first + 3, first + 6, first + 9]
        assert numbers(reader.frames(episode, CAMERA)) == expected
        assert numbers(reader.frames(episode, CAMERA, [3, 0, 0])) == [expected[3], first, first]
    assert numbers(reader[5][CAMERA][None]) == [3 if version == "v2.1" else 15]
    clips = ClipDataset(lerobot_sources(tmp_path), frames=2, size=(32, 32), stride=2, length=20)
    for index, clip in enumerate(clips):
        position = clips.position(index)
        shown = numbers(np.rint((clip.numpy().transpose(1, 2, 3, 0) + 1) * 127.5))
        first = 0 if version == "v2.1" else 12 * position.video
        assert shown == [first + 3 * row for row in position.raw_frames(2)]


@pytest.mark.parametrize(
    ("codec", "suffix", "how"),
    [
        ("libx264", "mp4", {"options": {"bf": "3", "g": "12"}}),
        ("libx264", "mkv", {"options": {"bf": "3", "g": "12"}}),
        ("libx265", "mp4", {"options": {"g": "10", "x265-params": "log-level=none:pools=1"}}),
        ("libsvtav1", "mp4", {"options": {"g": "6", "preset": "12", "svtav1-params": "lp=1"}}),
        ("libvpx-vp9", "webm", {"options": {"deadline": "realtime", "g": "7"}}),
        ("libvpx", "webm", {"options": {"auto-alt-ref": "1", "lag-in-frames": "12"}}),
        ("mpeg4", "mp4", {"options": {"bf": "2", "g": "9", "b": "4000000"}}),
        ("mpeg4", "avi", {"options": {"g": "9", "b": "4000000"}, "tick": Fraction(1, 30)}),
        ("mjpeg", "mp4", {"pixel_format": "yuvj420p"}),
        ("ffv1", "mkv", {}),
    ],
)
def test_every_codec_and_container(tmp_path, codec, suffix, how):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV was built without {codec}")
    reader = recording(tmp_path, "v2.1", [clock(11, 15)], [clock(22, 30)], fps=15, codec=codec, suffix=suffix, **how)
    assert numbers(reader.frames(0, CAMERA)) == list(range(0, 22, 2))
    assert numbers(reader.frames(0, CAMERA, [9, 2])) == [18, 4]


def test_uneven_clocks_are_followed(tmp_path):
    times = np.cumsum([0, 1, 1, 3, 1, 2, 1, 1, 1, 1]) / 30  # as a recorder that dropped frames wrote both
    reader = recording(tmp_path / "a", "v2.1", [times], [times])
    assert numbers(reader.frames(0, CAMERA)) == list(range(10))
    reader = recording(tmp_path / "b", "v2.1", [times[[0, 1, 2, 3, 4, 7, 8, 9]]], [times])
    assert numbers(reader.frames(0, CAMERA)) == [0, 1, 2, 3, 4, 7, 8, 9]
    jittered = np.array(clock(10, 30)) + np.array([0, 1, -1, 1, -1, 1, -1, 1, -1, 0]) * 0.012
    reader = recording(tmp_path / "c", "v2.1", [clock(10, 30)], [jittered])
    assert numbers(reader.frames(0, CAMERA)) == list(range(10))


def test_a_film_with_too_few_or_too_many_frames(tmp_path):
    reader = recording(tmp_path / "more", "v2.1", [clock(8, 30)], [clock(12, 30)])
    assert numbers(reader.frames(0, CAMERA)) == list(range(8))
    reader = recording(tmp_path / "fewer", "v2.1", [clock(8, 30), clock(8, 30)], [clock(6, 30), clock(8, 30)])
    told = (
        r"episode_000000\.parquet, episode 0, observation\.images\.front, row 6 \(2 of 8 rows\): no frame of "
        r".*episode_000000\.mp4 is within 0\.0168 s of 0\.2000 s .*frames 0\.\.5 is 5 at 0\.1667 s"
    )
    for wanted in (None, [0], [7]):  # one row without a frame: the whole episode is in doubt
        with pytest.raises(UserError, match=told):
            reader.frames(0, CAMERA, wanted)
    assert numbers(reader.frames(1, CAMERA)) == list(range(8))
    dropped = [time for number, time in enumerate(clock(9, 30)) if number != 4]
    reader = recording(tmp_path / "dropped", "v2.1", [clock(9, 30)], [dropped])
    with pytest.raises(UserError, match=r"row 4: no frame of .* of 0\.1333 s .* is (3 at 0\.1000|4 at 0\.1667) s"):
        reader.frames(0, CAMERA)


def test_the_next_episode_in_a_film_lends_no_frames(tmp_path):
    starts = [0.0, 7 / 30]
    reader = recording(tmp_path, "v3.0", [clock(8, 30), clock(8, 30)], [clock(15, 30)], starts_s=starts)
    with pytest.raises(UserError, match=r"episode 0, .*, row 7: .* frames 0\.\.6 is 6 at 0\.2000 s"):
        reader.frames(0, CAMERA)
    assert numbers(reader.frames(1, CAMERA)) == list(range(7, 15))


@pytest.mark.parametrize("shift", [-0.4, 0.4])
def test_a_small_drift_of_from_timestamp(tmp_path, shift):
    starts = [0.0, (8 + shift) / 30]
    reader = recording(tmp_path, "v3.0", [clock(8, 30), clock(8, 30)], [clock(17, 30)], starts_s=starts)
    assert numbers(reader.frames(0, CAMERA)) == list(range(8))
    assert numbers(reader.frames(1, CAMERA)) == list(range(8, 16))


def test_rows_faster_than_the_film_share_its_frames_and_that_is_said_once(tmp_path, caplog):
    columns = [clock(12, 60, 0.001)] * 2
    reader = recording(tmp_path, "v2.1", columns, [clock(7, 30)] * 2, fps=60)
    with caplog.at_level(logging.WARNING):
        for episode in (0, 1, 0):
            assert numbers(reader.frames(episode, CAMERA)) == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert [record.getMessage().count("30 frames a second for 60 rows") for record in caplog.records] == [1]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("row_hz", "film_hz"), [(10, 5), (30, 15)])
def test_rows_midway_between_two_frames_take_the_earlier_one_however_their_times_are_rounded(
    tmp_path, version, row_hz, film_hz
):
    reader = recording(tmp_path, version, [clock(12, row_hz)], [clock(7, film_hz)], fps=row_hz)
    assert numbers(reader.frames(0, CAMERA)) == [row // 2 for row in range(12)]


def test_rows_that_share_a_frame_against_their_rate_are_refused(tmp_path):
    reader = recording(tmp_path, "v2.1", [[0, 0.027, 0.04, 0.1]], [clock(5, 30)])
    with pytest.raises(UserError, match=r"rows 1 and 2 \(0\.0270 s, 0\.0400 s\) are both nearest to frame 1 of .*mp4"):
        reader.frames(0, CAMERA)


@pytest.mark.parametrize(
    ("column", "told"),
    [
        ([0, 1 / 30, float("nan"), 0.1], r"row 2: expected a timestamp in seconds, got nan"),
        (pa.array([0, None, 0.1, 0.2], pa.float32()), r"row 1: expected a timestamp in seconds, got nan"),
        ([0, 0.1, 1 / 30, 0.2], r"row 2: timestamps must grow from row to row, got 0\.0333333 s after 0\.1 s"),
        ([0, 0, 0, 0], r"row 1: timestamps must grow from row to row, got 0 s after 0 s"),
        ([-0.1, -0.07, -0.03, 0], r"row 0 .*: no frame of .* of -0\.1000 s"),
        (pa.array([1.7e9 + time for time in clock(4, 30)], pa.float64()), r"row 0 \(4 of 4 rows\): no frame of "),
        (
            pa.array([0, 33, 67, 100]),
            r"rows are 33 s apart by their timestamps, 0\.0303 a second, and .* fps says 30",
        ),  # milliseconds
        (pa.array(["0", "1", "2", "3"]), r"'timestamp' should hold one number a row.*got 4 of string"),
        (pa.array([[0.0, 0.1]] * 4), r"'timestamp' should hold one number a row.*in 4 rows; got 8 of list"),
        (pa.array([0, 33, 67, 100], pa.duration("ms")), r"should hold one number a row, seconds.* of duration\[ms\]"),
    ],
)
def test_timestamps_that_are_none(tmp_path, column, told):
    reader = recording(tmp_path, "v2.1", [column], [clock(9, 30)])
    with pytest.raises(UserError, match=told):
        reader.frames(0, CAMERA)


@pytest.mark.parametrize(
    "column",
    [
        4,
        *(pa.array([[time] for time in clock(4, 10)], kind(pa.float32())) for kind in (pa.list_, pa.large_list)),
        pa.array([[time] for time in clock(4, 10)], pa.list_view(pa.float64())),
        pa.array(clock(4, 10)),
        [0, 0.11, 0.19, 0.3],
    ],
    ids=["absent: row / fps", "lists of one", "large lists", "list views", "float64", "measured"],
)
def test_timestamps_in_other_forms(tmp_path, column):
    reader = recording(tmp_path, "v2.1", [column], [clock(12, 30)], fps=10)
    assert numbers(reader.frames(0, CAMERA)) == [0, 3, 6, 9]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("rows_hz", "fps"), [(10, 30), (30, 10), (15, 30), (24, 30), (30, 1.5)])
def test_rows_of_another_rate_than_info_json_says_are_refused(tmp_path, version, rows_hz, fps):
    reader = recording(tmp_path, version, [clock(40, rows_hz)], [clock(200, 60)], fps=fps)
    with pytest.raises(UserError, match=rf"episode 0, .*: its rows are .* {rows_hz} a second, and .* fps says {fps}: "):
        reader.frames(0, CAMERA)


def test_the_clock_of_pictures_is_checked_too(plain):
    data = plain("v2.1", {0: 12})
    picture = io.BytesIO()
    Image.fromarray(painted(3)).save(picture, "PNG")
    data.set_column(CAMERA, pa.array([{"bytes": picture.getvalue(), "path": None}] * 12))
    info = json.loads((data.root / "meta/info.json").read_text())
    info["features"][CAMERA] = {"dtype": "image", "shape": [32, 32, 3]}
    data.write_info(info)
    assert numbers(LeRobotReader(data.root).frames(0, CAMERA)) == [3] * 12
    data.write_info(info | {"fps": 30})
    with pytest.raises(UserError, match=r"10 a second, and info\.json's fps says 30"):
        LeRobotReader(data.root).frames(0, CAMERA)


def test_time_begins_where_the_container_says(tmp_path):
    """As in LeRobot: a film whose first frame is shown later than 0 has no frame for row 0, whatever its length."""
    late = clock(9, 30, 2 / 30)
    reader = recording(tmp_path / "late", "v2.1", [clock(9, 30)], [late])
    with pytest.raises(UserError, match=r"row 0 \(2 of 9 rows\): .* frames 0\.\.8 is 0 at 0\.066\d s"):
        reader.frames(0, CAMERA, [5])
    reader = recording(tmp_path / "so", "v2.1", [late], [late])
    assert numbers(reader.frames(0, CAMERA)) == list(range(9))


def cut(path: Path, out: Path, frames: int) -> None:
    """A copy of an mp4 without its first frames, which its edit list leaves out and the file still holds."""
    with av.open(str(path)) as source, av.open(str(out), "w", options={"avoid_negative_ts": "disabled"}) as target:
        origin = source.streams.video[0]
        stream = target.add_stream_from_template(origin)
        shift = round(Fraction(frames, 30) / (origin.time_base or 1))
        for packet in source.demux(origin):
            if packet.dts is not None and packet.pts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)


def test_what_an_edit_list_cuts_off_does_not_count(tmp_path):
    film(tmp_path / "whole.mp4", clock(20, 30), "libx264", options={"bf": "2", "g": "10"})
    cut(tmp_path / "whole.mp4", tmp_path / "cut.mp4", 3)
    video = VideoFile(tmp_path / "cut.mp4")
    np.testing.assert_allclose(video.times_s, clock(17, 30), atol=1e-4)
    assert numbers(video.read([0, 4, 16])) == [3, 7, 19]
    assert numbers(video.read()) == list(range(3, 20))


def test_tables_and_films_are_opened_once(tmp_path, monkeypatch):
    reader = recording(tmp_path, "v2.1", [clock(8, 30)] * 3, [clock(8, 30)] * 3)
    opened: dict[str, int] = {"films": 0, "tables": 0, "decodings": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            opened[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(lerobot, "VideoFile", counted("films", VideoFile))
    monkeypatch.setattr(lerobot.pq, "ParquetFile", counted("tables", pq.ParquetFile))
    monkeypatch.setattr(VideoFile, "_decode_into", counted("decodings", VideoFile._decode_into))
    for _ in range(5):
        for episode in range(3):
            reader.frames(episode, CAMERA, [1, 5])
    assert opened == {"films": 3, "tables": 3, "decodings": 15}


@st.composite
def clocks(draw: st.DrawFn) -> dict[str, Any]:
    """A film and rows whose clocks agree or not: rates, offsets, jitter and dropped frames of both."""
    row_hz, film_hz = draw(st.sampled_from([10, 15, 25, 30, 60])), draw(st.sampled_from([10, 15, 29.97, 30, 50, 60]))
    rows, frames = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    offset_s = draw(st.sampled_from([0, 0, 0, 0.004, 0.033, 0.5, -0.02]))
    jitter = draw(st.sampled_from([0, 0, 0.1, 0.4, 0.7]))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    kept = np.delete(
        np.arange(frames), [number for number in draw(st.sets(st.integers(0, 39), max_size=3)) if 0 < number < frames]
    )
    row_s = offset_s + (np.arange(rows) + jitter * random.uniform(-0.5, 0.5, rows)) / row_hz
    film_s = np.maximum.accumulate((kept + jitter * random.uniform(-0.45, 0.45, len(kept))) / film_hz).clip(0)
    return {"row_hz": row_hz, "row_s": row_s.astype(np.float32), "film_s": np.unique(np.round(film_s, 4))}


@settings(max_examples=60, deadline=None)
@given(clocks(), st.sampled_from(VERSIONS))
@example({"row_hz": 10, "row_s": np.float32(clock(6, 10)), "film_s": np.array(clock(18, 30))}, "v2.1")
def test_any_clocks_give_the_nearest_frame_or_an_error(tmp_path_factory, drawn, version):
    root = tmp_path_factory.mktemp("clocks")
    reader = recording(root, version, [drawn["row_s"]], [drawn["film_s"]], fps=drawn["row_hz"])
    row_s, film_s = drawn["row_s"].astype(np.float64), VideoFile(reader.video_path(0, CAMERA)).times_s
    distance = np.abs(row_s[:, None] - film_s)
    try:
        shown = numbers(reader.frames(0, CAMERA))
    except UserError:
        half = np.median(np.diff(film_s)) / 2 if len(film_s) > 1 else 0
        grows, near = (np.diff(row_s) > 0).all(), (distance.min(axis=1) <= half).all()
        own = len(np.unique(distance.argmin(axis=1))) == len(row_s)
        assert not (grows and near and own)
    else:
        np.testing.assert_allclose(distance[np.arange(len(shown)), shown], distance.min(axis=1), atol=1e-6)
