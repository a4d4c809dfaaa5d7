"""What LeRobot data sets of version 2.1 and 3.0 look like on disk: names, paths, feature descriptions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from repvitok.errors import UserError

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
