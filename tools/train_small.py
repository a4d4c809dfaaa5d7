"""`repvitok-small` and `latent-action-small` in one command; given again it goes on where it was.

    uv run python tools/train_small.py --out runs/small --robot DATASET --license mit

Collects demonstrations of Meta-World's fifty tasks, trains the tokenizer on them and on LeRobot data of real robots
(each drawn three times as often), measures it on held-out episodes and exports it; encodes the demonstrations with it,
trains the latent action tokenizer on their latents, measures and exports that. Both folders are what
packages/repwam-weights carries. Options after `--` go to `repvitok fit`: -- --trainer.max_steps 2000
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from latent_action.cli import main as latent_action
from repvitok.cli import main as repvitok
from repvitok.runtime.errors import UserError, run_cli
from repwam_core.cli import main as repwam
from repwam_core.sim.metaworld import TASKS

RECIPES = Path(__file__).parents[1] / "recipes"
TOKENIZER, LAT = "repvitok-small", "latent-action-small"


@run_cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/small"), help="folder of the run (default: runs/small)")
    parser.add_argument("--robot", nargs="*", default=[], metavar="DATASET", help="LeRobot data sets of real robots")
    parser.add_argument("--episodes", type=int, default=8, help="demonstrations of each task (default: 8)")
    parser.add_argument("--workers", type=int, default=1, help="simulator processes (default: 1)")
    parser.add_argument("--license", help="of the weights, for the model cards")
    parser.add_argument("fit", nargs="*", metavar="-- OPTION", help="of `repvitok fit`")
    options = parser.parse_args(argv)
    demonstrations, out = options.out / "metaworld", options.out
    sizes = ("--size", "64", "64", "--act-repeat", "2", "--max-env-steps", "400", "--cameras", "corner2")
    collecting = ("--episodes", options.episodes, "--noise", "pushes", "--workers", options.workers)
    _call(repwam, "collect", "--tasks", *TASKS, *sizes, *collecting, "--out", demonstrations)
    license = () if options.license is None else ("--license", options.license)

    recipes = (f"-c={RECIPES}/1_repvitok/tiny.yaml", f"-c={RECIPES}/1_repvitok/small.yaml")
    folders = json.dumps([str(demonstrations), *(folder for folder in options.robot for _ in range(3))])
    run = ("--trainer.default_root_dir", out / "repvitok")
    settings = (*recipes, f"--data.folders={folders}", *run, *options.fit)
    _call(repvitok, "fit", *settings, "--ckpt_path", "last")
    _call(repvitok, "test", *settings)
    _call(repvitok, "export", "--ckpt", out / "repvitok", "--out", out / TOKENIZER, "--half", *license)

    encoded = ("--tokenizer", out / TOKENIZER, "--dataset", demonstrations, "--size", "64")
    _call(repvitok, "encode", *encoded, "--out", out / "latents")
    run = ("--data.latents", out / "latents", "--trainer.default_root_dir", out / "latent_action")
    settings = ("-c", RECIPES / "2_latent_action/tiny.yaml", *run)
    _call(latent_action, "fit", *settings, "--ckpt_path", "last")
    _call(latent_action, "validate", *settings, "--ckpt_path", "last")
    _call(latent_action, "export", "--ckpt", out / "latent_action", "--out", out / LAT, "--half", *license)
    return 0


def _call(command: Callable[[Sequence[str] | None], int], *arguments: object) -> None:
    if code := command([str(argument) for argument in arguments]):
        raise UserError(f"{arguments[0]} ended with exit code {code}; run the same command again to go on")


if __name__ == "__main__":
    raise SystemExit(main())
