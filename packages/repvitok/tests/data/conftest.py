"""Small recordings in which every frame can be told from every other, and data sets made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from repvitok.data.lerobot_writer import LeRobotWriter

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
