"""A policy on frozen features: encoded, trained on, exported with its network, and streamed as it was encoded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from repvitok import RepViTokConfig
from repvitok.data import LatentShards, LeRobotReader, LeRobotWriter
from repvitok.encoding import encode_dataset
from repwam_core.cli import main
from repwam_core.interface import Observation
from repwam_core.policy import BatchedPolicy
from repwam_core.policy.folder import LoadedPolicy

pytest.importorskip("timm")
SIZE, CAMERA = (32, 16), "observation.images.front"


@pytest.mark.parametrize("squeeze", ["pca", "none"])
def test_encode_fit_export_act(tmp_path, write_text_cache, fit_one_step, squeeze):
    from types import SimpleNamespace

    from repvitok.baselines import FeatureTokenizer
    from repvitok.training.teacher import TimmTeacher

    writer = LeRobotWriter(
        tmp_path / "data", version="v2.1", fps=20, cameras={CAMERA: SIZE}, state_names=["px", "py"],
        action_names=["x", "y", "z"], robot_type="arm",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for index, length in enumerate((18, 15)):
        numbers = {"state": (length, 2), "action": (length, 3)}
        columns = {name: rng.normal(size=shape).astype(np.float32) for name, shape in numbers.items()}
        frames = {CAMERA: rng.integers(0, 256, (length, *SIZE, 3), np.uint8)}
        writer.add_episode(index, frames=frames, task=("go left", "go up")[index], **columns)
    writer.finalize()
    torch.manual_seed(0)
    sizes = RepViTokConfig(width=32, depth=1, heads=2, latent_dim=6, episode_window=2)
    tokenizer = FeatureTokenizer.of(TimmTeacher("test_vit", random_weights_for_tests=True), sizes, squeeze).eval()
    tokenizer.fit_squeeze([torch.rand(1, 3, 9, *SIZE) * 2 - 1 for _ in range(4)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    reader = LeRobotReader(tmp_path / "data")
    encode_dataset(tokenizer, reader, tmp_path / "latents", size=SIZE)
    write_text_cache(tmp_path / "latents")
    plan = {"chunk_frames": 1, "video_steps": 1, "action_steps": 1}
    (tmp_path / "run").mkdir()
    world = SimpleNamespace(shards=tmp_path / "latents")
    fit_one_step(tmp_path / "run", world, window=1, chunk_sizes=[1, 1], plan=plan)
    export = ["export", "--ckpt", str(tmp_path / "run"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert main([*export, "--latents", str(tmp_path / "latents"), "--out", str(tmp_path / "policy")]) == 0
    assert isinstance(LoadedPolicy.load(tmp_path / "policy").tokenizer, FeatureTokenizer)
    policy, seen = BatchedPolicy.from_pretrained(tmp_path / "policy"), []
    policy.reset(["go left"], [0])
    for first, last in ((0, 1), (1, 5), (5, 9), (9, 13)):
        state = reader.episode(0)["observation.state"][first:last].astype(np.float32)
        policy.act([Observation({CAMERA: reader.frames(0, CAMERA, range(first, last))}, state)])
        seen.append(policy.observed_latents())
    stored = torch.from_numpy(LatentShards(tmp_path / "latents")[0].latents[:4])
    torch.testing.assert_close(torch.cat(seen, dim=1)[0], stored, atol=1e-4, rtol=1e-4)
