"""Synthetic latents in which only motion is to be learned: patterns that slide over a still background."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_action.config import LatentActionConfig
from latent_action.model import LatentActionTokenizer
from repvitok.data.latents import LatentEpisode, LatentMeta
from repvitok.data.shards import LatentShardWriter

DIM = 8
SIDE = 4
EPISODES = 40
FRAMES = 24
DIGEST = "a" * 64
_MAPS = np.random.default_rng(99).normal(size=(2, DIM)).astype(np.float32)


def pytest_configure(config: pytest.Config) -> None:
    """Make this package's marks known where the workspace's settings are not: in its sdist."""
    config.addinivalue_line("markers", "slow: takes more than about ten seconds")


def moving_blob(random: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents (frames, SIDE * SIDE, DIM) of a blob that moves over the grid, and its step (frames - 1, 2) in tokens.

    The background differs between episodes and never moves; the steps are random, so z_t alone cannot tell where the
    blob goes.
    """
    step = random.uniform(-1.0, 1.0, size=(frames - 1, 2)).astype(np.float32)
    place = np.zeros((frames, 2), dtype=np.float32)
    place[0] = random.uniform(0.5, SIDE - 1.5, size=2)
    for frame in range(frames - 1):
        target = place[frame] + step[frame]
        step[frame] = np.where((target < 0) | (target > SIDE - 1), -step[frame], step[frame])
        place[frame + 1] = place[frame] + step[frame]
    rows, columns = np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij")
    centre = np.stack([rows, columns], axis=-1)[None]
    height = np.exp(-np.square(centre - place[:, None, None]).sum(-1) / (2 * 0.7**2))
    background = random.normal(size=(SIDE, SIDE, 1)) * _MAPS[1] * 0.3
    latents = height[..., None] * 3 * _MAPS[0] + background
    return latents.reshape(frames, SIDE * SIDE, DIM).astype(np.float32), step


def write_blobs(root: Path, episodes: int = EPISODES, frames: int = FRAMES, digest: str = DIGEST) -> Path:
    """Latent shards of moving blobs: a transition's action is the blob's step and a constant, the state its place."""
    meta = LatentMeta(
        tokenizer_digest=digest,
        frame_rate_hz=10.0,
        stride=1,
        grid=(1, SIDE, SIDE),
        cameras=("camera",),
        latent_dim=DIM,
        window=None,
        source="blobs",
        action_names=("down", "right", "still"),
        state_names=("row", "column"),
    )
    with LatentShardWriter(root, meta) as writer:
        for index in range(episodes):
            latents, step = moving_blob(np.random.default_rng(index), frames)
            action = np.concatenate([step, np.ones((len(step), 1), np.float32)], axis=1)
            actions = np.repeat(action[:, None], 4, axis=1).astype(np.float32)
            state = np.concatenate([np.zeros((1, 2), np.float32), np.cumsum(step, axis=0)])
            writer.add(LatentEpisode(f"episode_{index:04d}", index, 0, "move", latents, state, actions))
    return root


@pytest.fixture(scope="session")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of latent shards."""
    return write_blobs(tmp_path_factory.mktemp("latents") / "blobs")


@pytest.fixture
def make_blobs() -> Callable[..., Path]:
    """Writes such shards of as many episodes as asked for."""
    return write_blobs


@pytest.fixture
def blob_centre() -> Callable[[np.ndarray], np.ndarray]:
    """Where the blob is in raw latents (b, SIDE * SIDE, DIM): row and column, (b, 2)."""

    def centre(latents: np.ndarray) -> np.ndarray:
        height = np.clip((latents @ np.linalg.pinv(_MAPS))[..., 0], 0, None)
        place = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"), axis=-1).reshape(-1, 2)
        return (height[..., None] * place).sum(1) / height.sum(1)[:, None]

    return centre


@pytest.fixture
def lat() -> LatentActionTokenizer:
    """A small tokenizer with random weights everywhere, also where a new one starts at zero."""
    torch.manual_seed(0)
    model = LatentActionTokenizer(LatentActionConfig(latent_dim=DIM, hidden=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))
    return model.eval()


@pytest.fixture
def fitted_lat(lat: LatentActionTokenizer) -> LatentActionTokenizer:
    """The same, with the statistics and the digest of the `blobs` latents' tokenizer."""
    config = LatentActionConfig(
        latent_dim=DIM,
        hidden=16,
        tokenizer_digest=DIGEST,
        latent_mean=(0.1,) * DIM,
        latent_std=(2.0,) * DIM,
    )
    model = LatentActionTokenizer(config)
    model.load_state_dict(lat.state_dict())
    return model.eval()
