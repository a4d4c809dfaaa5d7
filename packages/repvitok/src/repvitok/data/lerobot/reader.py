"""Reads LeRobot data sets, versions 2.0, 2.1 and 3.0 alike: numbers, frames, instructions, episodes."""

from __future__ import annotations

import bisect
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8
from PIL import Image

from repvitok.data.images import HOW_TO_ASK, depth_codes, is_deep, is_depth_feature, picture_to_rgb
from repvitok.data.latents import InstructionSource
from repvitok.data.lerobot.format import EpisodeInfo, flat_names, number_ranges
from repvitok.data.lerobot.metadata import NEVER_RECORDED, EpisodeRow, Metadata, read_metadata
from repvitok.data.lerobot.tables import EpisodeTables, pair_rows, row_times_s
from repvitok.data.video import VideoFile
from repvitok.runtime.documents import DepthRange, checked_range, refuse_lfs_pointer
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import LastUsed

log = logging.getLogger(__name__)

_SHOWN = 3  # episodes that a warning quotes


class Instructions:
    """Episode number -> its instruction, looked up when it is first asked for (docs/decisions/050).

    The rows decide: the texts of the task table that `task_index` names, each once, in order of appearance, joined by
    "; ". Where a row has no number or one that the table lacks, or there is no table, it is the episode's own `tasks`,
    joined likewise; where it has none either, "". The first episode whose own `tasks` are others, whose numbers the
    table lacks, or that has no instruction, has all episodes looked at, and each kind told once.
    """

    def __init__(self, metadata: Metadata, tables: EpisodeTables) -> None:
        self._metadata, self._tables = metadata, tables
        self._found: dict[int, str] = {}
        self._warned = False

    @property
    def source(self) -> InstructionSource:
        """Where the instructions come from: the rows with the task table, the episodes' own `tasks`, or nowhere."""
        if self._metadata.tasks:
            return "task_index"
        return "tasks" if any(map(self._metadata.own_tasks, self._metadata.episodes)) else "none"

    def __getitem__(self, episode: int) -> str:
        if episode not in self._found:
            text, odd = self._find(episode)
            if odd and not self._warned:
                self._warned = True
                self._tell()
            self._found[episode] = text
        return self._found[episode]

    def _find(self, episode: int) -> tuple[str, str]:
        """An episode's instruction, and what is odd about it: "", "other", "unknown" or "none"."""
        own, table = self._metadata.own_tasks(episode), self._metadata.tasks
        if len(own) == 1 and set(own) == set(table.values()):
            return own[0], ""  # whatever the rows say: there is no other text
        numbers = self._tables.rows(episode).tasks if table else ()
        named = tuple(dict.fromkeys(table[number] for number in numbers if number in table))
        if numbers and all(number in table for number in numbers):
            return "; ".join(named), "other" if own and set(own) != set(named) else ""
        text = "; ".join(own or named)
        return text, "none" if not text else "unknown" if any(number >= 0 for number in numbers) else ""

    def _tell(self) -> None:
        """Looks at all episodes and warns of what is odd, with the first examples and the count."""
        odd: dict[str, list[tuple[int, str]]] = {"other": [], "unknown": [], "none": []}
        for episode in self._metadata.episodes:
            try:
                text, kind = self._find(episode)
            except (UserError, OSError):  # told when this episode itself is read
                continue
            if kind:
                odd[kind].append((episode, text))
        root, count = self._metadata.root, len(self._metadata.episodes)
        if found := odd["other"]:
            quoted = "; ".join(
                f"episode {episode}: rows {text!r}, its `tasks` {list(self._metadata.own_tasks(episode))}"
                for episode, text in found[:_SHOWN]
            )
            log.warning(
                "%s: in %d of %d episodes the rows' task_index names other tasks than the episode's `tasks`; the rows "
                "decide. %s", root, len(found), count, quoted,
            )  # fmt: skip
        if found := odd["unknown"]:
            quoted = "; ".join(f"episode {episode}: {text!r}" for episode, text in found[:_SHOWN])
            log.warning(
                "%s: in %d of %d episodes task_index names no task of the task table; the episode's `tasks` are taken. "
                "%s", root, len(found), count, quoted,
            )  # fmt: skip
        if found := odd["none"]:
            numbers = number_ranges(episode for episode, _ in found)
            log.warning("%s: %d of %d episodes have no instruction: %s", root, len(found), count, numbers)


class RecordedEpisode(EpisodeInfo):
    """An episode whose instruction is looked up when it is first asked for: its rows have to be read for it."""

    def __init__(self, index: int, length: int, metadata: Mapping[str, Any], instructions: Instructions) -> None:
        values = {"index": index, "length": length, "metadata": metadata, "_instructions": instructions}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def task(self) -> str:  # type: ignore[override]  # a field of the base class
        """The instruction, in words ("" where the data set has none)."""
        return self._instructions[self.index]  # type: ignore[attr-defined]


class PictureColumn:
    """The pictures of one camera in one table: cameras that are no video are encoded pictures, one per row.

    Each is a struct of `bytes`, an encoded picture, and `path`, where it lies beneath the data set's folder if there
    are no bytes.

    Args:
        values: the column.
        root: the data set's folder.
        source: what an error should call the column.
        depth_range: what becomes black and what white where the pictures are no 8-bit colour.
        is_depth: they are depth maps, whatever their bits.
    """

    def __init__(
        self,
        values: pa.ChunkedArray,
        root: Path,
        source: str,
        depth_range: DepthRange | None = None,
        is_depth: bool = False,
    ) -> None:
        if not (pa.types.is_struct(values.type) and values.type.get_field_index("bytes") >= 0):
            raise UserError(f"{source}: expected pictures as structs of bytes and path, got {values.type}")
        self._values, self._root, self._source = values, root, source
        self._depth_range, self._is_depth = depth_range, is_depth

    def read(self, rows: Sequence[int]) -> UInt8[np.ndarray, "n h w 3"]:
        """The pictures of some rows as (n, H, W, 3) uint8 RGB."""
        pictures = [self._decode(row) for row in rows]
        sizes = sorted({picture.shape[:2] for picture in pictures})
        if len(sizes) > 1:
            raise UserError(f"{self._source}: pictures of different sizes, {sizes}")
        return np.stack(pictures) if pictures else self._decode(0)[None][:0]

    def is_deep(self, row: int) -> bool:
        """Whether a picture has one channel of more than 8 bits, by its header."""
        with self._opened(row) as picture:
            return is_deep(picture)

    def _decode(self, row: int) -> UInt8[np.ndarray, "h w 3"]:
        with self._opened(row) as picture:
            return picture_to_rgb(picture, self._depth_range, is_depth=self._is_depth)

    @contextmanager
    def _opened(self, row: int) -> Iterator[Image.Image]:
        """A picture of which only the header is read; what goes wrong from here on names its row."""
        stored: dict[str, Any] = self._values[row].as_py() or {}
        try:
            if stored.get("bytes") is not None:
                refuse_lfs_pointer("the picture", stored["bytes"])
                file: io.BytesIO | Path = io.BytesIO(stored["bytes"])
            elif stored.get("path"):
                beneath = (self._root / stored["path"]).resolve()
                if not beneath.is_relative_to(self._root.resolve()):
                    raise UserError(f"{stored['path']} lies outside the data set")
                refuse_lfs_pointer(beneath)
                file = beneath
            else:
                raise UserError("neither bytes nor a path")
            with Image.open(file) as picture:
                yield picture
        except UserError as error:
            raise UserError(f"{self._source}, row {row}: {error}") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{self._source}, row {row}: not a readable picture ({error})") from error


Columns = dict[str, np.ndarray]


class LeRobotReader(Sequence[Any]):  # of dict, but run-time type checks would decode an item at every call
    """A LeRobot data set on disk, frame by frame or episode by episode.

    `reader[i]` is frame i of the data set as a dict with LeRobot's own keys: numbers as numpy arrays or scalars
    (`action`, `observation.state`, `timestamp`, `frame_index`, `episode_index`, `index`, `task_index`), each camera
    as (H, W, 3) uint8 RGB, and `task`, the instruction in words.

    Args:
        root: the data set's folder, the one that holds meta/info.json.
        depth_range: reads depth maps as cameras, too: (MIN, MAX) in the numbers they store, or in the data set's unit
            of depth where info.json says how they are coded, become black and white.

    Attributes:
        fps: rows per second.
        features: info.json's description of every column and camera.
        camera_keys: the cameras, stored as video or as pictures in the tables, in info.json's order; with a
            `depth_range`, the depth maps among them.
        depth_keys: the cameras that are depth maps (LeRobot's `is_depth_map`, or pixels of deep grey).
        episodes: one `EpisodeInfo` per episode, in the order of their rows. Their numbers may have gaps: an episode is
            named by `index`, never by its place in this list.
        tasks: the task table, number -> text.
    """

    def __init__(self, root: str | os.PathLike[str], *, depth_range: Sequence[float | int] | None = None) -> None:
        self.root = Path(root)
        self.depth_range: DepthRange | None = checked_range(depth_range)
        self.metadata = read_metadata(self.root)
        self.fps = self.metadata.fps
        self.features: dict[str, dict[str, Any]] = self.metadata.info["features"]
        self.tasks = self.metadata.tasks
        self._tables = EpisodeTables(self.metadata)
        self._instructions = Instructions(self.metadata, self._tables)
        self.episodes: list[EpisodeInfo] = [
            RecordedEpisode(row.index, row.length, row.metadata, self._instructions)
            for row in self.metadata.episodes.values()
        ]
        self._starts = np.cumsum([0] + [episode.length for episode in self.episodes]).tolist()
        self._pictures: LastUsed[tuple[Path, str], PictureColumn] = LastUsed(4)
        self._videos: LastUsed[Path, VideoFile] = LastUsed(64)
        self._clocks: LastUsed[Path, pa.Table] = LastUsed(64)
        self._frames_of_rows: LastUsed[tuple[int, str], range | np.ndarray] = LastUsed(2**16)
        self._shared: set[str] = set()
        cameras = [key for key, feature in self.metadata.features.items() if feature.is_camera]
        self.depth_keys = [key for key in cameras if self._is_depth(key)]
        self.camera_keys = [key for key in cameras if self.depth_range or key not in self.depth_keys]

    @property
    def version(self) -> str:
        """The data set's format version, as info.json has it."""
        return self.metadata.version

    @property
    def instruction_source(self) -> InstructionSource:
        """Where the episodes' `task` comes from: "task_index", the rows with the task table; "tasks", the episodes'
        own lists; "none"."""
        return self._instructions.source

    @property
    def num_episodes(self) -> int:
        """Number of episodes."""
        return len(self.episodes)

    def channel_names(self, key: str) -> tuple[str, ...]:
        """One name per channel of a column: info.json's, or `<key>_<i>` where it names none or another number."""
        if key not in self.features:
            raise UserError(f"{self.root}: no feature {key!r}; there are {sorted(self.features)}")
        return self.metadata.features[key].channel_names(key)

    def frame_size(self, camera: str) -> tuple[int, int]:
        """(H, W) of a camera as info.json has them: by the names of its axes, else with the channels last or first."""
        self.require_camera(camera)
        feature = self.metadata.features[camera]
        shape, names = feature.shape, flat_names(feature.names)
        if len(shape) not in (2, 3):
            raise UserError(f"{self.root}: {camera}: expected a shape of two or three numbers, got {list(shape)}")
        if {"height", "width"} <= set(names) and len(names) == len(shape):
            return shape[names.index("height")], shape[names.index("width")]
        return (shape[0], shape[1]) if len(shape) == 2 or shape[2] <= 4 else (shape[1], shape[2])

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
        item["task"] = self.tasks.get(int(np.ravel(item.get("task_index", -1))[0])) or episode.task
        return item

    def episode(self, index: int, keys: Sequence[str] | None = None) -> Columns:
        """Columns of one episode, each (T, ...): numbers in the dtype info.json gives them, else Python's objects.

        Only these columns are read and checked, whatever else the table holds.

        Args:
            index: the episode's number.
            keys: the columns; None for all but the cameras.
        """
        self._row(index)
        features = self.metadata.features
        columns = [key for key, feature in features.items() if not feature.is_camera]
        if unknown := sorted(set(keys or ()) - set(columns)):
            raise UserError(f"{self.root}: no columns {unknown}; there are {columns}")
        if keys is None:
            return self._tables.columns(index, columns, optional=frozenset({"task_index"}))
        return self._tables.columns(index, keys)

    def frames(self, episode: int, camera: str, frames: Sequence[int] | None = None) -> UInt8[np.ndarray, "n h w 3"]:
        """Frames of one camera in one episode, by their number in the episode; None for all.

        Returns:
            (n, H, W, 3) uint8 RGB.
        """
        length = self._row(episode).length
        wanted = range(length) if frames is None else [int(frame) for frame in frames]
        if len(wanted) and not 0 <= min(wanted) <= max(wanted) < length:
            raise UserError(
                f"{self.root}: episode {episode} has frames 0..{length - 1}, asked for {min(wanted)}..{max(wanted)}"
            )
        self.require_camera(camera)
        if self.features[camera]["dtype"] == "image":
            path = self.metadata.table_of(episode)
            pictures = self._pictures.get_or_make((path, camera), lambda: self._read_pictures(path, camera))
            rows = self._frames_of_rows.get_or_make((episode, camera), lambda: self._picture_rows(episode, camera))
            return pictures.read([rows[frame] for frame in wanted])
        path = self.video_path(episode, camera)
        try:
            video = self._videos.get_or_make(path, lambda: VideoFile(path))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; {NEVER_RECORDED}") from error
        rows = self._frames_of_rows.get_or_make((episode, camera), lambda: self._pair_rows(video, episode, camera))
        is_depth = camera in self.depth_keys
        codes = depth_codes(self.features[camera], f"{self.root / 'meta/info.json'}, {camera}") if is_depth else None
        return video.read([int(rows[row]) for row in wanted], self.depth_range, is_depth=is_depth, codes=codes)

    def data_path(self, episode: int) -> Path:
        """The table that holds an episode's rows (in v3.0 with those of other episodes)."""
        self._row(episode)
        return self.metadata.table_of(episode)

    def video_path(self, episode: int, camera: str) -> Path:
        """The video file that holds one camera's frames of one episode (in v3.0 with those of other episodes)."""
        self._row(episode)
        self.require_camera(camera)
        if self.features[camera]["dtype"] != "video":
            raise UserError(f"{self.root}: {camera} has no video; its pictures stand in the tables")
        return self.metadata.video_of(episode, camera)

    def require_camera(self, camera: str) -> None:
        """Raises UserError where there is no such camera, or it is a depth map and no `depth_range` was given."""
        if camera not in self.camera_keys:
            if camera in self.depth_keys:
                raise UserError(f"{self.root}: {camera!r} is a depth map, no colour; {HOW_TO_ASK}")
            raise UserError(f"{self.root}: no camera {camera!r}; there are {self.camera_keys}")

    def _pair_rows(self, video: VideoFile, episode: int, camera: str) -> range | np.ndarray:
        """Which frame of the video each row of an episode shows."""
        source = f"{self.metadata.table_of(episode)}, episode {episode}, {camera}"
        span_s = self.metadata.video_span_s(episode, camera)
        frames = pair_rows(video, self._row_times_s(episode, source), self.fps, *span_s, source)
        if camera not in self._shared and (np.diff(frames) == 0).any():
            self._shared.add(camera)
            log.warning("%s: shows %.4g frames a second for %.4g rows, which share them", source, video.fps, self.fps)
        return frames

    def _picture_rows(self, episode: int, camera: str) -> range:
        """Which rows of its table an episode's pictures stand in: its own, whose clock is checked all the same."""
        self._row_times_s(episode, f"{self.metadata.table_of(episode)}, episode {episode}, {camera}")
        rows = self._tables.rows(episode)
        return range(rows.first, rows.last)

    def _row_times_s(self, episode: int, source: str) -> np.ndarray:
        """When each row of an episode was recorded."""
        path, length = self.metadata.table_of(episode), self._row(episode).length
        read = self._tables.read
        table = self._clocks.get_or_make(path, lambda: read(path, ["timestamp"], optional=frozenset({"timestamp"})))
        timestamps = None
        if "timestamp" in table.column_names:
            timestamps = table["timestamp"].slice(self._tables.rows(episode).first, length)
        return row_times_s(timestamps, length, self.fps, source)

    def _is_depth(self, camera: str) -> bool:
        """Whether info.json says so or, where it says one channel only, the first picture does."""
        feature = self.features[camera]
        if is_depth_feature(feature) or feature["dtype"] != "image" or 3 in feature["shape"]:
            return is_depth_feature(feature)
        path = self.metadata.table_of(self.episodes[0].index)
        try:
            batch = next(pq.ParquetFile(path).iter_batches(1, columns=[camera]))
            return PictureColumn(pa.chunked_array(batch[camera]), self.root, "").is_deep(0)
        except (UserError, OSError, pa.ArrowException, KeyError, StopIteration):
            return False  # whoever reads the pictures is told what is wrong with them

    def _row(self, index: int) -> EpisodeRow:
        episodes = self.metadata.episodes
        if index not in episodes:
            raise UserError(
                f"{self.root}: no episode {index}; there are {len(episodes)}, numbered {number_ranges(episodes)}"
            )
        return episodes[index]

    def _read_pictures(self, path: Path, camera: str) -> PictureColumn:
        is_depth = camera in self.depth_keys
        table = self._tables.read(path, [camera], optional=frozenset({camera}))
        if camera not in table.column_names:
            raise UserError(f"{path}: no column {camera!r}, though info.json lists it; {NEVER_RECORDED}")
        return PictureColumn(table[camera], self.root, f"{path}, {camera}", self.depth_range, is_depth)
