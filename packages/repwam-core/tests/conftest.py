"""Synthetic latent shards: a point that moves towards the goal its instruction names, seen through random features."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from repvitok.data import LatentEpisode, LatentMeta, LatentShardWriter
from safetensors.torch import save_file

GOALS = {"go left": np.array([-1.0, 0.0]), "go up": np.array([0.0, 1.0])}


def pytest_configure(config: pytest.Config) -> None:
    """Make this package's marks known where the workspace's settings are not: in its sdist."""
    config.addinivalue_line("markers", "slow: takes more than about ten seconds")
    config.addinivalue_line("markers", "sim: needs MuJoCo and a headless GL library")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


@pytest.fixture(scope="session")
def write_shards(write_text_cache) -> Callable[..., Path]:
    """Write shards of `episodes` episodes into a folder and return it.

    The point moves by 0.3 of what is left to its goal; each transition's two action vectors are that velocity (twice),
    plus a third channel that never changes. Latents are a fixed random linear map of the position, so the next action
    can be read off the newest latent and the instruction. The latent actions are the velocity, twice.
    """

    def write(
        folder: Path,
        episodes: int = 12,
        frames: tuple[int, int] = (6, 10),
        grid: tuple[int, int, int] = (1, 2, 2),
        d: int = 8,
        seed: int = 0,
        digest: str = "0" * 64,
    ) -> Path:
        rng = np.random.default_rng(seed)
        tokens = int(np.prod(grid))
        features = np.random.default_rng(99).normal(size=(2, tokens * d))
        meta = LatentMeta(
            tokenizer_digest=digest,
            frame_rate_hz=40.0,
            stride=1,
            grid=grid,
            cameras=tuple(f"camera_{view}" for view in range(grid[0])),
            latent_dim=d,
            window=5,
            source="synthetic",
            action_names=("x", "y", "still"),
            state_names=("px", "py", "constant"),
        )
        with LatentShardWriter(folder, meta) as writer:
            for index in range(episodes):
                writer.add(_episode(index, rng, features, int(rng.integers(*frames)), tokens, d))
        write_text_cache(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def write_text_cache() -> Callable[[Path], None]:
    """Put random hidden states of the instructions beside shards, so that no test loads the real text model."""

    def write(shards: Path) -> None:
        metadata = {"text_encoder": "minilm", "instructions": json.dumps(sorted(GOALS))}
        states = {str(row): _hidden_states(text) for row, text in enumerate(sorted(GOALS))}
        save_file(states, shards / "text-minilm.safetensors", metadata)

    return write


def _hidden_states(text: str) -> torch.Tensor:
    return torch.randn(len(text.split()) + 2, 16, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))


def _episode(index: int, rng: np.random.Generator, features: np.ndarray, length: int, tokens: int, d: int):
    task = sorted(GOALS)[index % 2]
    position = [rng.uniform(-1, 1, 2)]
    for _ in range(length - 1):
        position.append(position[-1] + 0.3 * (GOALS[task] - position[-1]))
    places = np.array(position)
    velocity = np.diff(places, axis=0)
    actions = np.concatenate([velocity, np.full((length - 1, 1), 0.5)], axis=1)
    latents = (places @ features).reshape(length, tokens, d) + 0.01 * rng.normal(size=(length, tokens, d))
    return LatentEpisode(
        key=f"episode-{index:06d}",
        episode_index=index,
        offset=0,
        task=task,
        latents=latents.astype(np.float32),
        state=np.concatenate([places, np.ones((length, 1))], axis=1).astype(np.float32),
        actions=np.repeat(actions[:, None], 2, axis=1).astype(np.float32),
        latent_actions=np.concatenate([velocity, velocity], axis=1).astype(np.float32),
    )
