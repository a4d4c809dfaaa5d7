"""Pairs of frames in pixels, one for every transition of some latent shards, for baselines that see pixels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.shards import LatentShards
from repvitok.data.transforms import resize_frames, to_unit
from repvitok.runtime.errors import UserError
from repvitok.runtime.training import EndlessLoader
from torch import Tensor


class FramePair(NamedTuple):
    """Pixels in [-1, 1] at the two ends of each of b transitions."""

    x_t: Float[Tensor, "b 3 h w"]
    x_next: Float[Tensor, "b 3 h w"]


@dataclass(frozen=True, eq=False)
class FrameTable:
    """The frames of many episodes at the ends of their transitions, in the order of `load_transitions`.

    Attributes:
        frames: uint8, one episode after another; several cameras stand side by side.
        first: index into `frames` of each transition's x_t; its x_{t+1} is the next frame.
        episode: index of the episode each transition belongs to.
    """

    frames: UInt8[Tensor, "frames h w 3"]
    first: Int[Tensor, " transitions"]
    episode: Int[Tensor, " transitions"]

    def __len__(self) -> int:
        return self.first.shape[0]

    def pairs(self, index: Int[Tensor, " b"]) -> FramePair:
        """Both frames of the transitions with these indices."""
        start = self.first[index]
        return FramePair(_pixels(self.frames[start]), _pixels(self.frames[start + 1]))

    def of_episodes(self, episodes: list[int]) -> FrameTable:
        """The transitions of these episodes only; the frames are shared."""
        return self.where(torch.isin(self.episode, torch.tensor(sorted(episodes), dtype=torch.long)))

    def where(self, keep: Bool[Tensor, " transitions"]) -> FrameTable:
        """The transitions marked true; the frames are shared."""
        return FrameTable(self.frames, self.first[keep], self.episode[keep])


def load_frame_table(latents: str | Path, dataset: str | Path, size: tuple[int, int]) -> FrameTable:
    """Read the last raw frame of every latent frame, so that transition i of the latents is transition i here.

    Args:
        latents: folder of latent shards; says which episodes, offsets, stride, cameras and depth range.
        dataset: the LeRobot data set they were made from.
        size: height and width of a frame with all its cameras side by side, in pixels.
    """
    shards = LatentShards(latents)
    reader = LeRobotReader(dataset, depth_range=shards.meta.depth_range)
    cameras = shards.meta.cameras
    if missing := sorted(set(cameras) - set(reader.camera_keys)):
        raise UserError(f"{dataset} has no cameras {missing}, which {latents} were made from: give that data set.")
    if size[1] % len(cameras):
        raise UserError(f"size {size}: {len(cameras)} cameras side by side need a width that they divide.")
    view = (size[0], size[1] // len(cameras))
    frames: list[np.ndarray] = []
    first: list[Tensor] = []
    episode_of: list[Tensor] = []
    start = 0
    for episode in shards:
        count = len(episode.latents)
        if count < 2:
            continue
        wanted = (episode.offset + shards.meta.frames_per_latent * np.arange(count)).tolist()
        views = [resize_frames(reader.frames(episode.episode_index, camera, wanted), view) for camera in cameras]
        frames.append(np.concatenate(views, axis=2))
        first.append(torch.arange(start, start + count - 1))
        episode_of.append(torch.full((count - 1,), episode.episode_index))
        start += count
    if not frames:
        raise UserError(f"{latents}: no episode has two latent frames, so there is no transition to learn from.")
    return FrameTable(torch.from_numpy(np.concatenate(frames)), torch.cat(first), torch.cat(episode_of))


class PairBatches(EndlessLoader[FramePair]):
    """Batches of frame pairs: endless random ones, of (seed, number, rank) alone, or every pair once `in_order`."""

    def __init__(
        self,
        table: FrameTable,
        batch_size: int,
        seed: int,
        first_batch: int = 0,
        rank: int = 0,
        *,
        in_order: bool = False,
    ) -> None:
        super().__init__(first_batch)
        self.table = table
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.in_order = in_order

    def draw(self, number: int) -> Int[Tensor, " b"]:
        """The transitions of random batch `number`, drawn with replacement: those that `TrainingBatches` draws."""
        random = np.random.default_rng([self.seed, number, self.rank])
        return torch.from_numpy(random.integers(len(self.table), size=self.batch_size))

    def batch(self, number: int) -> FramePair:
        """Random batch `number`."""
        return self.table.pairs(self.draw(number))

    def batches_from(self, number: int) -> Iterator[FramePair]:
        """Random batch `number` and those after it."""
        return map(self.batch, itertools.count(number))

    def __len__(self) -> int:
        return -(-len(self.table) // self.batch_size) if self.in_order else super().__len__()

    def __iter__(self) -> Iterator[FramePair]:
        if not self.in_order:
            return super().__iter__()
        index = torch.arange(len(self.table))
        return (self.table.pairs(index[k * self.batch_size : (k + 1) * self.batch_size]) for k in range(len(self)))


def _pixels(frames: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    return to_unit(rearrange(frames, "b h w rgb -> b rgb h w"))
