"""Data that tests across packages share."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest


@pytest.fixture(scope="session")
def shared_video_dataset(tmp_path_factory, write_squares):
    """A LeRobot v2.1 data set: 6 episodes of a bright square that its actions move about, 40 Hz, 48 x 72 pixels."""
    return write_squares(tmp_path_factory.mktemp("squares") / "dataset", dict.fromkeys(range(6), 45))


@pytest.fixture(scope="session")
def gapped_video_dataset(tmp_path_factory, write_squares):
    """The same square in episodes 2, 5, 9 and 40, as deleting some leaves it; of a camera "side" there is no video."""
    root = write_squares(tmp_path_factory.mktemp("gapped") / "dataset", {2: 45, 5: 30, 9: 40, 40: 35})
    info = json.loads((root / "meta/info.json").read_text())
    features = info["features"]
    info["features"] = {"observation.images.side": features["observation.images.top"], **features}
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


@pytest.fixture(scope="session")
def write_squares():
    """Write a data set of a moving square, with episodes by number and length, into a folder and return that."""
    return _write_squares


def _write_squares(root, lengths):
    from repvitok.data import LeRobotWriter

    writer = LeRobotWriter(
        root,
        fps=40,
        cameras={"observation.images.top": (48, 72)},
        state_names=["x", "y"],
        action_names=["x", "y", "grip"],
        robot_type="square",
    )
    for index, length in enumerate(lengths.values()):
        rng = np.random.default_rng(index)
        action = np.zeros((length, 3), np.float32)
        action[:, :2] = rng.uniform(-1, 1, (-(-length // 5), 2)).repeat(5, axis=0)[:length]
        place = np.clip(np.cumsum(action[:, :2], axis=0) + np.array([36, 24]), 6, 40).astype(int)
        frames = np.full((length, 48, 72, 3), 40, np.uint8)
        for frame, (x, y) in zip(frames, place, strict=True):
            frame[y - 5 : y + 5, x - 5 : x + 5] = (220, 60, 30)
        writer.add_episode(
            index,
            frames={"observation.images.top": frames},
            state=place.astype(np.float32),
            action=action,
            task="move the square",
        )
    writer.finalize()
    _renumber(root, list(lengths))
    return root


def _renumber(root, numbers):
    """Give the episodes 0, 1, ... of a v2.1 data set other numbers, larger ones."""
    for place, number in reversed(list(enumerate(numbers))):
        for path in sorted(root.rglob(f"episode_{place:06d}.*")):
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


@pytest.fixture(scope="session")
def noise_latents(tmp_path_factory):
    """Six episodes of noise with latent actions, and hidden states of their instruction."""
    import torch
    from repvitok.data import LatentEpisode, LatentMeta, LatentShardWriter
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("latents") / "latents"
    meta = LatentMeta(
        tokenizer_digest="0" * 64, frame_rate_hz=10.0, stride=1, grid=(1, 2, 2), cameras=("top",), latent_dim=8,
        window=5, source="noise", action_names=("x",), state_names=("x",),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    with LatentShardWriter(folder, meta) as writer:
        for index in range(6):
            writer.add(
                LatentEpisode(
                    key=f"episode-{index}",
                    episode_index=index,
                    offset=0,
                    task="go",
                    latents=rng.normal(size=(12, 4, 8)).astype(np.float32),
                    state=rng.normal(size=(12, 1)).astype(np.float32),
                    actions=rng.normal(size=(11, 4, 1)).astype(np.float32),
                    latent_actions=rng.normal(size=(11, 4)).astype(np.float32),
                )
            )
    metadata = {"text_encoder": "minilm", "instructions": json.dumps(["go"])}
    hidden = torch.randn(3, 384, generator=torch.Generator().manual_seed(0))
    save_file({"0": hidden}, folder / "text-minilm.safetensors", metadata)
    return folder


@pytest.fixture(scope="session")
def files_of_0_1(tmp_path_factory) -> Path:
    """The folder of files that version 0.1.0 made (files_of_0_1/make.py); nothing may write into it."""
    folder = tmp_path_factory.mktemp("files_of_0_1")
    with tarfile.open(Path(__file__).parent / "files_of_0_1" / "files.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def copied_files_of_0_1(files_of_0_1, tmp_path, monkeypatch) -> Path:
    """A copy to work in, which is the working folder: its recipes name their data relative to it."""
    shutil.copytree(files_of_0_1, tmp_path / "copy", symlinks=True)
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"
