"""Is reading data slower than in another checkout? CPU seconds of the reader, of encode and of latents, in pairs.

    uv run python benchmarks/data_reading.py --against OTHER/.venv/bin/python [--repeats 7]

Writes a LeRobot data set (8 episodes of 150 frames, two cameras of 96 x 96, states and actions of 14 numbers) into a
temporary folder. Then both interpreters take turns, each time in a process of its own: open the data set and read all
tables; read all frames in order; encode with a small untrained tokenizer; open the latents and read all of them, which
compares their digests where the checkout does that. Times are CPU time of the process, so that other jobs on the
machine matter little; the table has medians and the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from repvitok import RepViTok, RepViTokConfig
from repvitok.data import LatentShards, LeRobotReader, LeRobotWriter
from repvitok.encoding import encode_dataset

CAMERAS = ("observation.images.left", "observation.images.right")
EPISODES, FRAMES, SIDE, NUMBERS = 8, 150, 96, 14


def main() -> None:
    """Write the data, measure in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="the Python of another checkout's environment")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    if options.against is None:
        parser.error("give --against")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "data")
        pairs = [[_run(python, folder) for python in (options.against, sys.executable)] for _ in range(options.repeats)]
    head = f"CPU seconds, median of {options.repeats}"
    print(f"{head:<44}{'other':>9}{'this':>9}{'ratio':>8}  smallest to largest")
    for what in pairs[0][0]:
        ratios = sorted(this[what] / other[what] for other, this in pairs)
        medians = [statistics.median(pair[side][what] for pair in pairs) for side in (0, 1)]
        print(
            f"{what:<44}{medians[0]:>9.3f}{medians[1]:>9.3f}{statistics.median(ratios):>8.2f}  "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        )


def _run(python: str, folder: str) -> dict[str, float]:
    command = [python, __file__, "--measure", folder]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def write(root: Path) -> None:
    """A data set of moving noise."""
    names, rng = [f"joint_{number}" for number in range(NUMBERS)], np.random.default_rng(0)
    cameras = dict.fromkeys(CAMERAS, (SIDE, SIDE))
    writer = LeRobotWriter(
        root, fps=30, cameras=cameras, state_names=names, action_names=names, robot_type="arm", version="v3.0"
    )
    for episode in range(EPISODES):
        scene = rng.integers(0, 256, (SIDE + FRAMES, SIDE, 3), np.uint8)
        moving = np.stack([scene[frame : frame + SIDE] for frame in range(FRAMES)])
        state, action = rng.normal(size=(2, FRAMES, NUMBERS)).astype(np.float32)
        writer.add_episode(episode, frames=dict.fromkeys(CAMERAS, moving), state=state, action=action, task="move")
    writer.finalize()


def measure(folder: Path) -> dict[str, float]:
    """CPU seconds of each kind of reading."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = RepViTok(RepViTokConfig(width=64, depth=2, heads=2, latent_dim=16)).eval()
    with tempfile.TemporaryDirectory() as out:
        return {
            "open, read all tables": _seconds(lambda: _tables(folder / "data")),
            "read all frames": _seconds(lambda: _frames(folder / "data")),
            "encode": _seconds(lambda: encode_dataset(tokenizer, LeRobotReader(folder / "data"), out, size=(64, 64))),
            "open and read all latents": _seconds(lambda: list(LatentShards(out))),
        }


def _tables(root: Path) -> None:
    reader = LeRobotReader(root)
    for info in reader.episodes:
        reader.episode(info.index)


def _frames(root: Path) -> None:
    reader = LeRobotReader(root)
    for info in reader.episodes:
        for camera in CAMERAS:
            reader.frames(info.index, camera)


def _seconds(work: Callable[[], object]) -> float:
    begun_s = time.process_time()
    work()
    return time.process_time() - begun_s


if __name__ == "__main__":
    main()
