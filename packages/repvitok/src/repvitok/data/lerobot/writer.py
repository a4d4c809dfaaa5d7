"""Writes LeRobot data sets, version 2.1 or 3.0, an episode at a time from any number of processes; completes them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8

from repvitok.data.lerobot.format import (
    CHUNK_EPISODES,
    DATA_FILE_MB,
    DATA_PATH,
    EPISODES_PATH,
    INDEX_FEATURES,
    RESERVED_EPISODE_KEYS,
    VIDEO_FILE_MB,
    VIDEO_PATH,
    arrow_type,
    camera_feature,
    huggingface_metadata,
    number_feature,
)
from repvitok.data.video import concatenate_videos, write_video
from repvitok.runtime.documents import Count, load_json_lines, parse, read_json, read_json_lines
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import atomic_file, write_json_atomic, write_text_atomic


class LeRobotWriter:
    """Writes a LeRobot data set that LeRobot itself loads.

    Episodes are written to files of their own, each finished by the rename of its parquet file, so several processes
    may add different episodes to one folder at once, and a killed run is continued by adding those for which
    `episode_exists` is False. `finalize` then writes the meta files (2.1) or joins the episodes into few files (3.0).

    Args:
        root: the folder; created.
        version: "v2.1" or "v3.0".
        fps: frames (and rows) per second.
        cameras: camera key -> (height, width), e.g. {"observation.images.top": (96, 96)}.
        state_names: names of the channels of `observation.state`; empty for no state.
        action_names: names of the channels of `action`; empty for no actions.
        robot_type: what info.json calls the robot.
        crf, gop, pix_fmt: quality, key frame distance and colour of the videos, see `write_video`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        version: str = "v2.1",
        fps: float | int,
        cameras: Mapping[str, tuple[int, int]],
        state_names: Sequence[str],
        action_names: Sequence[str],
        robot_type: str,
        crf: int = 18,
        gop: int = 8,
        pix_fmt: str = "yuv420p",
    ) -> None:
        if version not in DATA_PATH:
            raise UserError(f"version must be one of {sorted(DATA_PATH)}, got {version!r}")
        if fps <= 0:
            raise UserError(f"fps must be positive, got {fps}")
        self.root, self.version, self.robot_type = Path(root), version, robot_type
        self.fps = int(fps) if float(fps).is_integer() else float(fps)  # info.json says 30, not 30.0
        self._video = {"crf": crf, "gop": gop, "pix_fmt": pix_fmt}
        self._cameras = {key: (int(height), int(width)) for key, (height, width) in cameras.items()}
        self._numbers: dict[str, dict[str, Any]] = {}
        if state_names:
            self._numbers["observation.state"] = number_feature("float32", [len(state_names)], state_names)
        if action_names:
            self._numbers["action"] = number_feature("float32", [len(action_names)], action_names)
        self._files = DataSetOnDisk(self.root, version)

    def add_episode(
        self,
        index: int,
        *,
        frames: Mapping[str, UInt8[np.ndarray, "frames height width 3"]],
        task: str,
        state: np.ndarray | None = None,
        action: np.ndarray | None = None,
        extra: Mapping[str, np.ndarray] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes one episode, replacing what a killed attempt at it left.

        Args:
            index: the episode's number; the numbers 0..n-1 must all be there when `finalize` is called.
            frames: camera key -> (T, H, W, 3) uint8 RGB.
            task: the instruction.
            state: (T, S) observed with each frame.
            action: (T, C), row i executed after frame i.
            extra: more columns, name -> (T,) or (T, ...) of float32, int64 or bool, e.g. {"next.success": ...}.
            metadata: JSON values about the whole episode, kept in its row of the episodes table, e.g. {"seed": 3}.
        """
        self._files.refuse_if_joined()
        columns, length = self._columns(index, frames, state, action, extra or {})
        taken = sorted(key for key in metadata or {} if key in RESERVED_EPISODE_KEYS or "/" in key)
        if taken:
            raise UserError(f"metadata {taken}: these names belong to the format, or hold a '/'; choose others")
        features = dict(self._numbers)
        for key in extra or {}:
            features[key] = number_feature(str(columns[key].dtype), columns[key].shape[1:] or [1], None)
            arrow_type(features[key])  # refuses types that the format has not
        for key, pixels in frames.items():
            write_video(self._files.video_path(index, key), pixels, self.fps, **self._video)
        record = {
            "episode_index": index,
            "length": length,
            "task": task,
            "metadata": dict(metadata or {}),
            "features": self._features(features),
            "image_stats": {key: image_statistics(pixels) for key, pixels in frames.items()},
        }
        write_json_atomic(self._files.record_path(index), record)
        columns |= {
            "timestamp": (np.arange(length) / self.fps).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, index),
            "index": np.arange(length),  # known only once all episodes are there: `finalize` sets it
            "task_index": np.zeros(length, dtype=np.int64),
        }
        _write_table(self._files.data_path(index), columns, self._features(features))

    def episode_exists(self, index: int) -> bool:
        """Whether this episode is completely written."""
        return self._files.has_episode(index)

    def finalize(self) -> None:
        """Makes the folder a complete data set; calling it again changes nothing."""
        common = {"robot_type": self.robot_type, "fps": self.fps, "chunks_size": CHUNK_EPISODES}
        if self.version == "v2.1":
            finish_v21(self._files, common)
        else:
            consolidate_v30(self._files, common)

    def _features(self, numbers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        cameras = {key: camera_feature(*size, self.fps, self._video["pix_fmt"]) for key, size in self._cameras.items()}
        counters = {key: number_feature(dtype, [1], None) for key, dtype in INDEX_FEATURES.items()}
        return {**numbers, **cameras, **counters}

    def _columns(
        self,
        index: int,
        frames: Mapping[str, np.ndarray],
        state: np.ndarray | None,
        action: np.ndarray | None,
        extra: Mapping[str, np.ndarray],
    ) -> tuple[dict[str, np.ndarray], int]:
        """The columns of an episode's numbers, and its length, which all of them and the cameras have."""
        columns: dict[str, np.ndarray] = {}
        for key, values in (("observation.state", state), ("action", action)):
            if (values is not None) != (key in self._numbers):
                named = "names its channels" if key in self._numbers else "has no channels of it"
                raise UserError(f"{key}: the data set {named}, but add_episode got {type(values).__name__}")
            if values is not None:
                columns[key] = np.asarray(values, dtype=np.float32)
                expected = tuple(self._numbers[key]["shape"])
                if columns[key].shape[1:] != expected:
                    raise UserError(f"{key}: expected (T, {expected[0]}), got {columns[key].shape}")
        taken = sorted({*columns, *self._cameras, *INDEX_FEATURES, "task"} & set(extra))
        if taken:
            raise UserError(f"extra columns {taken} have names that the format itself uses")
        columns |= {key: np.asarray(values) for key, values in extra.items()}
        if index < 0:
            raise UserError(f"an episode's number must be 0 or more, got {index}")
        if set(frames) != set(self._cameras):
            raise UserError(f"episode {index}: expected cameras {sorted(self._cameras)}, got {sorted(frames)}")
        for key, pixels in frames.items():
            if pixels.shape[1:] != (*self._cameras[key], 3):
                raise UserError(f"episode {index}: {key} must be (T, {self._cameras[key]}, 3), got {pixels.shape}")
        lengths = {key: len(values) for key, values in {**frames, **columns}.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise UserError(f"episode {index}: all columns and cameras need one length above 0, got {lengths}")
        return columns, next(iter(lengths.values()))


def _write_table(path: Path, columns: Mapping[str, np.ndarray], features: Mapping[str, Any]) -> None:
    numbers = {key: feature for key, feature in features.items() if feature["dtype"] != "video"}
    schema = pa.schema(
        [(key, arrow_type(feature)) for key, feature in numbers.items()],
        metadata={"huggingface": json.dumps(huggingface_metadata(numbers))},
    )
    arrays = []
    for key, feature in numbers.items():
        array = pa.array(np.ascontiguousarray(columns[key].astype(feature["dtype"], copy=False)).reshape(-1))
        for size in reversed(feature["shape"] if list(feature["shape"]) != [1] else []):
            array = pa.FixedSizeListArray.from_arrays(array, size)
        arrays.append(array)
    with atomic_file(path) as partial:
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), partial)


Statistics = dict[str, Any]


def column_statistics(values: np.ndarray) -> Statistics:
    """min, max, mean and std over the rows of one column, as JSON lists, with count = [rows]."""
    rows = values.reshape(len(values), -1) if values.ndim == 1 else values
    exact = rows.astype(np.int64 if rows.dtype.kind in "iub" else np.float64)
    return {
        "min": exact.min(0).tolist(),
        "max": exact.max(0).tolist(),
        "mean": exact.mean(0).tolist(),
        "std": exact.std(0).tolist(),
        "count": [len(rows)],
    }


def image_statistics(frames: UInt8[np.ndarray, "n h w 3"]) -> Statistics:
    """Per colour over a sample of frames, in [0, 1], shaped (3, 1, 1); count = [frames sampled].

    As LeRobot does: n**0.75 frames, at least 100, evenly spread.
    """
    count = min(len(frames), max(100, int(len(frames) ** 0.75)))
    sample = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    statistics: Statistics = {"min": [], "max": [], "mean": [], "std": [], "count": [count]}
    values = np.arange(256) / 255.0
    for colour in range(3):
        often = np.bincount(sample[..., colour].ravel(), minlength=256)  # how often each byte occurs
        present, share = np.flatnonzero(often), often / often.sum()
        mean = float(share @ values)
        std = float(np.sqrt(share @ np.square(values - mean)))
        found = {"min": float(values[present[0]]), "max": float(values[present[-1]]), "mean": mean, "std": std}
        for key, value in found.items():
            statistics[key].append([[value]])
    return statistics


def pooled_statistics(parts: Sequence[Mapping[str, Any]]) -> Statistics:
    """The statistics of several parts together, from each part's own.

    mean = sum n_i m_i / n and var = sum n_i (var_i + (m_i - mean)^2) / n.
    """
    counts = np.array([part["count"][0] for part in parts], dtype=np.float64)
    means = np.array([part["mean"] for part in parts], dtype=np.float64)
    weight = (counts / counts.sum()).reshape(-1, *[1] * (means.ndim - 1))
    mean = (weight * means).sum(0)
    variance = (weight * (np.square([part["std"] for part in parts]) + np.square(means - mean))).sum(0)
    return {
        "min": np.min([part["min"] for part in parts], 0).tolist(),
        "max": np.max([part["max"] for part in parts], 0).tolist(),
        "mean": mean.tolist(),
        "std": np.sqrt(variance).tolist(),
        "count": [int(counts.sum())],
    }


Record = dict[str, Any]


@dataclass(frozen=True)
class _Info:
    """What is used of the info.json that ended an earlier writing."""

    total_episodes: Count
    features: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class _Pending:
    """What the writer notes of an episode."""

    episode_index: Count
    length: Count
    task: str
    metadata: dict[str, Any]
    features: dict[str, dict[str, Any]]
    image_stats: dict[str, Any]


@dataclass(frozen=True)
class _Line:
    """Of an episode in episodes.jsonl; `metadata` is what else stands there."""

    episode_index: Count
    length: Count
    tasks: Annotated[list[str], msgspec.Meta(min_length=1)]


@dataclass(frozen=True)
class _StatisticsLine:
    """Of an episode in episodes_stats.jsonl."""

    stats: dict[str, Any]


class DataSetOnDisk:
    """Where the files of episodes being written lie: in place (2.1), or in a staging folder until joined (3.0)."""

    def __init__(self, root: Path, version: str) -> None:
        self.root, self.version = root, version
        self.episodes_root = root if version == "v2.1" else root / "staging"

    def data_path(self, index: int) -> Path:
        """The parquet file of one episode; its presence marks the episode complete."""
        place = {"episode_chunk": index // CHUNK_EPISODES, "episode_index": index}
        return self.episodes_root / DATA_PATH["v2.1"].format(**place)

    def video_path(self, index: int, camera: str) -> Path:
        """The video of one episode and camera."""
        place = {"episode_chunk": index // CHUNK_EPISODES, "episode_index": index, "video_key": camera}
        return self.episodes_root / VIDEO_PATH["v2.1"].format(**place)

    def record_path(self, index: int) -> Path:
        """What is known of one episode beside its files, until the meta files hold it."""
        return self.episodes_root / "meta/pending" / f"episode_{index:06d}.json"

    @property
    def info(self) -> _Info | None:
        """The finished data set's info.json, or None while there is none."""
        path = self.root / "meta/info.json"
        return read_json(path, _Info, unknown=True) if path.is_file() else None

    def refuse_if_joined(self) -> None:
        """v3.0 episodes share files once joined; adding to them is another tool's job."""
        if self.version == "v3.0" and self.info:
            raise UserError(f"{self.root} is a finished v3.0 data set; write new episodes to another folder")

    def has_episode(self, index: int) -> bool:
        """Whether an episode is completely written, joined or not."""
        info = self.info if self.version == "v3.0" else None
        return index < info.total_episodes if info else self.data_path(index).is_file()

    def records(self) -> list[Record]:
        """Everything known about each complete episode, in order, from pending records and earlier meta files."""
        paths = sorted((self.episodes_root / "meta/pending").glob("episode_*.json"))
        pending = [dict(vars(read_json(path, _Pending))) for path in paths]
        pending = [record for record in pending if self.data_path(record["episode_index"]).is_file()]
        found = {record["episode_index"]: record for record in [*self._finished_records(), *pending]}
        if not found:
            raise UserError(f"{self.root}: no complete episode to make a data set of")
        missing = sorted(set(range(max(found) + 1)) - set(found))
        if missing:
            raise UserError(f"{self.root}: episodes {missing[:10]} are missing; write them before finalizing")
        ordered = [found[index] for index in sorted(found)]
        for record in ordered:
            if record["features"] != ordered[0]["features"]:
                raise UserError(
                    f"{self.root}: episode {record['episode_index']} has other columns or camera sizes than episode 0"
                )
        return ordered

    def _finished_records(self) -> list[Record]:
        info = self.info
        if self.version != "v2.1" or not info:
            return []
        rows = [(line, source) for source, line in load_json_lines(self.root / "meta/episodes.jsonl")]
        stats = read_json_lines(self.root / "meta/episodes_stats.jsonl", _StatisticsLine, unknown=True)
        cameras = [key for key, feature in info.features.items() if feature.get("dtype") == "video"]
        if len(rows) != len(stats) or any(key not in line.stats for line in stats for key in cameras):
            raise UserError(f"{self.root}: episodes.jsonl and episodes_stats.jsonl are not of the same episodes")
        records = []
        for (row, source), line in zip(rows, stats, strict=True):
            known = parse(row, _Line, source, unknown=True)
            record = {"episode_index": known.episode_index, "length": known.length, "task": known.tasks[0]}
            record["metadata"] = {key: row[key] for key in row if key not in vars(known)}
            record["image_stats"] = {key: line.stats[key] for key in cameras}
            records.append({**record, "features": info.features})
        return records


def finish_v21(files: DataSetOnDisk, common: Mapping[str, Any]) -> None:
    """Sets the global index of every row, then writes tasks, episodes, their statistics and, last, info.json."""
    records, meta = files.records(), files.root / "meta"
    tasks = _tasks(records)
    rows, stats, start = [], [], 0
    for record in records:
        path = files.data_path(record["episode_index"])
        table = _indexed_table(path, record, start, tasks)
        _replace_table(path, table)
        start += record["length"]
        described = {"episode_index": record["episode_index"], "tasks": [record["task"]], "length": record["length"]}
        rows.append({**described, **record["metadata"]})
        stats.append({"episode_index": record["episode_index"], "stats": _episode_statistics(table, record)})
    _write_jsonl(meta / "tasks.jsonl", [{"task_index": i, "task": task} for task, i in tasks.items()])
    _write_jsonl(meta / "episodes.jsonl", rows)
    _write_jsonl(meta / "episodes_stats.jsonl", stats)
    cameras = records[0]["image_stats"]
    totals = {
        "total_videos": len(records) * len(cameras),
        "total_chunks": -(-len(records) // CHUNK_EPISODES),
    }
    write_json_atomic(meta / "info.json", _info("v2.1", common, records, start, len(tasks), totals))
    shutil.rmtree(meta / "pending", ignore_errors=True)


def consolidate_v30(files: DataSetOnDisk, common: Mapping[str, Any]) -> None:
    """Joins the staged episodes into few parquet and video files; info.json, written last, marks it done."""
    if not files.info:
        records = files.records()
        tasks = _tasks(records)
        starts = np.cumsum([0] + [record["length"] for record in records]).tolist()
        tables = [
            _indexed_table(files.data_path(record["episode_index"]), record, start, tasks)
            for record, start in zip(records, starts, strict=False)
        ]
        stats = [_episode_statistics(table, record) for table, record in zip(tables, records, strict=True)]
        rows = _episode_rows(records, starts)
        for number, group in enumerate(_groups_by_size([table.nbytes for table in tables], DATA_FILE_MB)):
            place = _file_place(number)
            joined = pa.concat_tables([tables[episode] for episode in group])
            _replace_table(files.root / DATA_PATH["v3.0"].format(**place), joined)
            for episode in group:
                rows[episode] |= {f"data/{key}": value for key, value in place.items()}
        for camera in records[0]["image_stats"]:
            _join_videos(files, records, camera, common["fps"], rows)
        place = _file_place(0)
        for row, stat in zip(rows, stats, strict=True):
            row |= {f"stats/{key}/{name}": value for key, part in stat.items() for name, value in part.items()}
            row |= {f"meta/episodes/{key}": value for key, value in place.items()}
        table = pa.table({key: [row[key] for row in rows] for key in rows[0]})
        _replace_table(files.root / EPISODES_PATH.format(**place), table)
        _write_tasks(files.root / "meta/tasks.parquet", tasks)
        pooled = {key: pooled_statistics([part[key] for part in stats]) for key in stats[0]}
        write_json_atomic(files.root / "meta/stats.json", pooled)
        totals = {"data_files_size_in_mb": DATA_FILE_MB, "video_files_size_in_mb": VIDEO_FILE_MB}
        info = _info("v3.0", common, records, starts[-1], len(tasks), totals)
        write_json_atomic(files.root / "meta/info.json", info)
    shutil.rmtree(files.episodes_root, ignore_errors=True)


def _tasks(records: Sequence[Record]) -> dict[str, int]:
    """Instruction -> its number, in order of first use."""
    return {task: number for number, task in enumerate(dict.fromkeys(record["task"] for record in records))}


def _info(
    version: str,
    common: Mapping[str, Any],
    records: Sequence[Record],
    frames: int,
    tasks: int,
    totals: Mapping[str, Any],
) -> dict[str, Any]:
    features = {key: dict(feature) for key, feature in records[0]["features"].items()}
    if version == "v3.0":
        for feature in features.values():
            if feature["dtype"] != "video":
                feature["fps"] = common["fps"]
    return {
        "codebase_version": version,
        **common,
        "total_episodes": len(records),
        "total_frames": frames,
        "total_tasks": tasks,
        **totals,
        "splits": {"train": f"0:{len(records)}"},
        "data_path": DATA_PATH[version],
        "video_path": VIDEO_PATH[version],
        "features": features,
    }


def _indexed_table(path: Path, record: Record, start: int, tasks: Mapping[str, int]) -> pa.Table:
    table = pq.read_table(path)
    columns = {
        "index": np.arange(start, start + record["length"]),
        "task_index": np.full(record["length"], tasks[record["task"]]),
    }
    for key, values in columns.items():
        table = table.set_column(table.schema.get_field_index(key), key, pa.array(values, pa.int64()))
    return table


def _replace_table(path: Path, table: pa.Table) -> None:
    with atomic_file(path) as partial:
        pq.write_table(table, partial)


def _episode_statistics(table: pa.Table, record: Record) -> dict[str, Statistics]:
    stats = {}
    for key, feature in record["features"].items():
        if feature["dtype"] == "video":
            stats[key] = record["image_stats"][key]
        else:
            values = table[key].combine_chunks()
            while pa.types.is_fixed_size_list(values.type):
                values = values.flatten()
            rows = values.to_numpy(zero_copy_only=False).reshape(record["length"], *feature["shape"])
            stats[key] = column_statistics(rows)
    return stats


def _episode_rows(records: Sequence[Record], starts: Sequence[int]) -> list[dict[str, Any]]:
    keys = dict.fromkeys(key for record in records for key in record["metadata"])
    return [
        {
            "episode_index": record["episode_index"],
            "dataset_from_index": start,
            "dataset_to_index": start + record["length"],
            "tasks": [record["task"]],
            "length": record["length"],
            **{key: record["metadata"].get(key) for key in keys},
        }
        for record, start in zip(records, starts, strict=False)
    ]


def _join_videos(
    files: DataSetOnDisk, records: Sequence[Record], camera: str, fps: float | int, rows: list[dict[str, Any]]
) -> None:
    clips = [files.video_path(record["episode_index"], camera) for record in records]
    for number, group in enumerate(_groups_by_size([clip.stat().st_size for clip in clips], VIDEO_FILE_MB)):
        place = _file_place(number)
        lengths = [records[episode]["length"] for episode in group]
        path = files.root / VIDEO_PATH["v3.0"].format(**place, video_key=camera)
        concatenate_videos([clips[episode] for episode in group], path, lengths, fps)
        first = np.cumsum([0, *lengths]).tolist()
        for position, episode in enumerate(group):
            times = {"from_timestamp": first[position] / fps, "to_timestamp": first[position + 1] / fps}
            rows[episode] |= {f"videos/{camera}/{key}": value for key, value in {**place, **times}.items()}


def _groups_by_size(sizes_bytes: Sequence[int], limit_mb: float | int) -> list[list[int]]:
    """Consecutive numbers, a new group wherever the next size would carry the sum over the limit."""
    groups: list[list[int]] = []
    filled = 0
    for number, size in enumerate(sizes_bytes):
        if not groups or filled + size > limit_mb * 1e6:
            groups.append([])
            filled = 0
        groups[-1].append(number)
        filled += size
    return groups


def _file_place(number: int) -> dict[str, int]:
    return {"chunk_index": number // CHUNK_EPISODES, "file_index": number % CHUNK_EPISODES}


def _write_tasks(path: Path, tasks: Mapping[str, int]) -> None:
    """The task table, with the pandas metadata that makes `task` its index (LeRobot looks tasks up by it)."""
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [{"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object"}],
        "columns": [
            {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
            {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object"},
        ],
        "pandas_version": "2.3.3",
    }
    for column in [*pandas["column_indexes"], *pandas["columns"]]:
        column["metadata"] = None
    table = pa.table({"task_index": pa.array(tasks.values(), pa.int64()), "task": pa.array(tasks.keys(), pa.string())})
    _replace_table(path, table.replace_schema_metadata({"pandas": json.dumps(pandas)}))


def _write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
