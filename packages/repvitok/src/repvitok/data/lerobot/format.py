"""What LeRobot data sets of version 2.1 and 3.0 look like on disk: names, paths, feature descriptions."""

from __future__ import annotations

import math
import os
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import pyarrow as pa

from repvitok.runtime.errors import UserError

CHUNK_EPISODES = 1000
DATA_FILE_MB, VIDEO_FILE_MB = 100, 200

DATA_PATH = {
    "v2.1": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "v3.0": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
}
VIDEO_PATH = {
    "v2.1": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    "v3.0": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
RESERVED_EPISODE_KEYS = frozenset({"episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index"})
EPISODES_PATH = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"

INDEX_FEATURES: dict[str, str] = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}

CAMERA_DTYPES = frozenset({"video", "image"})
NUMBER_DTYPES = frozenset(
    {"bool", "float16", "float32", "float64", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}
)
ROBOT_COLUMNS = ("action", "observation.state")
MAX_ROW_NUMBERS = 2**22
"""A column of more numbers a row is refused: a mistake in info.json, not a recording."""

_Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_ROW_NUMBERS)]
_PLACEHOLDERS = ("episode_chunk", "episode_index", "chunk_index", "file_index", "video_key")
_WIDTH = re.compile(r"(0?[0-9]{1,2})?d?")


@dataclass(frozen=True)
class EpisodeInfo:
    """One episode of a data set.

    Attributes:
        index: its number in the data set.
        length: frames.
        task: the instruction, in words ("" where the data set has none).
        metadata: what else its row in the episodes table says (a seed, a success flag, ...).
    """

    index: int
    length: int
    task: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Feature:
    """One column or camera, as info.json describes it.

    Attributes:
        dtype: a number's, in numpy's words; "video" or "image" for a camera; anything else (strings, language) is
            handed on as the table has it.
        shape: of one row. () where the dtype is neither a number's nor a camera's.
        names: of its channels or axes, in any form that `flat_names` knows.
    """

    dtype: str
    shape: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=1, le=MAX_ROW_NUMBERS)], ...], msgspec.Meta(max_length=8)
    ] = ()
    names: Any = None

    def __post_init__(self) -> None:
        if self.is_number and math.prod(self.shape) > MAX_ROW_NUMBERS:
            raise UserError(f"field 'shape': expected at most {MAX_ROW_NUMBERS} numbers a row, got {self.shape}")
        flat_names(self.names)

    @property
    def is_number(self) -> bool:
        """Whether it is a column of numbers."""
        return self.dtype in NUMBER_DTYPES

    @property
    def is_camera(self) -> bool:
        """Whether it is a camera, stored as video or as pictures in the tables."""
        return self.dtype in CAMERA_DTYPES

    def channel_names(self, key: str) -> tuple[str, ...]:
        """One name per number: its own, or `<key>_<i>` where there are none, another number of them, or one twice."""
        size = math.prod(self.shape)
        names = flat_names(self.names)
        distinct = len(set(names)) == len(names) == size and all(name.strip() for name in names)
        return names if distinct else tuple(f"{key}_{channel}" for channel in range(size))


class PathTemplate:
    """A path of info.json with placeholders, `data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet`.

    Args:
        text: the path. Every placeholder of version 2 and 3 is known in both.
        source: what an error calls it.

    Attributes:
        names: the placeholders in it.
    """

    def __init__(self, text: str, source: str) -> None:
        self.text, self._source = text, source
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"{source}: expected a path with placeholders, got {text!r} ({error})") from error
        for _, name, form, conversion in parts:
            if name is None:
                continue
            plain = not form if name == "video_key" else _WIDTH.fullmatch(form or "")
            if name not in _PLACEHOLDERS or conversion or not plain:
                raise UserError(
                    f"{source}: expected placeholders {{{'}, {'.join(_PLACEHOLDERS)}}}, numbers at most with a width "
                    f"such as :06d, got {text!r}"
                )
        self.names = frozenset(name for _, name, _, _ in parts if name is not None)

    def fill(self, values: Mapping[str, int | str | None]) -> str:
        """The path with its placeholders filled in, relative to the data set's folder.

        Only the words of the path are judged: where a link on the way leads is the business of whoever set it.
        """
        path = self.text.format(**{name: values[name] for name in self.names})
        parts = re.split(r"[/\\]", path)
        try:
            possible = "\0" not in path and len(path) < 2048 and max(len(os.fsencode(part)) for part in parts) < 256
        except UnicodeEncodeError:
            possible = False
        if not possible or not parts[0] or parts[-1] in ("", ".") or ".." in parts or path[1:2] == ":":
            raise UserError(f"{self._source}: expected a file's path beneath the data set's folder, got {path[:200]!r}")
        return path


def number_ranges(numbers: Iterable[int], most: int = 6) -> str:
    """Some numbers in few words, the first `most` runs of neighbours.

    >>> number_ranges([7, 0, 1, 2, 9, 10]), number_ranges(range(0, 100, 2), most=2), number_ranges([])
    ('0..2, 7, 9, 10', '0, 2, ...', 'none')
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    told = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs[:most]]
    return ", ".join([*told, *(["..."] if len(runs) > most else [])]) or "none"


def flat_names(names: Any) -> tuple[str, ...]:
    """Channel names as one tuple, from any form LeRobot data sets use.

    >>> flat_names([["x", "y"]]), flat_names({"motors": ["x", "y"]}), flat_names({"y": 1, "x": 0}), flat_names(None)
    (('x', 'y'), ('x', 'y'), ('x', 'y'), ())
    """
    if names is None:
        return ()
    if isinstance(names, str):
        return (names,)
    if isinstance(names, Mapping):
        if all(isinstance(value, int) for value in names.values()):
            return tuple(sorted(names, key=names.__getitem__))
        return flat_names(list(names.values()))
    if isinstance(names, Iterable):
        return tuple(name for item in names for name in flat_names(item))
    return (str(names),)


def number_feature(dtype: str, shape: Sequence[int], names: Sequence[str] | None) -> dict[str, Any]:
    """How info.json describes a column of numbers."""
    return {"dtype": dtype, "shape": list(shape), "names": None if names is None else list(names)}


def camera_feature(height: int, width: int, fps: float | int, pix_fmt: str = "yuv420p") -> dict[str, Any]:
    """How info.json describes a camera whose frames are stored as H.264 video."""
    return {
        "dtype": "video",
        "shape": [height, width, 3],
        "names": ["height", "width", "channel"],
        "info": {
            "video.height": height,
            "video.width": width,
            "video.codec": "h264",
            "video.pix_fmt": pix_fmt,
            "video.is_depth_map": False,
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": False,
        },
    }


def arrow_type(feature: Mapping[str, Any]) -> pa.DataType:
    """The parquet column type of a number feature: a scalar for shape (1,), else a (nested) fixed-size list."""
    names = {"float32": pa.float32(), "float64": pa.float64(), "int64": pa.int64(), "int32": pa.int32()}
    names |= {"uint8": pa.uint8(), "bool": pa.bool_()}
    if feature["dtype"] not in names:
        raise UserError(f"a column's dtype must be one of {sorted(names)}, got {feature['dtype']!r}")
    kind = names[feature["dtype"]]
    if list(feature["shape"]) == [1]:
        return kind
    for size in reversed(feature["shape"]):
        kind = pa.list_(kind, size)
    return kind


def huggingface_metadata(features: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The `huggingface` entry of a parquet schema, from which `datasets` restores exact column types."""

    def describe(feature: Mapping[str, Any]) -> dict[str, Any]:
        described: dict[str, Any] = {"dtype": feature["dtype"], "_type": "Value"}
        if list(feature["shape"]) == [1]:
            return described
        for size in reversed(feature["shape"]):
            described = {"feature": described, "length": size, "_type": "Sequence"}
        return described

    return {"info": {"features": {key: describe(value) for key, value in features.items()}}}
