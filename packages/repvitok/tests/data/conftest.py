"""Small recordings in which every frame can be told from every other, and data sets made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from repvitok.data.lerobot.writer import LeRobotWriter

CAMERAS = {"observation.images.top": (32, 48), "observation.images.wrist": (16, 16)}
LENGTHS = (9, 14, 6, 11)
FPS = 20.0


def numbered_frames(count: int, size: tuple[int, int], first: int = 0) -> np.ndarray:
    """(count, H, W, 3): frame i is flat, grey 6 * (first + i) + 8, its left half reddish; H.264 keeps that within 2."""
    grey = (6 * (first + np.arange(count)) + 8).astype(np.uint8)
    frames = np.broadcast_to(grey[:, None, None, None], (count, *size, 3)).copy()
    frames[:, :, : size[1] // 2, 0] = 200
    return frames


def number_of(frame: np.ndarray) -> int:
    """The number written into a frame by `numbered_frames`."""
    return round((float(frame[:, -4:].mean()) - 8) / 6)


def episode(index: int) -> dict:
    """Arguments of `add_episode`: action[i] and state[i] hold 100 * episode + i."""
    length = LENGTHS[index]
    counter = 100.0 * index + np.arange(length)
    return {
        "frames": {key: numbered_frames(length, size, first=10 * index) for key, size in CAMERAS.items()},
        "state": np.stack([counter, -counter, counter / 7], axis=1),
        "action": np.stack([counter, counter * 2], axis=1),
        "task": ("push the button", "open the window")[index % 2],
        "extra": {
            "next.success": np.arange(length) == length - 1,
            "contact": np.arange(length * 4, dtype=np.float32).reshape(length, 4),
        },
        "metadata": {"seed": 7 * index},
    }


def open_writer(root: Path, version: str) -> LeRobotWriter:
    """A writer for `episode`."""
    return LeRobotWriter(
        root,
        version=version,
        fps=FPS,
        cameras=CAMERAS,
        state_names=["x", "y", "z"],
        action_names=["dx", "dy"],
        robot_type="test_arm",
    )


@pytest.fixture(scope="session")
def make_frames() -> Callable[..., np.ndarray]:
    return numbered_frames


@pytest.fixture(scope="session")
def read_number() -> Callable[[np.ndarray], int]:
    return number_of


@pytest.fixture(scope="session")
def make_episode() -> Callable[[int], dict]:
    return episode


@pytest.fixture(scope="session")
def make_writer() -> Callable[[Path, str], LeRobotWriter]:
    return open_writer


@pytest.fixture(scope="session")
def data_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same four episodes in both formats, written out of order."""
    roots = {version: tmp_path_factory.mktemp("lerobot") / version for version in ("v2.1", "v3.0")}
    for version, root in roots.items():
        writer = open_writer(root, version)
        for index in (2, 0, 3, 1):
            writer.add_episode(index, **episode(index))
        writer.finalize()
    return roots


class PlainDataSet:
    """A LeRobot data set without cameras, written by hand so that anything in it can be made wrong.

    Row i of episode e holds action (100 e + i, -100 e - i) and state 100 e + i + 0.5; episode e is told task e modulo
    their number. Everything is float32 and int64, as LeRobot writes it.
    """

    def __init__(
        self, root: Path, version: str, lengths: Mapping[int, int], tasks: tuple[str, ...] = ("open it", "close it")
    ) -> None:
        self.root, self.version, self.lengths = root, version, dict(lengths)
        (root / "meta").mkdir(parents=True)
        self.write_info(self.described())
        said = {episode: episode % len(tasks) for episode in lengths}
        starts = dict(zip(lengths, np.cumsum([0, *lengths.values()]).tolist(), strict=False))
        tables = {e: self.table(e, n, starts[e], said[e]) for e, n in lengths.items()}
        if version == "v3.0":
            self.write(pa.concat_tables(tables.values()), "data/chunk-000/file-000.parquet")
            rows = {
                "episode_index": list(lengths),
                "length": list(lengths.values()),
                "tasks": [[tasks[said[e]]] for e in lengths],
                "dataset_from_index": list(starts.values()),
                "dataset_to_index": [starts[e] + n for e, n in lengths.items()],
                "data/chunk_index": [0] * len(lengths),
                "data/file_index": [0] * len(lengths),
            }
            self.write(pa.table(rows), "meta/episodes/chunk-000/file-000.parquet")
            self.write(pa.table({"task_index": range(len(tasks)), "task": list(tasks)}), "meta/tasks.parquet")
        else:
            for e, table in tables.items():
                self.write(table, f"data/chunk-{e // 1000:03d}/episode_{e:06d}.parquet")
            rows = [{"episode_index": e, "tasks": [tasks[said[e]]], "length": n} for e, n in lengths.items()]
            self.write_lines("episodes", rows)
            self.write_lines("tasks", [{"task_index": i, "task": task} for i, task in enumerate(tasks)])

    def described(self) -> dict[str, Any]:
        """info.json."""
        features = {"action": ("float32", 2), "observation.state": ("float32", 1), "timestamp": ("float32", 1)}
        features |= dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), ("int64", 1))
        old = self.version != "v3.0"
        return {
            "codebase_version": self.version,
            "fps": 10,
            "chunks_size": 1000,
            "total_episodes": len(self.lengths),
            "data_path": f"data/{'chunk-{episode_chunk:03d}/episode_{episode_index:06d}' if old else self.v3}.parquet",
            "video_path": None,
            "features": {
                key: {"dtype": dtype, "shape": [size], "names": None} for key, (dtype, size) in features.items()
            },
        }

    v3 = "chunk-{chunk_index:03d}/file-{file_index:03d}"

    @staticmethod
    def table(episode: int, length: int, start: int = 0, task: int = 0) -> pa.Table:
        """The rows of one episode."""
        rows = np.arange(length)
        counter = 100 * episode + rows
        action = np.stack([counter, -counter], axis=1).astype(np.float32).reshape(-1)
        return pa.table(
            {
                "action": pa.FixedSizeListArray.from_arrays(pa.array(action), 2),
                "observation.state": pa.array((counter + 0.5).astype(np.float32)),
                "timestamp": pa.array((rows / 10).astype(np.float32)),
                "frame_index": rows,
                "episode_index": np.full(length, episode),
                "index": start + rows,
                "task_index": np.full(length, task),
            }
        )

    def write(self, table: pa.Table, name: str) -> Path:
        """A parquet file, by its name in the data set."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, self.root / name)
        return self.root / name

    def write_info(self, info: Any) -> None:
        (self.root / "meta/info.json").write_text(json.dumps(info))

    def write_lines(self, name: str, rows: list[Any]) -> None:
        """meta/<name>.jsonl."""
        (self.root / f"meta/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    @property
    def files(self) -> list[str]:
        """Every file's name in the data set."""
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*.*") if path.is_file())

    @property
    def data_files(self) -> list[Path]:
        return sorted((self.root / "data").rglob("*.parquet"))

    def change(self, change: Callable[[pa.Table], pa.Table], path: Path | None = None) -> None:
        """Rewrites a table; every table of rows by default."""
        for file in self.data_files if path is None else [path]:
            pq.write_table(change(pq.read_table(file)), file)

    def set_column(self, key: str, values: Any, path: Path | None = None) -> None:
        """Replaces or adds a column of a table; of every table of rows by default."""

        def change(table: pa.Table) -> pa.Table:
            kept = table.drop_columns([key]) if key in table.column_names else table
            return kept.append_column(key, values(table) if callable(values) else values)

        self.change(change, path)

    @property
    def episode_table(self) -> Path:
        """Version 3's table of episodes."""
        return self.root / "meta/episodes/chunk-000/file-000.parquet"


@pytest.fixture
def plain(tmp_path: Path) -> Callable[..., PlainDataSet]:
    """Makes small data sets without cameras in new folders: (version, lengths by episode, tasks)."""
    made = iter(range(10**6))

    def make(
        version: str = "v2.1",
        lengths: Mapping[int, int] | None = None,
        tasks: tuple[str, ...] = ("open it", "close it"),
    ) -> PlainDataSet:
        return PlainDataSet(tmp_path / f"plain_{next(made)}", version, lengths or {0: 4, 1: 3, 2: 5}, tasks)

    return make


@pytest.fixture(scope="session")
def gapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of episodes 2, 5, 9 and 40, as deleting some leaves it."""
    root = tmp_path_factory.mktemp("gapped") / "v2.1"
    writer = open_writer(root, "v2.1")
    for place in range(4):
        writer.add_episode(place, **episode(place))
    writer.finalize()
    return renumber(root, (2, 5, 9, 40))


def renumber(root: Path, numbers: Sequence[int]) -> Path:
    """Gives the episodes 0, 1, ... of a v2.1 data set other numbers, larger ones."""
    for place, number in reversed(list(enumerate(numbers))):
        for path in [
            *root.glob(f"data/*/episode_{place:06d}.parquet"),
            *root.glob(f"videos/*/*/episode_{place:06d}.mp4"),
        ]:
            path.rename(path.with_stem(f"episode_{number:06d}"))
        for path in root.glob(f"data/*/episode_{number:06d}.parquet"):
            table = pq.read_table(path)
            column = table.column_names.index("episode_index")
            values = pa.array(np.full(len(table), number))
            pq.write_table(table.set_column(column, table.schema.field(column), values), path)
    for path in root.glob("meta/episodes*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        changed = [row | {"episode_index": numbers[row["episode_index"]]} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in changed))
    return root
