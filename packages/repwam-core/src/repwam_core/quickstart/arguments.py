"""The options of ``repwam quickstart``; no heavy imports, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the quickstart's options to a parser."""
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="folder of the run (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="training and collection seed (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="start over: drop the stages already done in --out")
    parser.add_argument(
        "--dataset",
        type=Path,
        help="run on this LeRobot data set (v2.1 or v3.0) instead of the simulator, ending in open-loop evaluation",
    )
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="frame size in pixels, multiples of 16")
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="Meta-World tasks (default: the recipe's three and its pair)",
    )
    parser.add_argument(
        "--episodes",
        nargs="+",
        metavar="N",
        help="demonstrations per task (default: the recipe's); with --dataset the numbers of the episodes to use, and "
        "ranges of them: 0-9,12 (default: all)",
    )
    parser.add_argument("--cameras", nargs="+", help="with --dataset: cameras to use (default: all)")
    parser.add_argument(
        "--eval-episodes", type=int, help="unseen seeds per task in closed loop (default: the recipe's)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=1.0,
        metavar="X",
        help="multiply the training steps of every stage (default: %(default)s, about a quarter of an hour on 2 cores)",
    )
    parser.add_argument(
        "--controls",
        action="store_true",
        help="also train the policy without latent actions, without the video objective and on an untrained "
        "tokenizer, and report what each of them buys (about twice the time again)",
    )
    parser.add_argument("--workers", type=int, default=2, help="simulator processes (default: %(default)s)")
