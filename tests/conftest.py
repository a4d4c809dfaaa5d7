"""Data that tests across packages share."""

import json

import numpy as np
import pytest


@pytest.fixture(scope="session")
def shared_video_dataset(tmp_path_factory):
    """A LeRobot v2.1 data set: 6 episodes of a bright square that its actions move about, 40 Hz, 48 x 72 pixels."""
    from repvitok.data import LeRobotWriter

    root = tmp_path_factory.mktemp("squares") / "dataset"
    writer = LeRobotWriter(
        root,
        fps=40,
        cameras={"observation.images.top": (48, 72)},
        state_names=["x", "y"],
        action_names=["x", "y", "grip"],
        robot_type="square",
    )
    for index in range(6):
        rng = np.random.default_rng(index)
        action = np.zeros((45, 3), np.float32)
        action[:, :2] = rng.uniform(-1, 1, (9, 2)).repeat(5, axis=0)
        place = np.clip(np.cumsum(action[:, :2], axis=0) + np.array([36, 24]), 6, 40).astype(int)
        frames = np.full((45, 48, 72, 3), 40, np.uint8)
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
    return root


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
