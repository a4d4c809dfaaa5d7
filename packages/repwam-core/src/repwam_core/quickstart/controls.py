"""The policy trained again with one part of the method taken away: what each part buys at this size."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from repwam_core.quickstart import closed_loop
from repwam_core.quickstart.chain import Run, Trained, adapt, recipe, train_on_latents, train_world_model
from repwam_core.quickstart.stages import StageResult

NO_VIDEO = ("--model.loss.video_noise_prob=1.0",)
"""The video is pure noise, and unlearned, in every sample."""

CONTROLS = {
    "without latent actions": "no pretraining; all steps spent on robot actions",
    "without the video objective": "video is noise and unlearned in both stages",
    "untrained visual tokenizer": "random weights; everything after it trained alike",
}
"""What is taken away, and how. Each differs in that alone; steps, data and evaluation seeds are the policy's."""


def run_controls(this: Run, trained: Trained) -> dict[str, StageResult]:
    """Train every control and drive the evaluation's unseen seeds with it.

    Returns:
        control -> its closed-loop stage, whose folder holds ``policy.json``.
    """
    adapted = {
        "without latent actions": _without_latent_actions(this, trained),
        "without the video objective": train_world_model(
            this, trained.prepared, prefix="no-video-", overrides=NO_VIDEO
        ).adapted,
        "untrained visual tokenizer": _untrained_tokenizer(this, trained).adapted,
    }
    return {name: _driven(this, name, stage) for name, stage in adapted.items()}


def _without_latent_actions(this: Run, trained: Trained) -> StageResult:
    steps = this.plan.steps.pretrain + this.plan.steps.adapt
    architecture = yaml.safe_load(recipe("pretrain.yaml"))["model"]["wam"]  # otherwise the pretrained model's
    overrides = (f"--model.wam={json.dumps(architecture)}",)
    return adapt(this, trained.prepared, None, steps=steps, prefix="no-latent-actions-", overrides=overrides)


def _untrained_tokenizer(this: Run, trained: Trained) -> Trained:
    given = trained.prepared
    work: Callable[[Path], dict[str, Any]] = partial(_untrained_like, trained=given.tokenizer_folder, seed=this.seed)
    tokenizer = this.stage("untrained-tokenizer", work, inputs={"tokenizer": given.tokenizer}, seed=this.seed)
    return train_on_latents(this, given.data, tokenizer, prefix="untrained-")


def _untrained_like(folder: Path, *, trained: Path, seed: int) -> dict[str, Any]:
    """A tokenizer of the trained one's architecture with random weights, in ``folder/tokenizer``."""
    import torch
    from repvitok import RepViTok

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        RepViTok(RepViTok.from_pretrained(trained).config).save_pretrained(folder / "tokenizer")
    return {}


def _driven(this: Run, name: str, adapted: StageResult) -> StageResult:
    plan = this.plan
    return this.stage(
        f"{name.replace(' ', '-')}-rollouts",
        partial(
            closed_loop.run_policy,
            plan=plan,
            policy=adapted.folder / "policy",
            workers=this.workers,
            tasks=plan.tasks,
            filmed=0,
        ),
        inputs={"policy": adapted},
        suite=plan.suite,
        tasks=plan.tasks,
        same_scene=plan.same_scene,
        size=plan.size,
        eval_episodes=plan.eval_episodes,
        execute=plan.execute,
    )
