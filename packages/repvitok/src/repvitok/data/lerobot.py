"""Reads LeRobot data sets, versions 2.1 and 3.0 alike: numbers, frames, episodes."""

from __future__ import annotations

import bisect
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8

from repvitok.data.last_used import LastUsed
from repvitok.data.lerobot_format import EpisodeInfo, flat_names
from repvitok.data.lerobot_pictures import PictureColumn
from repvitok.data.video import VideoFile
from repvitok.errors import UserError

__all__ = ["EpisodeInfo", "LeRobotReader"]

Columns = dict[str, np.ndarray]
CAMERA_DTYPES = frozenset({"video", "image"})


class LeRobotReader(Sequence[dict[str, Any]]):
    """A LeRobot data set on disk, frame by frame or episode by episode.

    `reader[i]` is frame i of the data set as a dict with LeRobot's own keys: numbers as numpy arrays or scalars
    (`action`, `observation.state`, `timestamp`, `frame_index`, `episode_index`, `index`, `task_index`), each camera
    as (H, W, 3) uint8 RGB, and `task`, the instruction in words.

    Args:
        root: the data set's folder, the one that holds meta/info.json.

    Attributes:
        fps: frames per second.
        features: info.json's description of every column and camera.
        camera_keys: the cameras, stored as video or as pictures in the tables, in info.json's order.
        episodes: one `EpisodeInfo` per episode.

    Raises:
        FileNotFoundError: there is no such folder, or a file of the data set is missing.
        ValueError: it is no data set this reader knows; the message says what was looked for.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.info = _read_info(self.root)
        self.fps = float(self.info["fps"])
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        self.camera_keys = [key for key, feature in self.features.items() if feature["dtype"] in CAMERA_DTYPES]
        self._layout: _Layout = _layout(self.root, self.info)
        self.episodes: list[EpisodeInfo] = self._layout.episodes
        self.tasks: dict[int, str] = self._layout.tasks
        self._starts = np.cumsum([0] + [episode.length for episode in self.episodes]).tolist()
        self._by_index = {episode.index: episode for episode in self.episodes}
        self._columns: LastUsed[Path, Columns] = LastUsed(8)
        self._pictures: LastUsed[tuple[Path, str], PictureColumn] = LastUsed(4)
        self._videos: LastUsed[Path, VideoFile] = LastUsed(64)

    @property
    def version(self) -> str:
        """The data set's format version, as info.json has it."""
        return self.info["codebase_version"]

    @property
    def num_episodes(self) -> int:
        """Number of episodes."""
        return len(self.episodes)

    def channel_names(self, key: str) -> tuple[str, ...]:
        """One name per channel of a column: info.json's, or `<key>_<i>` where it names none or another number."""
        if key not in self.features:
            raise UserError(f"{self.root}: no feature {key!r}; there are {sorted(self.features)}")
        size = int(np.prod(self.features[key]["shape"]))
        names = flat_names(self.features[key].get("names"))
        return names if len(names) == size else tuple(f"{key}_{channel}" for channel in range(size))

    def frame_size(self, camera: str) -> tuple[int, int]:
        """(H, W) of a camera as info.json has them: by the names of its axes, else with the channels last or first."""
        self._require_camera(camera)
        shape, names = self.features[camera]["shape"], flat_names(self.features[camera].get("names"))
        if {"height", "width"} <= set(names):
            return shape[names.index("height")], shape[names.index("width")]
        return tuple(shape[:2] if shape[-1] <= 4 else shape[1:])

    def __len__(self) -> int:
        """Number of frames over all episodes."""
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]  # no slices
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.root}: frame {index} of {len(self)}")
        index = int(index) % len(self)
        number = bisect.bisect_right(self._starts, index) - 1
        episode, frame = self.episodes[number], index - self._starts[number]
        item: dict[str, Any] = {key: column[frame] for key, column in self.episode(episode.index).items()}
        for camera in self.camera_keys:
            item[camera] = self.frames(episode.index, camera, [frame])[0]
        item["task"] = self.tasks.get(int(item["task_index"]), episode.task)
        return item

    def episode(self, index: int) -> Columns:
        """Every column of numbers of one episode, each (T, ...) in the dtype info.json gives it.

        Raises:
            ValueError: there is no such episode, or its table does not hold the number of rows the meta says.
        """
        columns, first, last = self._rows(index)
        return {key: column[first:last] for key, column in columns.items()}

    def frames(self, episode: int, camera: str, frames: Sequence[int] | None = None) -> UInt8[np.ndarray, "n h w 3"]:
        """Frames of one camera in one episode, by their number in the episode; None for all.

        Returns:
            (n, H, W, 3) uint8 RGB.

        Raises:
            ValueError: no such episode, camera or frame, or the video or a picture is damaged.
        """
        length = self._episode_info(episode).length
        wanted = range(length) if frames is None else [int(frame) for frame in frames]
        if len(wanted) and not 0 <= min(wanted) <= max(wanted) < length:
            raise UserError(
                f"{self.root}: episode {episode} has frames 0..{length - 1}, asked for {min(wanted)}..{max(wanted)}"
            )
        self._require_camera(camera)
        if self.features[camera]["dtype"] == "image":
            _, first, _ = self._rows(episode)
            return self._picture_column(episode, camera).read([first + frame for frame in wanted])
        path = self.video_path(episode, camera)
        video = self._videos.get_or_make(path, lambda: VideoFile(path))
        first = self._layout.first_frame(video, episode, camera)
        return video.read([first + frame for frame in wanted])

    def video_path(self, episode: int, camera: str) -> Path:
        """The video file that holds one camera's frames of one episode (in v3.0 with those of other episodes)."""
        self._episode_info(episode)
        self._require_camera(camera)
        return self.root / self._layout.video_path(episode, camera)

    def _require_camera(self, camera: str) -> None:
        if camera not in self.camera_keys:
            raise UserError(f"{self.root}: no camera {camera!r}; there are {self.camera_keys}")

    def _rows(self, index: int) -> tuple[Columns, int, int]:
        """The columns of the table that holds an episode, its first row there and the row behind its last."""
        info = self._episode_info(index)
        path = self.root / self._layout.data_path(index)
        columns = self._columns.get_or_make(path, lambda: self._read_columns(path))
        number = columns["episode_index"]
        first, last = (int(np.searchsorted(number, index, side)) for side in ("left", "right"))
        if last - first != info.length:
            raise UserError(f"{path}: expected {info.length} rows for episode {index}, found {last - first}")
        return columns, first, last

    def _picture_column(self, episode: int, camera: str) -> PictureColumn:
        path = self.root / self._layout.data_path(episode)
        return self._pictures.get_or_make((path, camera), lambda: self._read_pictures(path, camera))

    def _read_pictures(self, path: Path, camera: str) -> PictureColumn:
        table = _read_parquet(path, lambda name: name == camera)
        if not table.column_names:
            raise UserError(f"{path}: columns {[camera]} are missing, though info.json lists them")
        return PictureColumn(table[camera], self.root, f"{path}, {camera}")

    def _episode_info(self, index: int) -> EpisodeInfo:
        if index not in self._by_index:
            raise UserError(f"{self.root}: no episode {index}; there are {len(self._by_index)} episodes")
        return self._by_index[index]

    def _read_columns(self, path: Path) -> Columns:
        wanted = [key for key, feature in self.features.items() if feature["dtype"] not in CAMERA_DTYPES]
        table = _read_parquet(path, wanted.__contains__)
        missing = [key for key in wanted if key not in table.column_names]
        if missing:
            raise UserError(f"{path}: columns {missing} are missing, though info.json lists them")
        return {key: _to_numpy(table[key], self.features[key], path, key) for key in wanted}


class _Layout(ABC):
    """Where the episodes of one format version lie."""

    episodes: list[EpisodeInfo]
    tasks: dict[int, str]

    @abstractmethod
    def data_path(self, episode: int) -> str: ...

    @abstractmethod
    def video_path(self, episode: int, camera: str) -> str: ...

    @abstractmethod
    def first_frame(self, video: VideoFile, episode: int, camera: str) -> int: ...


class _FilePerEpisode(_Layout):
    """Version 2: one parquet file and one video per camera for every episode."""

    def __init__(self, root: Path, info: Mapping[str, Any]) -> None:
        self._info = info
        self.tasks = {row["task_index"]: row["task"] for row in _read_jsonl(root / "meta/tasks.jsonl")}
        self.episodes = [_episode_info(row, skip=()) for row in _read_jsonl(root / "meta/episodes.jsonl")]

    def data_path(self, episode: int) -> str:
        return self._info["data_path"].format(**self._place(episode))

    def video_path(self, episode: int, camera: str) -> str:
        return self._info["video_path"].format(**self._place(episode), video_key=camera)

    def first_frame(self, video: VideoFile, episode: int, camera: str) -> int:  # noqa: ARG002 - always the first
        return 0

    def _place(self, episode: int) -> dict[str, int]:
        return {"episode_chunk": episode // self._info["chunks_size"], "episode_index": episode}


class _FilesOfManyEpisodes(_Layout):
    """Version 3: episodes lie behind one another in few files; a table says where."""

    def __init__(self, root: Path, info: Mapping[str, Any]) -> None:
        self._info = info
        tasks = _read_parquet(root / "meta/tasks.parquet").to_pydict()
        words = next((column for key, column in tasks.items() if key != "task_index"), [])
        self.tasks = dict(zip(tasks["task_index"], words, strict=True))
        paths = sorted((root / "meta/episodes").glob("*/*.parquet"))
        if not paths:
            raise FileNotFoundError(f"{root}: no episode tables; looked for meta/episodes/*/*.parquet")
        rows = [row for path in paths for row in _read_parquet(path, _no_statistics).to_pylist()]
        self._rows = {row["episode_index"]: row for row in rows}
        self.episodes = [_episode_info(row, skip=("dataset_from_index", "dataset_to_index")) for row in rows]

    def data_path(self, episode: int) -> str:
        row = self._rows[episode]
        return self._info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])

    def video_path(self, episode: int, camera: str) -> str:
        place = {key: self._rows[episode][f"videos/{camera}/{key}"] for key in ("chunk_index", "file_index")}
        return self._info["video_path"].format(**place, video_key=camera)

    def first_frame(self, video: VideoFile, episode: int, camera: str) -> int:
        return video.frame_at(self._rows[episode][f"videos/{camera}/from_timestamp"])


def _layout(root: Path, info: Mapping[str, Any]) -> _Layout:
    version = str(info["codebase_version"])
    if version.startswith("v2."):
        return _FilePerEpisode(root, info)
    if version.startswith("v3."):
        return _FilesOfManyEpisodes(root, info)
    raise UserError(f"{root}: LeRobot format {version} is not supported; expected v2.0, v2.1 or v3.0")


def _read_info(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected a LeRobot data set")
    path = root / "meta/info.json"
    if not path.is_file():
        raise UserError(f"{root} is not a LeRobot data set: it has no meta/info.json")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in ("codebase_version", "fps", "features", "data_path") if key not in info]
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"{path}: not a JSON document ({error})") from error
    if missing:
        raise UserError(f"{path}: {missing} missing; is this a LeRobot v2.1 or v3.0 data set?")
    return info


def _episode_info(row: Mapping[str, Any], skip: Sequence[str]) -> EpisodeInfo:
    known = {"episode_index", "length", "tasks", *skip}
    metadata = {key: value for key, value in row.items() if key not in known and "/" not in key}
    task = (row.get("tasks") or [""])[0]
    return EpisodeInfo(int(row["episode_index"]), int(row["length"]), task, metadata)


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing from the data set")
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _no_statistics(column: str) -> bool:
    return not column.startswith("stats/")


def _read_parquet(path: Path, wanted: Callable[[str], bool] = bool) -> pa.Table:
    """The columns of a table whose names are wanted; every one by default."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing from the data set")
    try:
        file = pq.ParquetFile(path)
        return file.read(columns=[name for name in file.schema_arrow.names if wanted(name)])
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error}); is it truncated?") from error


def _to_numpy(column: pa.ChunkedArray, feature: Mapping[str, Any], path: Path, key: str) -> np.ndarray:
    """(rows, *shape), or (rows,) for a column of scalars."""
    rows, values = len(column), column.combine_chunks()
    nested = pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type)
    while pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
        values = values.flatten()
    flat = values.to_numpy(zero_copy_only=False)
    if not nested:
        return flat if feature["dtype"] == "string" else flat.astype(feature["dtype"], copy=False)
    if flat.size != rows * int(np.prod(feature["shape"])):
        raise UserError(f"{path}: column {key!r} should hold {feature['shape']} numbers a row in {rows} rows")
    return flat.astype(feature["dtype"], copy=False).reshape(rows, *feature["shape"])
