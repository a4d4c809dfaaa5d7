"""The README's figure: frames of held-out clips above what tokenizers make of them.

    uv run python benchmarks/reconstruction_figure.py --dataset DATASET --size 96 128 --held-out 0.34 \
        --tokenizers RUN/RepViTok_0/tokenizer RUN/ViTok_0/tokenizer --out packages/repvitok/docs/reconstructions.png

One clip of 9 frames from the middle of the first held-out episode(s), every second frame shown. Rows: the original,
then one per tokenizer, in the order given.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from repvitok import RepViTok
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.split import split_episodes
from repvitok.data.transforms import prepare_frames, to_uint8

FRAMES, SHOWN = 9, slice(0, None, 2)


def main() -> None:
    """Writes the figure as a PNG of 256 colours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a LeRobot data set")
    parser.add_argument("--size", type=int, nargs=2, required=True, metavar=("H", "W"))
    parser.add_argument("--held-out", type=float, required=True)
    parser.add_argument("--tokenizers", nargs="+", required=True, help="exported folders")
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizers = [RepViTok.from_pretrained(folder).eval() for folder in options.tokenizers]
    reader = LeRobotReader(options.dataset)
    _, held_out = split_episodes([info.index for info in reader.episodes], options.held_out)
    rows = []
    for episode in held_out[: options.clips]:
        clip = _middle(reader, episode, (options.size[0], options.size[1]))
        with torch.no_grad():
            rows += [_row(video) for video in (clip, *(tokenizer(clip)[0] for tokenizer in tokenizers))]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).quantize(256).save(options.out, optimize=True)
    print(f"{options.out}: {options.out.stat().st_size / 1000:.0f} kB, episodes {held_out[: options.clips]}")


def _middle(reader: LeRobotReader, episode: int, size: tuple[int, int]) -> torch.Tensor:
    length = next(found.length for found in reader.episodes if found.index == episode)
    start = (length - FRAMES) // 2
    frames = reader.frames(episode, reader.camera_keys[0], range(start, start + FRAMES))
    return prepare_frames(frames, size)[None]


def _row(video: torch.Tensor) -> np.ndarray:
    return rearrange(to_uint8(video[0, :, SHOWN]), "c t h w -> h (t w) c").numpy()


if __name__ == "__main__":
    main()
