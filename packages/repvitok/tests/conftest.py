"""What the tests of repvitok share: a tiny seeded tokenizer and random clips."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from repvitok import RepViTok, RepViTokConfig
from torch import Tensor


def pytest_configure(config: pytest.Config) -> None:
    """Make this package's marks known where the workspace's settings are not: in its sdist."""
    config.addinivalue_line("markers", "slow: takes more than about ten seconds")


@pytest.fixture(scope="session")
def tiny_config() -> RepViTokConfig:
    """A model of a few thousand parameters, with patches of 4 pixels: 16x24 pixels are 4x6 tokens."""
    return RepViTokConfig(patch_size=4, width=32, depth=2, heads=2, latent_dim=6, episode_window=3)


@pytest.fixture
def tok(tiny_config: RepViTokConfig) -> RepViTok:
    """A tiny tokenizer with the same random weights in every test."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return RepViTok(tiny_config).eval()


@pytest.fixture
def make_video() -> Callable[..., Tensor]:
    """`make_video(frames, size=(8, 12), batch=2, seed=0)`: uniform noise in [-1, 1], (batch, 3, frames, H, W)."""

    def make(frames: int, size: tuple[int, int] = (8, 12), batch: int = 2, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(batch, 3, frames, *size, generator=generator) * 2 - 1

    return make
