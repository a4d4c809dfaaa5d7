"""All transitions of a folder of latent shards as tensors, ready to be indexed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from repvitok.data.latents import LatentEpisode
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TransitionTable:
    """Standardised latent frames of many episodes, and where a transition starts.

    Attributes:
        frames: the latent frames of all episodes, one after another.
        first: index into `frames` of each transition's z_t; its z_{t+1} is the next frame.
        episode: index of the episode (in the source data set) each transition belongs to.
        actions: mean robot action during each transition, in the data's own units, or None.
    """

    frames: Float[Tensor, "frames tokens d"]
    first: Int[Tensor, " transitions"]
    episode: Int[Tensor, " transitions"]
    actions: Float[Tensor, "transitions c"] | None

    def __len__(self) -> int:
        return self.first.shape[0]

    def pairs(self, index: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b tokens d"], Float[Tensor, "b tokens d"]]:
        """z_t and z_{t+1} of the transitions with these indices."""
        start = self.first[index]
        return self.frames[start], self.frames[start + 1]

    def of_episodes(self, episodes: Iterable[int]) -> TransitionTable:
        """The transitions of these episodes only; the frames are shared, not copied."""
        keep = torch.isin(self.episode, torch.tensor(sorted(episodes), dtype=torch.long))
        actions = None if self.actions is None else self.actions[keep]
        return TransitionTable(self.frames, self.first[keep], self.episode[keep], actions)


def load_transitions(episodes: Iterable[LatentEpisode], standardise: Callable[[Tensor], Tensor]) -> TransitionTable:
    """Read episodes into one table.

    Args:
        episodes: latent episodes, for example a `LatentShards`; those with one latent frame hold no transition.
        standardise: from raw latents (frames, tokens, d) to standardised ones.

    Raises:
        ValueError: no episode has two latent frames.
    """
    frames: list[Tensor] = []
    first: list[Tensor] = []
    episode_of: list[Tensor] = []
    actions: list[np.ndarray | None] = []
    start = 0
    for episode in episodes:
        count = len(episode.latents)
        if count < 2:
            continue
        frames.append(standardise(torch.from_numpy(episode.latents)))
        first.append(torch.arange(start, start + count - 1))
        episode_of.append(torch.full((count - 1,), episode.episode_index))
        actions.append(None if episode.actions is None else episode.actions.mean(axis=1))
        start += count
    if not frames:
        raise ValueError(
            "No episode has two latent frames, so there is no transition to learn from: encode longer episodes."
        )
    known = [a for a in actions if a is not None]
    complete = len(known) == len(actions)
    return TransitionTable(
        frames=torch.cat(frames),
        first=torch.cat(first),
        episode=torch.cat(episode_of),
        actions=torch.from_numpy(np.concatenate(known)).float() if complete else None,
    )
