"""All transitions of a folder of latent shards as tensors, ready to be indexed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.lib.stride_tricks import sliding_window_view
from repvitok.data.latents import EpisodeInfo, LatentEpisode
from repvitok.data.split import LatentSpan
from repvitok.runtime.errors import UserError
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TransitionTable:
    """Standardised latent frames of many episodes, and where a transition starts.

    Attributes:
        frames: the latent frames of all episodes, one after another.
        first: index into `frames` of each transition's z_t; its z_{t+1} is `transition_frames` later.
        episode: index of the episode (in the source data set) each transition belongs to.
        place: which transition of its clip it is, from 0. Transition 0 starts at the latent of a single image, the
            others at one of several frames.
        actions: mean robot action during each transition, in the data's own units, or None.
        motion: change of the robot's state over each transition, in the data's own units, or None.
        transition_frames: latent frames from a transition's z_t to its z_{t+1}.
    """

    frames: Float[Tensor, "frames tokens d"]
    first: Int[Tensor, " transitions"]
    episode: Int[Tensor, " transitions"]
    place: Int[Tensor, " transitions"]
    actions: Float[Tensor, "transitions c"] | None
    motion: Float[Tensor, "transitions s"] | None
    transition_frames: int = 1

    def __len__(self) -> int:
        return self.first.shape[0]

    def pairs(self, index: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b tokens d"], Float[Tensor, "b tokens d"]]:
        """z_t and z_{t+1} of the transitions with these indices."""
        start = self.first[index]
        return self.frames[start], self.frames[start + self.transition_frames]

    @cached_property
    def continued(self) -> Bool[Tensor, " transitions"]:
        """Which transitions are followed by another of this table, from their z_{t+1} on: triplets begin there."""
        return torch.isin(self.first + self.transition_frames, self.first)

    def after(self, index: Int[Tensor, " b"]) -> Float[Tensor, "b tokens d"]:
        """The frame to which the next transition leads; z_{t+1} itself where the table has no next one."""
        ahead = self.transition_frames * (1 + self.continued[index].long())
        return self.frames[self.first[index] + ahead]

    def of_episodes(self, episodes: Iterable[int]) -> TransitionTable:
        """The transitions of these episodes only; the frames are shared, not copied."""
        return self.where(torch.isin(self.episode, torch.tensor(sorted(episodes), dtype=torch.long)))

    def where(self, keep: Bool[Tensor, " transitions"]) -> TransitionTable:
        """The transitions marked true; the frames are shared, not copied."""
        actions, motion = (None if x is None else x[keep] for x in (self.actions, self.motion))
        return TransitionTable(
            self.frames,
            self.first[keep],
            self.episode[keep],
            self.place[keep],
            actions,
            motion,
            self.transition_frames,
        )


def lie_within(
    spans: Sequence[LatentSpan],
    infos: Sequence[EpisodeInfo],
    first: Int[Tensor, " transitions"],
    transition_frames: int = 1,
) -> Bool[Tensor, " transitions"]:
    """Which transitions lead from one latent frame of a span to another one of it.

    Args:
        spans: parts of some latent shards.
        infos: of all entries of the shards.
        first: where each transition starts in the frames of all entries, as `load_transitions` puts them.
        transition_frames: latent frames from a transition's beginning to its end.
    """
    # entries too short for a transition were not loaded; entry n begins at row begins[n] of all frames
    loaded = [info.frames if info.frames > transition_frames else 0 for info in infos]
    begins = np.cumsum([0, *loaded])
    inside = torch.zeros(int(begins[-1]), dtype=torch.bool)
    for span in spans:
        # a transition starts at each frame of the span but the last ones, which lead outside
        inside[
            begins[span.number] + span.first : begins[span.number] + max(span.first, span.last - transition_frames)
        ] = True
    return inside[first]


def load_transitions(
    episodes: Iterable[LatentEpisode], standardise: Callable[[Tensor], Tensor], transition_frames: int = 1
) -> TransitionTable:
    """Read episodes into one table.

    Args:
        episodes: latent episodes, for example a `LatentShards`; those too short hold no transition.
        standardise: from raw latents (frames, tokens, d) to standardised ones.
        transition_frames: latent frames from a transition's beginning to its end; one starts at every frame.
    """
    step = transition_frames
    frames: list[Tensor] = []
    first: list[Tensor] = []
    episode_of: list[Tensor] = []
    place: list[Tensor] = []
    actions: list[np.ndarray | None] = []
    motion: list[np.ndarray | None] = []
    start = 0
    for episode in episodes:
        count = len(episode.latents)
        if count <= step:
            continue
        frames.append(standardise(torch.from_numpy(episode.latents)))
        # an episode's last frames start no transition: it would end in another episode's rows
        first.append(torch.arange(start, start + count - step))
        episode_of.append(torch.full((count - step,), episode.episode_index))
        place.append(torch.arange(count - step))
        told = None if episode.actions is None else sliding_window_view(episode.actions.mean(axis=1), step, axis=0)
        actions.append(None if told is None else told.mean(axis=-1))
        motion.append(None if episode.state is None else episode.state[step:] - episode.state[:-step])
        start += count
    if not frames:
        needed = "two latent frames" if step == 1 else f"{step + 1} latent frames (transition_frames {step})"
        raise UserError(f"No episode has {needed}, so there is no transition to learn from: encode longer episodes.")
    return TransitionTable(
        frames=torch.cat(frames),
        first=torch.cat(first),
        episode=torch.cat(episode_of),
        place=torch.cat(place),
        actions=_joined(actions),
        motion=_joined(motion),
        transition_frames=step,
    )


def _joined(values: list[np.ndarray | None]) -> Tensor | None:
    """All episodes' values as one tensor, or None where an episode has none."""
    known = [value for value in values if value is not None]
    return torch.from_numpy(np.concatenate(known)).float() if len(known) == len(values) else None
