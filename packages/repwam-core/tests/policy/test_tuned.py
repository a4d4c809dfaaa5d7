"""Stage two with the tokenizer's last blocks trained: frames in place of latents, one export, streams equal clips."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from repvitok import RepViTok, RepViTokConfig
from repvitok.data import LeRobotReader, LeRobotWriter
from repvitok.data.transforms import prepare_frames
from repvitok.encoding import encode_dataset
from repwam_core.cli import main
from repwam_core.data.episodes import EpisodeStore
from repwam_core.interface import Observation
from repwam_core.policy import BatchedPolicy
from repwam_core.policy.folder import LoadedPolicy
from repwam_core.training.losses import LossSettings, wam_loss
from repwam_core.training.module import WAMTraining
from repwam_core.training.tuning import TunedTokenizer, TuneTokenizer

CAMERAS = ("observation.images.left", "observation.images.right")
SIZE = (32, 16)
SIZES = {"width": 32, "depth": 1, "heads": 2, "ffn": 32, "action_width": 32, "action_ffn": 32}


@pytest.fixture(scope="module")
def made(tmp_path_factory, write_text_cache) -> Path:
    """A data set of noise, its tokenizer of two blocks, and its latents, encoded at two offsets."""
    root = tmp_path_factory.mktemp("tuned")
    writer = LeRobotWriter(
        root / "data", version="v2.1", fps=20, cameras=dict.fromkeys(CAMERAS, SIZE), state_names=["px", "py"],
        action_names=["x", "y", "z"], robot_type="arm",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for index, length in enumerate((42, 15)):
        frames = {camera: rng.integers(0, 256, (length, *SIZE, 3), np.uint8) for camera in CAMERAS}
        numbers = {"state": (length, 2), "action": (length, 3)}
        columns = {name: rng.normal(size=shape).astype(np.float32) for name, shape in numbers.items()}
        writer.add_episode(index, frames=frames, task=("go left", "go up")[index], **columns)
    writer.finalize()
    torch.manual_seed(0)
    tokenizer = RepViTok(RepViTokConfig(width=32, depth=2, heads=2, latent_dim=8, episode_window=2)).eval()
    with torch.no_grad():  # attention that tells frames apart
        for name, weight in tokenizer.encoder.named_parameters():
            weight.mul_(5.0 if weight.ndim == 2 and "attention" in name else 1.0)
    tokenizer.save_pretrained(root / "tokenizer")
    encode_dataset(tokenizer, LeRobotReader(root / "data"), root / "latents", size=SIZE, offsets=(0, 2))
    write_text_cache(root / "latents")
    return root


def settings(made: Path, **changes) -> TuneTokenizer:
    return TuneTokenizer(**{"tokenizer": made / "tokenizer", "dataset": made / "data", "last_k": 1} | changes)


def fit(made: Path, folder: Path, *overrides: str, steps: int = 2, tune: bool = True, expect: int = 0) -> Path:
    values = {
        "seed_everything": 0,
        "model": {
            "preset": "tiny",
            "wam": {**SIZES, "window": 2, "state_token": True},
            "space": "robot",
            "chunk_sizes": [1, 2],
            "optimizer": {"name": "adamw", "lr": 1e-2, "warmup_steps": 0, "lr_floor": 1.0},
            "plan": {"chunk_frames": 1, "video_steps": 1, "action_steps": 1},
        },
        "data": {"latents": str(made / "latents"), "transitions": 2, "batch_size": 2, "held_out": 0.5},
        "trainer": {"accelerator": "cpu", "max_steps": steps, "default_root_dir": str(folder), "val_check_interval": 2},
    }
    if tune:
        values["model"]["tune_tokenizer"] = {
            "tokenizer": str(made / "tokenizer"), "dataset": str(made / "data"), "last_k": 1, "lr_factor": 0.5,
        }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["fit", "-c", str(folder / "recipe.yaml"), "--ckpt_path", "last", *overrides]) == expect
    return folder / "last.ckpt"


@torch.no_grad()
@pytest.mark.parametrize("memory_limit_gb", [8.0, 1e-9])
def test_history_from_frames_is_what_encode_streamed(made, memory_limit_gb):
    """At an episode's beginning, far from it, and beyond its end, at both offsets."""
    store = EpisodeStore(made / "latents")
    tuned = TunedTokenizer(settings(made, memory_limit_gb=memory_limit_gb), store, 0.9)
    assert tuned.lookback == 4
    long = [row for row, info in enumerate(store.infos) if info.frames > 9]
    batch = store.batch(np.array([long[0], long[0], long[0], long[1]]), np.array([0, 3, 6, 8]), 3)
    found = tuned.with_history(batch)
    torch.testing.assert_close(found.history, batch.latents, atol=1e-4, rtol=0)
    assert found.latents is batch.latents
    assert not batch.valid[3].all()


def test_the_gradient_reaches_the_last_blocks_alone(made):
    store = EpisodeStore(made / "latents")
    tuned = TunedTokenizer(settings(made), store, 0.9)
    batch = store.batch(np.array([0, 1]), np.array([1, 0]), 2)
    tuned.with_history(batch).history.square().sum().backward()
    touched = {name for name, weight in tuned.tokenizer.named_parameters() if weight.grad is not None}
    assert touched
    assert all(name.startswith(("encoder.transformer.blocks.1.", "encoder.project.")) for name in touched)


@torch.no_grad()
def test_history_changes_the_clean_tokens_and_off_is_off(made, write_text_cache):
    """With the latents themselves as history the loss is the same, bit for bit; what is predicted stays theirs."""
    from repwam_core.model.config import ActionSpace, WAMConfig
    from repwam_core.model.wam import WorldActionModel

    store = EpisodeStore(made / "latents")
    space = ActionSpace(channels=3, vectors_per_transition=4, state_channels=2)
    torch.manual_seed(0)
    config = WAMConfig.preset("tiny", **SIZES, text_dim=16, latent_dim=8, spaces={"robot": space})
    wam = WorldActionModel(config)
    for parameter in wam.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    batch = store.batch(np.array([0, 1]), np.array([1, 0]), 2)

    def loss(given):
        generator = torch.Generator().manual_seed(0)
        return wam_loss(wam, given, space="robot", chunk_sizes=(1, 1), grid=store.meta.grid, settings=LossSettings(),
                        generator=generator).total  # fmt: skip

    plain = loss(batch)
    assert torch.equal(loss(replace(batch, history=batch.latents)), plain)
    assert not torch.equal(loss(replace(batch, history=batch.latents + 1)), plain)


def test_fit_resumes_and_the_exported_policy_carries_the_tuned_encoder(made, tmp_path):
    whole = torch.load(fit(made, tmp_path / "whole", steps=4), weights_only=True)
    fit(made, tmp_path / "run", "--trainer.max_steps=2", steps=4)
    resumed = torch.load(fit(made, tmp_path / "run", steps=4), weights_only=True)
    for section in ("state_dict", "tokenizer"):
        weights, others = ((c if section == "state_dict" else c["repwam"])[section] for c in (whole, resumed))
        weights, others = (given.get("average", given) for given in (weights, others))
        assert any("encoder.project." in name for name in weights)
        for name, value in weights.items():
            torch.testing.assert_close(others[name], value, rtol=0, atol=0)
    fit(made, tmp_path / "run", steps=6, tune=False, expect=2)
    export = ["export", "--ckpt", str(tmp_path / "run"), "--tokenizer", str(made / "tokenizer")]
    assert main([*export, "--latents", str(made / "latents"), "--out", str(tmp_path / "policy")]) == 0
    parts, before = LoadedPolicy.load(tmp_path / "policy"), RepViTok.from_pretrained(made / "tokenizer")
    changed = {n for n, w in parts.tokenizer.state_dict().items() if not torch.equal(w, before.state_dict()[n])}
    assert changed
    assert all(name.startswith(("encoder.transformer.blocks.1.", "encoder.project.")) for name in changed)
    assert parts.manifest.latents.tokenizer_digest == before.digest() != parts.tokenizer.digest()

    policy, reader = BatchedPolicy.from_pretrained(tmp_path / "policy"), LeRobotReader(made / "data")
    policy.reset(["go left"], [0])
    seen = []
    for first, last in ((0, 1), (1, 5), (5, 9), (9, 13)):
        images = {camera: reader.frames(0, camera, range(first, last)) for camera in reader.camera_keys}
        state = reader.episode(0)["observation.state"][first:last].astype(np.float32)
        assert np.isfinite(policy.act([Observation(images, state)])[0].actions).all()
        seen.append(policy.observed_latents())
    clips = torch.stack([prepare_frames(reader.frames(0, camera, range(13)), SIZE) for camera in reader.camera_keys])
    with torch.no_grad():
        z = parts.tokenizer.encode(clips, parts.manifest.latents.window)
    torch.testing.assert_close(torch.cat(seen, dim=1)[0], torch.cat(list(z), dim=1), atol=1e-4, rtol=1e-4)


def test_what_cannot_be_tuned_is_refused(made, tmp_path):
    store = EpisodeStore(made / "latents")
    with pytest.raises(ValueError, match="last_k: 3 blocks of an encoder that has 2"):
        TunedTokenizer(settings(made, last_k=3), store, 0.9)
    RepViTok(RepViTokConfig(width=32, depth=2, heads=2, latent_dim=8, episode_window=2)).save_pretrained(tmp_path / "o")
    with pytest.raises(ValueError, match="give the tokenizer that made them"):
        TunedTokenizer(settings(made, tokenizer=tmp_path / "o"), store, 0.9)
    with pytest.raises(ValueError, match="is of stage two"):
        WAMTraining(preset="tiny", space="latent", tune_tokenizer=settings(made))
