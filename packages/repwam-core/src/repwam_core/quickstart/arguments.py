"""The options of ``repwam quickstart``; no heavy imports, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from repvitok.runtime.commands import DEPTH_RANGE, episodes_argument, number, path_argument, text_argument, whole_number
from repvitok.runtime.documents import MAX_SIDE
from repvitok.runtime.errors import MOST_PROCESSES


def add_quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the quickstart's options to a parser."""
    parser.add_argument(
        "--out", type=path_argument, default=Path("runs/quickstart"), help="folder of the run (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=whole_number(0, 2**32 - 1), default=0, help="training and collection seed (default: %(default)s)"
    )
    parser.add_argument("--fresh", action="store_true", help="start over: drop the stages already done in --out")
    parser.add_argument(
        "--dataset",
        type=path_argument,
        help="run on this LeRobot data set (v2.0 to v3.0) instead of the simulator, ending in open-loop evaluation",
    )
    parser.add_argument(
        "--size",
        type=whole_number(16, MAX_SIDE),
        nargs=2,
        metavar=("H", "W"),
        help="frame size in pixels, multiples of 16",
    )
    parser.add_argument("--suite", type=text_argument, help="the simulator of --tasks (default: metaworld)")
    parser.add_argument(
        "--tasks",
        type=text_argument,
        nargs="+",
        metavar="TASK",
        help="simulated tasks (default: the recipe's three of Meta-World and its pair)",
    )
    parser.add_argument(
        "--episodes",
        type=episodes_argument,
        nargs="+",
        metavar="N",
        help="demonstrations per task (default: the recipe's); with --dataset the numbers of the episodes to use, and "
        "ranges of them: 0-9,12 (default: all)",
    )
    parser.add_argument(
        "--cameras", type=text_argument, nargs="+", help="with --dataset: cameras to use (default: all)"
    )
    parser.add_argument("--depth-range", **{**DEPTH_RANGE, "help": f"with --dataset: {DEPTH_RANGE['help']}"})
    parser.add_argument(
        "--eval-episodes",
        type=whole_number(1, 100_000),
        help="unseen seeds per task in closed loop (default: the recipe's)",
    )
    parser.add_argument(
        "--budget",
        type=number(0, 1000, above=True),
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
    parser.add_argument(
        "--workers", type=whole_number(1, MOST_PROCESSES), default=2, help="simulator processes (default: %(default)s)"
    )
