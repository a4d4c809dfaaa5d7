"""What do latent actions, the video objective and a trained tokenizer buy the quickstart's policy?

Takes a finished quickstart (``repwam quickstart --out RUN``) and trains its policy again with one thing taken away at a
time, on the same demonstrations, with the same total number of world-model steps, and drives the same unseen seeds:

- ``no-latent-actions``: no pretraining; all steps are spent on robot actions from the start
- ``no-video``: the video is pure noise and unlearned in every sample of the adaptation, and there is no pretraining
- ``random-tokenizer``: latents of an untrained tokenizer of the same size, and no pretraining

    uv run python benchmarks/quickstart_controls.py --run RUN --out RUN-controls [--arms no-video ...]

The last two are to be compared with ``no-latent-actions``, from which each differs in one thing.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import torch
from repvitok import RepViTok
from repwam_core.cli import main as repwam
from repwam_core.quickstart import closed_loop, training
from repwam_core.quickstart.plan import RECIPES, Plan, load_plan
from repwam_core.quickstart.stages import StageRunner

ARMS = ("no-latent-actions", "no-video", "random-tokenizer")
ROBOT_ONLY = ("--model.wam={{coupling: joint, window: 1, action_history: false, state_token: true}}",)


def main() -> None:
    """Train and evaluate the arms, one stage folder each; an interrupted run goes on where it stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished quickstart")
    parser.add_argument("--out", type=Path, required=True, help="folder for the arms")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    plan = _plan()
    runner = StageRunner(options.out)
    for arm in options.arms:
        started_s = time.monotonic()
        result = runner.run(
            arm,
            lambda folder, arm=arm: _run_arm(arm, folder, plan, options),
            settings={"plan": plan.to_dict(), "seed": options.seed},
            inputs={"run": str(options.run.resolve())},
        )
        print(f"| {arm} | {result.summary['policy']} | {time.monotonic() - started_s:.0f} s |")


def _plan() -> Plan:
    """The quickstart's plan, with pretraining's steps added to adaptation's."""
    options = argparse.Namespace(tasks=None, episodes=None, eval_episodes=None, size=None, budget=1.0)
    plan = load_plan(RECIPES / "sim.yaml", options)
    together = dataclasses.replace(plan.steps, adapt=plan.steps.pretrain + plan.steps.adapt)
    return dataclasses.replace(plan, steps=together)


def _run_arm(arm: str, folder: Path, plan: Plan, options: argparse.Namespace) -> dict[str, str]:
    tokenizer, latents = _one(options.run, "tokenizer-*/tokenizer"), _one(options.run, "encode-*/latents")
    if arm == "random-tokenizer":
        tokenizer, latents = _random_tokenizer(folder, plan, tokenizer, _one(options.run, "collect-*/dataset"))
    overrides = (*ROBOT_ONLY, "--model.loss.video_noise_prob=1.0") if arm == "no-video" else ROBOT_ONLY
    training.adapt(
        folder,
        repwam=repwam,
        plan=plan,
        seed=options.seed,
        latents=latents,
        pretrained=None,
        tokenizer=tokenizer,
        lat=None,
        overrides=overrides,
    )
    return closed_loop.run_policy(
        folder, plan=plan, policy=folder / "policy", workers=options.workers, tasks=plan.all_tasks, filmed=0
    )


def _random_tokenizer(folder: Path, plan: Plan, trained: Path, dataset: Path) -> tuple[Path, Path]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        RepViTok(RepViTok.from_pretrained(trained).config).save_pretrained(folder / "tokenizer")
    training.encode(folder, plan=plan, dataset=dataset, tokenizer=folder / "tokenizer")
    return folder / "tokenizer", folder / "latents"


def _one(root: Path, pattern: str) -> Path:
    finished = [path for path in root.glob(pattern) if (root / path.relative_to(root).parts[0] / "stage.json").exists()]
    if len(finished) != 1:
        raise SystemExit(f"{root}: expected one finished {pattern}, found {len(finished)}; run the quickstart first")
    return finished[0]


if __name__ == "__main__":
    main()
