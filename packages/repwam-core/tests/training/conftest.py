"""Runs of `repwam fit` that take seconds: a model of a few thousand parameters on the synthetic point."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from repwam_core.cli import main

SIZES = {"width": 32, "depth": 1, "heads": 2, "ffn": 64, "action_width": 32, "action_ffn": 64}


@pytest.fixture(scope="session")
def shards(tmp_path_factory, write_shards) -> Path:
    """Latent shards with latent actions, robot actions and states."""
    return write_shards(tmp_path_factory.mktemp("training") / "latents", episodes=24)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, shards) -> Path:
    """A recipe for stage two from scratch; tests override what they are about."""
    values = {
        "seed_everything": 0,
        "model": {
            "preset": "tiny",
            "wam": {**SIZES, "window": 1, "action_history": False, "state_token": True},
            "space": "robot",
            "chunk_sizes": [1, 2],
            "optimizer": {"name": "adamw", "lr": 5e-3, "warmup_steps": 5},
            "plan": {"chunk_frames": 1, "video_steps": 2, "action_steps": 4},
            "ema_decay": 0.9,
        },
        "data": {"latents": str(shards), "space": "robot", "transitions": 3, "batch_size": 8, "held_out": 0.2},
        "trainer": {"accelerator": "cpu", "max_steps": 6, "gradient_clip_val": 2.0, "log_every_n_steps": 1},
    }
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="session")
def fit(recipe) -> Callable[..., Path]:
    """Run `repwam fit` with dotted overrides into a folder; return its last checkpoint."""

    def run(folder: Path, *overrides: str, expect: int = 0) -> Path:
        assert main(["fit", "-c", str(recipe), f"--trainer.default_root_dir={folder}", *overrides]) == expect
        return folder / "last.ckpt"

    return run
