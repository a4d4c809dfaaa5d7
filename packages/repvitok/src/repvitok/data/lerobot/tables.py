"""The rows of a LeRobot data set's episodes, read once and checked, and which frame of a video belongs to each row.

Time decides, never a number. A row's time is its `timestamp`, seconds from its episode's start, as the table has it;
without that column, its number over info.json's fps. A frame's time is its presentation time in the container's clock,
edit lists applied. In v3.0 an episode starts at its `from_timestamp`, in v2 at 0, even where a video's first frame is
shown later: as LeRobot's own loader has it. Each row takes the frame shown nearest, among the frames of its episode,
and all rows of an episode must have one within half a frame (`VideoFile.tolerance_s`), or none is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64, Int64

from repvitok.data.lerobot.format import ROBOT_COLUMNS, Feature
from repvitok.data.lerobot.metadata import Metadata, column_values, read_parquet
from repvitok.data.video import VideoFile
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import LastUsed

INDEX_COLUMNS = ("episode_index", "frame_index", "task_index")
_INDEX = Feature("int64")
_NO_TASK = -1

Where = Callable[[int], str]  # a row of a table -> what an error calls it
RATE_TOLERANCE = 0.15
"""How far the rows' own rate may be from info.json's, and by one row more: clocks drift and are rounded, but 25 rows a
second are not 30."""


@dataclass(frozen=True)
class EpisodeRows:
    """The rows of one episode in its table.

    Attributes:
        first, last: its first row and the one after its last.
        tasks: the numbers in `task_index`, each once, in order of appearance; -1 where a row has none.
        problem: what is wrong with them; "" if nothing is.
    """

    first: int
    last: int
    tasks: tuple[int, ...] = ()
    problem: str = ""


@dataclass(frozen=True, eq=False)
class _Columns:
    """Some columns of one table, and of each the rows that hold a number which is not finite."""

    values: dict[str, np.ndarray]
    not_finite: dict[str, np.ndarray]


class EpisodeTables:
    """The tables of a data set. Which rows an episode has is kept; of the columns those of the last few tables are."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._rows: dict[Path, dict[int, EpisodeRows]] = {}
        self._columns: LastUsed[tuple[Path, frozenset[str]], _Columns] = LastUsed(8)

    def rows(self, episode: int) -> EpisodeRows:
        """Where an episode's rows are; reads its table's index columns if that was not done yet."""
        path = self._metadata.table_of(episode)
        if path not in self._rows:
            self.read(path, ())
        found = self._rows[path].get(episode, EpisodeRows(0, 0))
        if found.problem:
            raise UserError(f"{path}: {found.problem}")
        length = self._metadata.episodes[episode].length
        if found.last - found.first != length:
            raise UserError(f"{path}: expected {length} rows for episode {episode}, found {found.last - found.first}")
        return found

    def columns(
        self, episode: int, keys: Sequence[str], optional: frozenset[str] = frozenset()
    ) -> dict[str, np.ndarray]:
        """Columns of one episode, (T,) or (T, *shape), numbers in the dtype that info.json gives them.

        Args:
            episode: its number.
            keys: the columns.
            optional: which of them are left out where the table has none.
        """
        path = self._metadata.table_of(episode)
        columns = self._columns.get_or_make((path, frozenset(keys)), lambda: self._read_columns(path, keys, optional))
        rows = self.rows(episode)
        for key in ROBOT_COLUMNS:
            bad = columns.not_finite.get(key, np.zeros(0, np.int64))
            at = int(np.searchsorted(bad, rows.first))
            if at < len(bad) and bad[at] < rows.last:
                values = columns.values[key][bad[at]].reshape(-1)
                channel = int(np.flatnonzero(~np.isfinite(values))[0])
                name = self._metadata.features[key].channel_names(key)[channel]
                raise UserError(
                    f"{path}: episode {episode}, row {bad[at] - rows.first}, {key}, channel {name!r}: expected a "
                    f"finite number, got {values[channel]}"
                )
        return {key: column[rows.first : rows.last] for key, column in columns.values.items()}

    def read(self, path: Path, keys: Sequence[str], optional: frozenset[str] = frozenset()) -> pa.Table:
        """Some columns of a table, as they are, and its index columns, from which `rows` are known afterwards."""
        table = read_parquet(path, {*keys, *INDEX_COLUMNS}.__contains__)
        there = {*table.column_names, *optional}
        if missing := sorted({*keys, "episode_index"} - there):
            raise UserError(f"{path}: columns {missing} are missing, though info.json lists them")
        if path not in self._rows:
            self._rows[path] = _episode_rows(table, path)
        return table

    def _read_columns(self, path: Path, keys: Sequence[str], optional: frozenset[str]) -> _Columns:
        table = self.read(path, keys, optional)
        values, not_finite = {}, {}
        for key in [key for key in keys if key in table.column_names]:
            feature = self._metadata.features[key]
            values[key] = to_numpy(table, key, feature, path, self._where(path))
            if values[key].dtype.kind == "f":
                finite = np.isfinite(values[key]).all(axis=tuple(range(1, values[key].ndim)))
                not_finite[key] = np.flatnonzero(~finite)
        return _Columns(values, not_finite)

    def _where(self, path: Path) -> Where:
        def where(row: int) -> str:
            for episode, rows in self._rows[path].items():
                if rows.first <= row < rows.last:
                    return f"episode {episode}, row {row - rows.first}"
            return f"row {row}"

        return where


def to_numpy(table: pa.Table, key: str, feature: Feature, path: Path, where: Where = "row {}".format) -> np.ndarray:
    """One column of a table: (rows,), or (rows, *shape) for lists; objects where the feature is none of numbers.

    Any way that a table can store the values is taken: lists of fixed, free or large size, nested or flat, every width
    of integer and float. Values must survive the dtype that info.json gives: a whole number stays that number, a
    fraction never becomes a whole one, a finite number never infinite. Floats are rounded to its precision.
    """
    if not feature.is_number:
        return np.fromiter(column_values(table, key, path), dtype=object, count=len(table))
    source = f"{path}: column {key!r}"
    size = math.prod(feature.shape)
    values, sizes = _unwrapped(table[key].combine_chunks(), source, where)
    if len(table) and sizes not in (list(feature.shape), [size] if size > 1 or sizes else []):
        raise UserError(
            f"{source} should hold {list(feature.shape)} numbers a row, as info.json says, got {sizes or 1}"
        )
    if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)):
        if len(table):
            raise UserError(f"{source}: expected {feature.dtype}, as info.json says, got {values.type}")
        values = pa.array([], feature.dtype)
    flat = values.to_numpy(zero_copy_only=False)
    if flat.dtype != np.dtype(feature.dtype):
        cast, kept = _converted(flat, np.dtype(feature.dtype))
        if not kept.all():
            number = int(np.flatnonzero(~kept)[0])
            raise UserError(
                f"{source}, {where(number // size)}: expected {feature.dtype}, as info.json says, got {flat[number]} "
                f"({values.type})"
            )
        flat = cast
    return flat.reshape(len(table), *feature.shape) if sizes else flat


def robot_numbers(values: np.ndarray, names: Sequence[str], where: Where) -> np.ndarray:
    """Rows of actions or states as float32, (rows, channels): what latents and policies hold.

    Floats are rounded; nothing else about them may change.

    Args:
        values: (rows, ...) of any dtype.
        names: one per channel.
        where: a row of them -> what an error calls it.
    """
    values = values.reshape(len(values), math.prod(values.shape[1:]))
    numbers, kept = _converted(values, np.dtype(np.float32))
    wrong = ~(kept & np.isfinite(numbers))
    if wrong.any():
        row, channel = np.argwhere(wrong)[0].tolist()
        raise UserError(
            f"{where(row)}, channel {names[channel]!r}: expected a finite number that float32 holds, as actions and "
            f"states are learned in, got {values[row, channel]}"
        )
    return numbers


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists, in any of the ways that Arrow has for them."""
    return (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def _unwrapped(values: pa.Array, source: str, where: Where) -> tuple[pa.Array, list[int]]:
    """The innermost values of a column of (nested) lists, and how many the lists of each level have."""
    sizes: list[int] = []
    while True:
        kind = values.type
        if isinstance(values, pa.ExtensionArray):
            values = values.storage
            continue
        if pa.types.is_dictionary(kind):
            values = values.dictionary_decode()
            continue
        per_row = math.prod(sizes)
        if values.null_count:
            row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0]) // max(per_row, 1)
            raise UserError(f"{source}, {where(row)}: expected a number, got null")
        if not is_list(kind):
            return values, sizes
        lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)  # type: ignore[attr-defined]
        if odd := np.flatnonzero(lengths != lengths[:1]).tolist():
            row = odd[0] // max(per_row, 1)
            raise UserError(
                f"{source}, {where(row)}: expected rows of one length, {lengths[0]} as in row 0, got {lengths[odd[0]]}"
            )
        sizes.append(int(lengths[0]) if len(lengths) else 0)
        values = values.flatten()


def _converted(values: np.ndarray, target: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Values in another dtype, and which of them are still what they were, but for the rounding of floats."""
    with np.errstate(all="ignore"):
        cast = values.astype(target, copy=False)
        if cast.dtype == values.dtype or (values.dtype.kind == "f" and target.kind == "f"):
            return cast, np.isfinite(cast) | ~np.isfinite(values)
        # Going there and back must end where it began; the signs tell where the bits alone survived (-1 as 2^64-1).
        kept = (cast.astype(values.dtype) == values) & ((cast < 0) == (values < 0))
        if target.kind in "iu" and values.dtype.kind == "f":  # 2^63 as a float: some processors saturate
            kept &= values < float(np.iinfo(target).max) + (target.itemsize < 8)
        if target.kind == "f" and values.dtype.kind in "iu":
            kept &= cast < float(np.iinfo(values.dtype).max) + (values.dtype.itemsize < 8)
    return cast, kept


def _episode_rows(table: pa.Table, path: Path) -> dict[int, EpisodeRows]:
    """Where the rows of each episode in a table are."""
    rows = len(table)
    if not rows:
        return {}
    episode = _index_column(table, "episode_index", path)
    frame = _index_column(table, "frame_index", path) if "frame_index" in table.column_names else None
    task = _task_column(table, path)
    starts = np.flatnonzero(np.diff(episode, prepend=episode[:1] - 1))
    ends = np.append(starts[1:], rows)
    changes = np.flatnonzero(np.diff(task, prepend=task[:1] - 1) | np.diff(episode, prepend=episode[:1] - 1))
    expected = np.arange(rows) - np.repeat(starts, ends - starts)
    wrong = np.flatnonzero(frame != expected) if frame is not None else np.zeros(0, np.int64)
    found: dict[int, EpisodeRows] = {}
    for first, last in zip(starts.tolist(), ends.tolist(), strict=True):
        number, problem = int(episode[first]), ""
        at = int(np.searchsorted(wrong, first))
        if at < len(wrong) and wrong[at] < last and frame is not None:
            row = int(wrong[at])
            problem = (
                f"episode {number}, row {row - first}: expected frame_index {row - first}, got {frame[row]}; "
                "sort the rows by episode_index and frame_index"
            )
        if (earlier := found.get(number)) is not None:
            problem = f"the rows of episode {number} lie apart, at {earlier.first} and at {first}; sort them by episode"
        of_task = changes[np.searchsorted(changes, first) : np.searchsorted(changes, last)]
        tasks = dict.fromkeys(task[of_task].tolist()) if "task_index" in table.column_names else {}
        found[number] = EpisodeRows(first, last, tuple(tasks), problem)
    return found


def _index_column(table: pa.Table, key: str, path: Path) -> np.ndarray:
    return to_numpy(table, key, _INDEX, path).reshape(-1)


def _task_column(table: pa.Table, path: Path) -> np.ndarray:
    """`task_index`, -1 where a row has none."""
    if "task_index" not in table.column_names or pa.types.is_null(table["task_index"].type):
        return np.full(len(table), _NO_TASK)
    column = table.select(["task_index"])
    # pandas makes floats of whole numbers once one is missing, and NaN of the one that is.
    has_task = ~column["task_index"].is_null(nan_is_null=True).to_numpy()
    numbers = np.full(len(table), _NO_TASK)
    numbers[has_task] = _index_column(
        column if has_task.all() else column.filter(pa.array(has_task)), "task_index", path
    )
    return numbers


def row_times_s(timestamps: pa.ChunkedArray | None, rows: int, fps: float, source: str) -> Float64[np.ndarray, " rows"]:
    """When each row of an episode was recorded, in seconds from the episode's start.

    Args:
        timestamps: the column of the episode's rows; None where the table has none: row / fps.
        rows: how many rows the episode has.
        fps: info.json's rows per second.
        source: what an error should call the episode.
    """
    if timestamps is None:
        with np.errstate(all="ignore"):
            times = np.arange(rows) / np.float64(fps)
    else:
        values = timestamps.combine_chunks()
        while is_list(values.type):  # of one number each
            values = values.flatten()
        stored = values.to_numpy(zero_copy_only=False)
        if stored.dtype.kind not in "fiu" or len(stored) != rows:
            raise UserError(
                f"{source}: column 'timestamp' should hold one number a row, seconds from the episode's start, in "
                f"{rows} rows; got {len(stored)} of {timestamps.type}"
            )
        times = stored.astype(np.float64)
    wrong = ~np.isfinite(times)
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(f"{source}, row {row}: expected a timestamp in seconds, got {times[row]}")
    wrong = np.diff(times) <= 0
    if wrong.any():
        row = int(wrong.argmax()) + 1
        raise UserError(
            f"{source}, row {row}: timestamps must grow from row to row, got {times[row]:.6g} s after "
            f"{times[row - 1]:.6g} s"
        )
    if len(times) > 1:
        # Rows that were dropped widen the mean, times that were rounded shift the median: another rate shows in both.
        steps = np.array([np.median(np.diff(times)), (times[-1] - times[0]) / (len(times) - 1)])
        if (np.abs(steps * fps - 1) > RATE_TOLERANCE + 1 / (len(times) - 1)).all():
            raise UserError(
                f"{source}: its rows are {steps[0]:.4g} s apart by their timestamps, {1 / steps[0]:.4g} a second, and "
                f"info.json's fps says {fps:.4g}: correct the one that is wrong"
            )
    return times


def pair_rows(
    video: VideoFile,
    times_s: Float64[np.ndarray, " rows"],
    fps: float,
    start_s: float,
    next_start_s: float | None,
    source: str,
) -> range | Int64[np.ndarray, " rows"]:
    """The frame of each row of one episode.

    Args:
        video: holds the episode.
        times_s: of the rows, from the episode's start.
        fps: info.json's rows per second.
        start_s: where the episode starts in the video.
        next_start_s: where the next episode in the same file starts, whose frames are not this one's; None: none does.
        source: what an error should call the episode.

    Returns:
        One number a row, none smaller than the one before: a `range` where they are evenly spaced. Rows that come
        faster than the video's frames share them.
    """
    first = int(video.nearest(start_s))
    last = len(video) if next_start_s is None else max(int(video.nearest(next_start_s)), first + 1)
    shown_s = start_s + times_s
    frames = video.nearest(shown_s, range(first, last))
    wrong = ~(np.abs(video.times_s[frames] - shown_s) <= video.tolerance_s)  # also where start_s is no number
    if wrong.any():
        row, others = int(wrong.argmax()), f" ({wrong.sum()} of {len(wrong)} rows)" if wrong.sum() > 1 else ""
        raise UserError(
            f"{source}, row {row}{others}: no frame of {video.name} is within {video.tolerance_s:.4f} s of "
            f"{shown_s[row]:.4f} s (the episode's start, {start_s:.4f} s, and the row's timestamp, "
            f"{times_s[row]:.4f} s); the nearest of the episode's frames {first}..{last - 1} is {frames[row]} at "
            f"{video.times_s[frames[row]]:.4f} s; table and video disagree about the time: correct the timestamps, or "
            "leave the episode or the camera out"
        )
    steps = np.diff(frames)
    if not video.is_slower_than(fps) and (steps == 0).any():
        row = int((steps == 0).argmax()) + 1
        raise UserError(
            f"{source}: rows {row - 1} and {row} ({times_s[row - 1]:.4f} s, {times_s[row]:.4f} s) are both nearest "
            f"to frame {frames[row]} of {video.name}, which has {1 / video.spacing_s:.4g} frames a second for "
            f"{fps:.4g} rows: correct the timestamps, or leave the episode or the camera out"
        )
    if len(steps) and steps[0] > 0 and (steps == steps[0]).all():
        return range(int(frames[0]), int(frames[-1]) + 1, int(steps[0]))
    return frames
