"""`repvitok-small` in one command: collect, train, measure, export; given again it goes on where it was.

    uv run python tools/train_small.py --out runs/small --robot DATASET --license apache-2.0
    uv run python tools/weights_wheel.py --version 0.1.0 --license Apache-2.0 --out dist runs/small/repvitok-small

The data are demonstrations of Meta-World's fifty tasks and LeRobot data sets of real robots, each drawn three times as
often.
Options after `--` go to `repvitok fit`: -- --trainer.max_steps 2000
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from repvitok.cli import main as repvitok
from repvitok.runtime.errors import UserError, run_cli
from repwam_core.cli import main as repwam
from repwam_core.sim.metaworld.instructions import TASKS

RECIPES = Path(__file__).parents[1] / "recipes/1_repvitok"
NAME = "repvitok-small"


@run_cli
def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/small"), help="folder of the run (default: runs/small)")
    parser.add_argument("--robot", nargs="*", default=[], metavar="DATASET", help="LeRobot data sets of real robots")
    parser.add_argument("--episodes", type=int, default=8, help="demonstrations of each task (default: 8)")
    parser.add_argument("--workers", type=int, default=1, help="simulator processes (default: 1)")
    parser.add_argument("--license", help="of the weights, for the model card")
    parser.add_argument("fit", nargs="*", metavar="-- OPTION", help="of `repvitok fit`")
    options = parser.parse_args(argv)
    demonstrations, run = options.out / "metaworld", options.out / "repvitok"
    sizes = ("--size", "64", "64", "--act-repeat", "2", "--max-env-steps", "400", "--cameras", "corner2")
    collecting = ("--episodes", options.episodes, "--noise", "pushes", "--workers", options.workers)
    _call(repwam, "collect", "--tasks", *TASKS, *sizes, *collecting, "--out", demonstrations)
    folders = json.dumps([str(demonstrations), *(folder for folder in options.robot for _ in range(3))])
    recipes = ("-c", RECIPES / "tiny.yaml", "-c", RECIPES / "small.yaml")
    settings = (*recipes, f"--data.folders={folders}", "--trainer.default_root_dir", run, *options.fit)
    _call(repvitok, "fit", *settings, "--ckpt_path", "last")
    _call(repvitok, "test", *settings)
    license = () if options.license is None else ("--license", options.license)
    _call(repvitok, "export", "--ckpt", run, "--out", options.out / NAME, *license)
    return 0


def _call(command: Callable[[Sequence[str] | None], int], *arguments: object) -> None:
    if code := command([str(argument) for argument in arguments]):
        raise UserError(f"{arguments[0]} ended with exit code {code}; run the same command again to go on")


if __name__ == "__main__":
    raise SystemExit(main())
