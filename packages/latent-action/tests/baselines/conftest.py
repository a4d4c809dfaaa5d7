"""A data set of moving squares and shards that say which transitions of it there are."""

from pathlib import Path

import numpy as np
import pytest
from repvitok.data.latents import LatentEpisode, LatentMeta
from repvitok.data.lerobot.writer import LeRobotWriter
from repvitok.data.shards import LatentShardWriter

LENGTHS = (13, 5, 9)


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(latents, data set): two cameras of 32 x 48 pixels, whose frame i has the grey value 10 + 10 i everywhere."""
    root = tmp_path_factory.mktemp("squares")
    writer = LeRobotWriter(
        root / "data",
        version="v2.1",
        fps=10,
        cameras={"left": (32, 48), "right": (32, 48)},
        state_names=("s",),
        action_names=("a",),
        robot_type="square",
    )
    for index, length in enumerate(LENGTHS):
        grey = np.broadcast_to((10 + 10 * np.arange(length, dtype=np.uint8))[:, None, None, None], (length, 32, 48, 3))
        writer.add_episode(
            index,
            frames={"left": grey, "right": grey + 1},
            state=np.zeros((length, 1), np.float32),
            action=np.zeros((length, 1), np.float32),
            task="brighten",
        )
    writer.finalize()
    meta = LatentMeta(
        tokenizer_digest="a" * 64,
        frame_rate_hz=10.0,
        stride=1,
        grid=(2, 2, 3),
        cameras=("left", "right"),
        latent_dim=4,
        window=None,
        source="squares",
    )
    random = np.random.default_rng(0)
    with LatentShardWriter(root / "latents", meta) as shards:
        for index, length in enumerate(LENGTHS):
            for offset in (0, 2):
                frames = 1 + (length - 1 - offset) // 4
                latents = random.normal(size=(frames, 12, 4)).astype(np.float32)
                shards.add(LatentEpisode(f"e{index}-{offset}", index, offset, "brighten", latents))
    return root / "latents", root / "data"
