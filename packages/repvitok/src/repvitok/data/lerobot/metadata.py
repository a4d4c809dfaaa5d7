"""What the meta folder of a LeRobot data set says, versions 2.0, 2.1 and 3.0 alike: read once, and checked."""

from __future__ import annotations

import bisect
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from repvitok.data.lerobot.format import (
    CHUNK_EPISODES,
    INDEX_FEATURES,
    ROBOT_COLUMNS,
    Feature,
    PathTemplate,
    number_ranges,
)
from repvitok.runtime.documents import load_json, load_json_lines, parse, refuse_lfs_pointer, require_format
from repvitok.runtime.errors import UserError

log = logging.getLogger(__name__)
_Row = Annotated[list[float], msgspec.Meta(min_length=4, max_length=4)]

VERSIONS = ("v2.0", "v2.1", "v3.0")
NEVER_RECORDED = "if this camera was never recorded, leave it out (--cameras, `cameras` in a recipe)"
HAND_FILE = "meta/hand_projection.json"
HAND_FORMAT, HAND_FORMAT_VERSION = "hand-projection", 1
_DTYPE_ALIASES = {"float": "float32", "double": "float64"}  # as the `datasets` library reads them
_Count = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
_Index = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


@dataclass(frozen=True)
class FilePlace:
    """Where a version 3 data set says that an episode lies; None where it does not say.

    Attributes:
        chunk_index, file_index: the numbers in the file's path.
        from_s, to_s: the episode's part of a video.
    """

    chunk_index: int | None = None
    file_index: int | None = None
    from_s: float | None = None
    to_s: float | None = None


@dataclass(frozen=True)
class EpisodeRow:
    """One row of the table of episodes.

    Attributes:
        index: the episode's number.
        length: frames.
        tasks: what its row says it is told: texts, or numbers of the task table.
        metadata: what else its row says.
        rows: its first row in the whole data set, and the one after its last; None in version 2.
        data, videos: places of its table and its cameras' videos.
    """

    index: int
    length: int
    tasks: tuple[str | int, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[int, int] | None = None
    data: FilePlace = FilePlace()
    videos: Mapping[str, FilePlace] = field(default_factory=dict)


@dataclass(frozen=True)
class Metadata:
    """A data set's meta folder, as far as reading needs it.

    Attributes:
        root: the data set's folder.
        info: info.json as it stands.
        version, fps, chunks_size: of info.json.
        features: the checked description of every column and camera.
        data_path, video_path: templates of paths; video_path is None where no camera is stored as video.
        episodes: by number, in the order of their rows.
        tasks: the task table, number -> text; empty where there is none.
    """

    root: Path
    info: dict[str, Any]
    version: str
    fps: float
    chunks_size: int
    features: dict[str, Feature]
    data_path: PathTemplate
    video_path: PathTemplate | None
    episodes: dict[int, EpisodeRow]
    tasks: dict[int, str]

    def table_of(self, episode: int) -> Path:
        """The parquet file that holds an episode's rows."""
        row = self.episodes[episode]
        return self.root / self._fill(self.data_path, row, row.data, "data")

    def video_of(self, episode: int, camera: str) -> Path:
        """The video file that holds one camera's frames of an episode."""
        assert self.video_path is not None
        row = self.episodes[episode]
        return self.root / self._fill(self.video_path, row, self._video_place(row, camera), f"videos/{camera}", camera)

    def video_start_s(self, episode: int, camera: str) -> float:
        """When an episode begins in its video."""
        assert self.video_path is not None
        place = self._video_place(self.episodes[episode], camera)
        if place.from_s is None:
            if self.version == "v3.0" and "episode_index" not in self.video_path.names:
                raise self._unsaid(episode, f"videos/{camera}/from_timestamp")
            return 0.0
        return place.from_s

    def video_span_s(self, episode: int, camera: str) -> tuple[float, float | None]:
        """When an episode starts in its video, and when the next one in the same file does; None where none does."""
        assert self.video_path is not None
        start_s = self.video_start_s(episode, camera)
        if self.version != "v3.0" or "episode_index" in self.video_path.names:
            return start_s, None
        starts_s = self._video_starts_s[camera, self.video_numbers(self.episodes[episode], camera)]
        behind = bisect.bisect_right(starts_s, start_s)
        return start_s, starts_s[behind] if behind < len(starts_s) else None

    def video_numbers(self, row: EpisodeRow, camera: str) -> tuple[int | None, ...]:
        """The numbers that tell the file of an episode from the others of a camera: those that `video_path` names."""
        assert self.video_path is not None
        place = self._video_place(row, camera)
        numbers = {
            "chunk_index": place.chunk_index,
            "file_index": place.file_index,
            "episode_chunk": row.index // self.chunks_size,
        }
        return tuple(number for name, number in numbers.items() if name in self.video_path.names)

    @cached_property
    def _video_starts_s(self) -> dict[tuple[str, tuple[int | None, ...]], list[float]]:
        """When the episodes of each video start, in order; by camera and the numbers of its file."""
        starts_s = defaultdict(list)
        for row in self.episodes.values():
            for camera, place in row.videos.items():
                if place.from_s is not None:
                    starts_s[camera, self.video_numbers(row, camera)].append(place.from_s)
        return {file: sorted(times) for file, times in starts_s.items()}

    def own_tasks(self, episode: int) -> tuple[str, ...]:
        """The texts that an episode's own row says, different ones, a number looked up in the task table."""
        texts = (self.tasks.get(task, "") if isinstance(task, int) else task for task in self.episodes[episode].tasks)
        return tuple(dict.fromkeys(text for text in texts if text.strip()))

    def _video_place(self, row: EpisodeRow, camera: str) -> FilePlace:
        return row.videos.get(camera, FilePlace())

    def _fill(self, template: PathTemplate, row: EpisodeRow, place: FilePlace, what: str, camera: str = "") -> str:
        """A version 2 file, and any whose path names {episode_index}, is one episode's: its numbers follow from the
        episode's. Other files are those that the table of episodes says."""
        chunk, number = divmod(row.index, self.chunks_size)
        chunk_index, file_index = place.chunk_index, place.file_index
        if self.version != "v3.0" or "episode_index" in template.names:
            counted_in_chunk = template.names & {"episode_chunk", "chunk_index"}
            chunk_index = chunk if chunk_index is None else chunk_index
            file_index = (number if counted_in_chunk else row.index) if file_index is None else file_index
        values = {
            "episode_index": row.index,
            "episode_chunk": chunk,
            "chunk_index": chunk_index,
            "file_index": file_index,
            "video_key": camera,
        }
        for name in sorted(template.names):
            if values[name] is None:
                raise self._unsaid(row.index, f"{what}/{name}")
        return template.fill(values)

    def _unsaid(self, episode: int, column: str) -> UserError:
        hint = f"; {NEVER_RECORDED}" if column.startswith("videos/") else ""
        path = self.root / "meta/episodes"
        return UserError(f"{path}: expected a number in column {column!r} for episode {episode}, got none{hint}")


def read_metadata(root: Path) -> Metadata:
    """The meta folder of a data set."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected a LeRobot data set")
    path = root / "meta/info.json"
    if not path.is_file():
        raise UserError(f"{root} is not a LeRobot data set: it has no meta/info.json")
    raw = load_json(path)
    info = parse(raw, _Info, str(path), unknown=True)
    features = {key: _feature(key, value, f"{path}, feature {key!r}") for key, value in info.features.items()}
    cameras = [key for key, feature in features.items() if feature.dtype == "video"]
    data_path, video_path = PathTemplate(info.data_path, f"{path}, data_path"), None
    zeros = dict.fromkeys(("episode_chunk", "episode_index", "chunk_index", "file_index"), 0)
    data_path.fill({**zeros, "video_key": ""})
    if cameras:
        if info.video_path is None:
            raise UserError(f"{path}: field 'video_path': expected a path, got null, though {cameras} are videos")
        video_path = PathTemplate(info.video_path, f"{path}, video_path")
        for camera in cameras:
            video_path.fill({**zeros, "video_key": camera})
    version3 = info.codebase_version == "v3.0"
    rows = _episodes_of_tables(root, cameras) if version3 else _episodes_of_lines(root / "meta/episodes.jsonl")
    episodes: dict[int, EpisodeRow] = {}
    for source, row in rows:
        if row.index in episodes:
            raise UserError(f"{source}: field 'episode_index': {row.index} is there already; expected each number once")
        episodes[row.index] = row
    if not episodes:
        raise UserError(f"{root / 'meta'}: expected at least one episode, got none")
    in_order = sorted(episodes.values(), key=lambda row: (row.rows or (0, 0), row.index))
    metadata = Metadata(
        root=root,
        info=raw,
        version=info.codebase_version,
        fps=info.fps,
        chunks_size=info.chunks_size,
        features=features,
        data_path=data_path,
        video_path=video_path,
        episodes={row.index: row for row in in_order},
        tasks=_tasks(root / ("meta/tasks.parquet" if version3 else "meta/tasks.jsonl")),
    )
    _require_rows_apart(metadata)
    _require_videos_apart(metadata, cameras)
    total = raw.get("total_episodes")
    if isinstance(total, int) and total != len(episodes):
        log.warning("%s: %d episodes in meta, info.json counts %d; was a file cut?", root, len(episodes), total)
    return metadata


def read_parquet(path: Path, wanted: Callable[[str], bool] = bool) -> pa.Table:
    """The columns of a table whose names are wanted; every one by default."""
    with _parquet_file(path) as file:
        names = [name for name in file.schema_arrow.names if wanted(name)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{path}: columns {twice} are there twice")
        return file.read(columns=names).select(names)


def parquet_columns(path: Path) -> list[str]:
    """The names of a table's columns, from its footer alone; errors as of `read_parquet`."""
    with _parquet_file(path) as file:
        return file.schema_arrow.names


@contextmanager
def _parquet_file(path: Path) -> Iterator[pq.ParquetFile]:
    """A table that is open; what goes wrong with it from here on names it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing from the data set")
    refuse_lfs_pointer(path)
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable parquet file ({reason}); is it truncated?") from error


def column_values(table: pa.Table, name: str, path: Path) -> list[Any]:
    """A column as Python values."""
    try:
        return table[name].to_pylist()
    except (pa.ArrowException, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: column {name!r} cannot be read ({reason}); is the file damaged?") from error


@dataclass(frozen=True)
class _Info:
    codebase_version: str
    fps: Annotated[float, msgspec.Meta(ge=1e-3, le=1e6)]
    features: Annotated[dict[str, Any], msgspec.Meta(min_length=1)]
    data_path: str
    video_path: str | None = None
    chunks_size: _Count = CHUNK_EPISODES  # LeRobot's own; with another one the files are not found

    def __post_init__(self) -> None:
        if self.codebase_version not in VERSIONS:
            raise UserError(
                f"field 'codebase_version': {self.codebase_version} is not supported; expected v2.0, v2.1 or v3.0"
            )


@dataclass(frozen=True)
class _Described:
    dtype: str


@dataclass(frozen=True)
class _EpisodeLine:
    episode_index: _Index
    length: _Count
    tasks: Any = None


@dataclass(frozen=True)
class _TaskLine:
    task_index: _Index
    task: str

    def __post_init__(self) -> None:
        self.task.encode()  # half a surrogate pair is no text that could be stored again


def _feature(key: str, raw: Any, source: str) -> Feature:
    dtype = parse(raw, _Described, source, unknown=True).dtype
    found = Feature(_DTYPE_ALIASES.get(dtype, dtype))
    if found.is_number or found.is_camera:
        if "shape" not in raw:
            raise UserError(f"{source}: field 'shape' is missing")
        return parse({**raw, "dtype": found.dtype}, Feature, source, unknown=True)
    if key in ROBOT_COLUMNS or key in INDEX_FEATURES:
        raise UserError(f"{source}: field 'dtype': expected a number's, such as float32 or int64, got {dtype!r}")
    return found


def _episodes_of_lines(path: Path) -> Iterator[tuple[str, EpisodeRow]]:
    for source, raw in load_json_lines(path):
        line = parse(raw, _EpisodeLine, source, unknown=True)
        extra = {key: raw[key] for key in raw if key not in ("episode_index", "length", "tasks") and "/" not in key}
        yield source, EpisodeRow(line.episode_index, line.length, _own_tasks(line.tasks, source), extra)


def _episodes_of_tables(root: Path, cameras: Sequence[str]) -> Iterator[tuple[str, EpisodeRow]]:
    paths = sorted(path for path in (root / "meta/episodes").rglob("*.parquet") if not path.name.startswith("."))
    if not paths:
        raise FileNotFoundError(f"{root}: no episode tables; looked for meta/episodes/*/*.parquet")
    places = {"data": ("chunk_index", "file_index")}
    places |= {f"videos/{key}": ("chunk_index", "file_index", "from_timestamp", "to_timestamp") for key in cameras}
    needed = {f"{what}/{name}" for what, names in places.items() for name in names}
    for path in paths:
        table = read_parquet(path, lambda name: "/" not in name or name in needed)
        numbers = {name: _whole_numbers(table, name, path) for name in ("dataset_from_index", "dataset_to_index")}
        numbers |= {name: _whole_numbers(table, name, path) for name in needed if name.endswith("_index")}
        time = "a time in seconds, 0 or more"
        times = {
            name: _checked(table, name, path, False, time, lambda x: x >= 0, float)
            for name in needed
            if name.endswith("_timestamp")
        }
        index = _whole_numbers(table, "episode_index", path, required=True)
        length = _whole_numbers(table, "length", path, required=True, least=1)
        known = {"episode_index", "length", "tasks", "dataset_from_index", "dataset_to_index", *needed}
        extra = {name: column_values(table, name, path) for name in table.column_names if name not in known}
        tasks = column_values(table, "tasks", path) if "tasks" in table.column_names else [None] * len(table)
        for row in range(len(table)):
            found = {
                what: FilePlace(
                    numbers[f"{what}/chunk_index"][row],
                    numbers[f"{what}/file_index"][row],
                    *(times[f"{what}/{name}"][row] for name in names[2:]),
                )
                for what, names in places.items()
            }
            first, last = numbers["dataset_from_index"][row], numbers["dataset_to_index"][row]
            source = f"{path}, row {row}"
            yield (
                source,
                EpisodeRow(
                    index=index[row],
                    length=length[row],
                    tasks=_own_tasks(tasks[row], source),
                    metadata={name: values[row] for name, values in extra.items()},
                    rows=None if first is None or last is None else (first, last),
                    data=found["data"],
                    videos={key: found[f"videos/{key}"] for key in cameras},
                ),
            )


def _whole_numbers(table: pa.Table, name: str, path: Path, *, required: bool = False, least: int = 0) -> list[Any]:
    """A column of whole numbers, None where there is none; a whole number written as a float is one."""
    return _checked(table, name, path, required, f"a whole number from {least} to 2^53", lambda x: least <= x == int(x))


def _checked(
    table: pa.Table,
    name: str,
    path: Path,
    required: bool,
    expected: str,
    holds: Callable[[Any], bool],
    kind: Callable[[Any], Any] = int,
) -> list[Any]:
    if name not in table.column_names:
        if required:
            raise UserError(f"{path}: missing column {name!r}")
        return [None] * len(table)
    values = column_values(table, name, path)
    for row, value in enumerate(values):
        if value is None and not required:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not value < 2**53 or not holds(value):
            raise UserError(f"{path}, row {row}: field {name!r}: expected {expected}, got {value!r}")
        values[row] = kind(value)
    return values


def _own_tasks(value: Any, source: str) -> tuple[str | int, ...]:
    """An episode's `tasks` in any form found: a list of texts, a text alone, numbers of the task table, nothing."""
    items = value if isinstance(value, list) else [value]
    for item in items:
        if item is not None and (isinstance(item, bool) or not isinstance(item, str | int)):
            raise UserError(f"{source}: field 'tasks': expected texts, got {str(value)[:60]!r}")
        if isinstance(item, str):
            parse({"task_index": 0, "task": item}, _TaskLine, source)
    return tuple(item for item in items if item is not None)


def _tasks(path: Path) -> dict[int, str]:
    """The task table; an empty text is no task. A data set without the table has only its episodes' own words."""
    if not os.path.lexists(path):  # a link that leads nowhere is a table that was not copied
        return {}
    tasks: dict[int, str] = {}
    for source, raw in load_json_lines(path) if path.suffix == ".jsonl" else _task_rows(path):
        line = parse(raw, _TaskLine, source, unknown=True)
        if tasks.setdefault(line.task_index, line.task) != line.task:
            raise UserError(
                f"{source}: field 'task_index': {line.task_index} is {tasks[line.task_index]!r} already, "
                f"got {line.task!r} too"
            )
    return {number: text for number, text in tasks.items() if text.strip()}


def _task_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a version 3 task table, whose text is a column `task`, pandas' index, or the only column of texts."""
    table = read_parquet(path)
    kinds = {item.name: item.type for item in table.schema}
    kinds = {name: kind.value_type if pa.types.is_dictionary(kind) else kind for name, kind in kinds.items()}
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    texts = [name for name, kind in kinds.items() if any(check(kind) for check in is_text)]
    if "task" in table.column_names or "__index_level_0__" in texts:
        texts = ["task" if "task" in table.column_names else "__index_level_0__"]
    if "task_index" not in table.column_names or len(texts) != 1:
        raise UserError(f"{path}: expected columns 'task_index' and 'task', got {table.column_names}")
    numbers = _whole_numbers(table, "task_index", path, required=True)
    for row, (number, text) in enumerate(zip(numbers, column_values(table, texts[0], path), strict=True)):
        yield f"{path}, row {row}", {"task_index": number, "task": text}


def _require_rows_apart(metadata: Metadata) -> None:
    """Stops where two episodes claim the same rows of the whole data set, or one claims another number than it has."""
    claimed = [(*row.rows, row.index) for row in metadata.episodes.values() if row.rows]
    path = metadata.root / "meta/episodes"
    for first, last, episode in claimed:
        if last - first != metadata.episodes[episode].length:
            raise UserError(
                f"{path}: episode {episode}: expected {metadata.episodes[episode].length} rows (its length), got "
                f"dataset_from_index {first} and dataset_to_index {last}"
            )
    claimed.sort()
    for (_, last, one), (first, _, other) in pairwise(claimed):
        if first < last:
            raise UserError(f"{path}: episodes {one} and {other} both claim row {first} of the data set")


def _require_videos_apart(metadata: Metadata, cameras: Sequence[str]) -> None:
    """Stops where two episodes, or two cameras, would get the same frames of one video."""
    template, path = metadata.video_path, metadata.root / "meta/info.json"
    if template is None:
        return
    if len(cameras) > 1 and "video_key" not in template.names:
        raise UserError(f"{path}: video_path names no {{video_key}}: {cameras} would share one video")
    if "episode_index" in template.names:
        return
    if metadata.version != "v3.0":
        if len(metadata.episodes) > 1 and "file_index" not in template.names:
            raise UserError(
                f"{path}: video_path names no {{episode_index}}: episodes {number_ranges(metadata.episodes)} would "
                "share one video"
            )
        return
    half_frame_s = 0.5 / metadata.fps
    for camera in cameras:
        placed = [
            (metadata.video_numbers(row, camera), place.from_s, place.to_s, row.index)
            for row in metadata.episodes.values()
            if (place := row.videos[camera]).from_s is not None and None not in metadata.video_numbers(row, camera)
        ]
        placed.sort(key=lambda part: (part[0], part[1], part[3]))
        for (file, begin_s, end_s, one), (next_file, next_s, _, other) in pairwise(placed):
            end_s = begin_s + half_frame_s if end_s is None else max(end_s - half_frame_s, begin_s + half_frame_s)
            if file == next_file and next_s < end_s:
                raise UserError(
                    f"{metadata.root / 'meta/episodes'}: episodes {one} and {other} both claim {camera} at {next_s:g} "
                    f"s of {metadata.video_of(one, camera).relative_to(metadata.root)}"
                )


@dataclass(frozen=True)
class HandProjection:
    """Where cameras see a robot's hand: meta/hand_projection.json, which is ours and not LeRobot's.

    Attributes:
        channels: the three channels of `observation.state` that hold the hand's position (x, y, z).
        cameras: camera key -> 3 x 4 matrix that takes (x, y, z, 1) to (right w, down w, w), right and down as fractions
            of the picture's width and height. Cameras that move with the robot are not among them.
    """

    channels: Annotated[list[str], msgspec.Meta(min_length=3, max_length=3)]
    cameras: dict[str, Annotated[list[_Row], msgspec.Meta(min_length=3, max_length=3)]]

    def to_dict(self) -> dict[str, Any]:
        """What the file holds."""
        head = {"format": HAND_FORMAT, "format_version": HAND_FORMAT_VERSION}
        return {**head, "channels": self.channels, "cameras": self.cameras}

    def serves(self, names: Sequence[str], cameras: Sequence[str]) -> bool:
        """Whether these channels of a state hold the hand and all these cameras are known."""
        return set(self.channels) <= set(names) and set(cameras) <= set(self.cameras)

    def places(
        self, state: Float[np.ndarray, "frames s"], names: Sequence[str], cameras: Sequence[str]
    ) -> Float[np.ndarray, "frames views 2"]:
        """(down, right) of the hand in each camera's picture, in [0, 1] inside it.

        Args:
            state: of the robot.
            names: of its channels.
            cameras: keys, in order.
        """
        points = state[:, [list(names).index(channel) for channel in self.channels]].astype(np.float64)
        matrices = np.array([self.cameras[camera] for camera in cameras])
        seen = np.einsum("vij,fj->fvi", matrices, np.concatenate([points, np.ones((len(points), 1))], axis=1))
        return seen[..., 1::-1] / seen[..., 2:]


def read_hand_projection(root: Path) -> HandProjection | None:
    """A data set's `HandProjection`, or None where it has none."""
    path = root / HAND_FILE
    if not path.is_file():
        return None
    content = require_format(load_json(path), HAND_FORMAT, HAND_FORMAT_VERSION, str(path))
    return parse(content, HandProjection, str(path))
