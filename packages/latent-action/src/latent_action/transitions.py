"""All transitions of a folder of latent shards as tensors, ready to be indexed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from repvitok.data.latents import EpisodeInfo, LatentEpisode
from repvitok.data.split import LatentSpan
from repvitok.runtime.errors import UserError
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TransitionTable:
    """Standardised latent frames of many episodes, and where a transition starts.

    Attributes:
        frames: the latent frames of all episodes, one after another.
        first: index into `frames` of each transition's z_t; its z_{t+1} is the next frame.
        episode: index of the episode (in the source data set) each transition belongs to.
        place: which transition of its clip it is, from 0. Transition 0 starts at the latent of a single image, the
            others at one of several frames.
        actions: mean robot action during each transition, in the data's own units, or None.
        motion: change of the robot's state over each transition, in the data's own units, or None.
    """

    frames: Float[Tensor, "frames tokens d"]
    first: Int[Tensor, " transitions"]
    episode: Int[Tensor, " transitions"]
    place: Int[Tensor, " transitions"]
    actions: Float[Tensor, "transitions c"] | None
    motion: Float[Tensor, "transitions s"] | None

    def __len__(self) -> int:
        return self.first.shape[0]

    def pairs(self, index: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b tokens d"], Float[Tensor, "b tokens d"]]:
        """z_t and z_{t+1} of the transitions with these indices."""
        start = self.first[index]
        return self.frames[start], self.frames[start + 1]

    def of_episodes(self, episodes: Iterable[int]) -> TransitionTable:
        """The transitions of these episodes only; the frames are shared, not copied."""
        return self.where(torch.isin(self.episode, torch.tensor(sorted(episodes), dtype=torch.long)))

    def where(self, keep: Bool[Tensor, " transitions"]) -> TransitionTable:
        """The transitions marked true; the frames are shared, not copied."""
        actions, motion = (None if x is None else x[keep] for x in (self.actions, self.motion))
        return TransitionTable(self.frames, self.first[keep], self.episode[keep], self.place[keep], actions, motion)


def lie_within(
    spans: Sequence[LatentSpan], infos: Sequence[EpisodeInfo], first: Int[Tensor, " transitions"]
) -> Bool[Tensor, " transitions"]:
    """Which transitions lead from one latent frame of a span to another one of it.

    Args:
        spans: parts of some latent shards.
        infos: of all entries of the shards.
        first: where each transition starts in the frames of all entries, as `load_transitions` puts them.
    """
    # entries of one latent frame were not loaded; entry n begins at row begins[n] of all frames
    loaded = [info.frames if info.frames >= 2 else 0 for info in infos]
    begins = np.cumsum([0, *loaded])
    inside = torch.zeros(int(begins[-1]), dtype=torch.bool)
    for span in spans:
        # a transition starts at each frame of the span but the last, whose next frame lies outside
        inside[begins[span.number] + span.first : begins[span.number] + span.last - 1] = True
    return inside[first]


def load_transitions(episodes: Iterable[LatentEpisode], standardise: Callable[[Tensor], Tensor]) -> TransitionTable:
    """Read episodes into one table.

    Args:
        episodes: latent episodes, for example a `LatentShards`; those with one latent frame hold no transition.
        standardise: from raw latents (frames, tokens, d) to standardised ones.
    """
    frames: list[Tensor] = []
    first: list[Tensor] = []
    episode_of: list[Tensor] = []
    place: list[Tensor] = []
    actions: list[np.ndarray | None] = []
    motion: list[np.ndarray | None] = []
    start = 0
    for episode in episodes:
        count = len(episode.latents)
        if count < 2:
            continue
        frames.append(standardise(torch.from_numpy(episode.latents)))
        # an episode's last frame starts no transition: its next row is another episode's
        first.append(torch.arange(start, start + count - 1))
        episode_of.append(torch.full((count - 1,), episode.episode_index))
        place.append(torch.arange(count - 1))
        actions.append(None if episode.actions is None else episode.actions.mean(axis=1))
        motion.append(None if episode.state is None else np.diff(episode.state, axis=0))
        start += count
    if not frames:
        raise UserError(
            "No episode has two latent frames, so there is no transition to learn from: encode longer episodes."
        )
    return TransitionTable(
        frames=torch.cat(frames),
        first=torch.cat(first),
        episode=torch.cat(episode_of),
        place=torch.cat(place),
        actions=_joined(actions),
        motion=_joined(motion),
    )


def _joined(values: list[np.ndarray | None]) -> Tensor | None:
    """All episodes' values as one tensor, or None where an episode has none."""
    known = [value for value in values if value is not None]
    return torch.from_numpy(np.concatenate(known)).float() if len(known) == len(values) else None
