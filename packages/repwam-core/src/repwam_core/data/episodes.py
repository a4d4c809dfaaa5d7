"""Episodes in memory: standardised latents, scaled actions and embedded instructions, cut into training segments.

A segment is `F` consecutive transitions, so `F + 1` latent frames, of one episode. Everything is stacked once when the
store is made; drawing a batch is indexing alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from repvitok.data import LatentEpisode, LatentMeta, LatentShards
from repvitok.data.split import split_episodes
from torch import Tensor

from repwam_core.embodiment import ActionKind, ActionStatistics, StateStatistics, Statistics
from repwam_core.model.config import LATENT_SPACE
from repwam_core.text import EMBEDDED, TextEncoder


@dataclass(frozen=True)
class SegmentBatch:
    """Segments as the world action model trains on them.

    Attributes:
        latents: standardised latents, (b, frames, tokens, d).
        actions: scaled actions of each transition, (b, frames - 1, a, c).
        state: standardised robot state at each latent frame, (b, frames, S), or None.
        text: hidden states of the instruction, (b, s, D).
        text_mask: which of them are real tokens, (b, s).
        valid: which transitions are real; padding of a short episode is False and costs nothing, (b, frames - 1).
        channel_mask: which action channels the embodiment has, (b, c).
        episode: position of each segment's episode in the store, (b,).
        start: first latent frame of each segment in its episode, (b,).
        data_set: which of the run's data sets the segments are from.
    """

    latents: Float[Tensor, "b frames tokens d"]
    actions: Float[Tensor, "b transitions a c"]
    state: Float[Tensor, "b frames S"] | None
    text: Float[Tensor, "b s D"]
    text_mask: Bool[Tensor, "b s"]
    valid: Bool[Tensor, "b transitions"]
    channel_mask: Bool[Tensor, "b c"]
    episode: Int[Tensor, " b"]
    start: Int[Tensor, " b"]
    data_set: int = 0

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SegmentBatch:
        """Return the batch on `device`."""

        def moved(value: Any) -> Any:
            return value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value

        return SegmentBatch(**{name: moved(value) for name, value in vars(self).items()})


class EpisodeStore:
    """All episodes of some latent shards, ready to train on.

    `action_channels` and `state_channels` name what actions and states hold, in order; `channel_mask` says which of the
    action channels these episodes have. A channel they lack is zero.

    Args:
        shards: the shards, or their folder.
        space: "latent" for latent actions, any other name for the recorded robot actions.
        text_encoder: name of the text encoder, see `TextEncoder`.
        held_out: share of the recorded episodes held out, see `repvitok.data.split`.
        statistics: scaling to use instead of one counted on the training episodes (fine-tuning keeps its policy's).
        expect_digest: digest of the tokenizer that must have made the latents.
        units: unit of each action channel, for the statistics; "1" when None.
        kind: whether the recorded actions are "absolute" targets or "relative" changes.
        layout: action channels to place the episodes' own among, by name; theirs alone when None.
        state_layout: the same for the numbers of the state.
        number: of this data set in the run, see `SegmentBatch.data_set`.
    """

    def __init__(
        self,
        shards: LatentShards | str | Path,
        space: str = "robot",
        text_encoder: str = EMBEDDED,
        held_out: float = 0.0,
        statistics: Statistics | None = None,
        expect_digest: str | None = None,
        units: Sequence[str] | None = None,
        kind: ActionKind = "absolute",
        layout: Sequence[str] | None = None,
        state_layout: Sequence[str] | None = None,
        number: int = 0,
    ) -> None:
        self.shards = shards if isinstance(shards, LatentShards) else LatentShards(shards, expect_digest=expect_digest)
        self.meta: LatentMeta = self.shards.meta
        self.space, self.text_encoder, self.number = space, text_encoder, number
        episodes = list(self.shards)
        _require(episodes, space, self.shards)
        _, held_out_indices = split_episodes([episode.episode_index for episode in episodes], held_out)
        is_val = np.isin([episode.episode_index for episode in episodes], held_out_indices)
        self.train_episodes, self.val_episodes = np.flatnonzero(~is_val), np.flatnonzero(is_val)
        self.keys = [episode.key for episode in episodes]
        self.tasks = [episode.task for episode in episodes]
        self.lengths = np.array([len(episode.latents) for episode in episodes])
        self._first = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        training = [episodes[i] for i in self.train_episodes]
        self.statistics = statistics or count_statistics(training, self.meta, space, units, kind)
        state = self.statistics.state
        self.action_channels = tuple(self.statistics.actions.channels if layout is None else layout)
        self.state_channels = tuple((state.channels if state else ()) if state_layout is None else state_layout)
        self.channel_mask = torch.tensor([name in self.statistics.actions.channels for name in self.action_channels])
        self._stack(episodes)
        self._embed()

    @property
    def vectors_per_transition(self) -> int:
        """Action vectors per latent transition, a."""
        return self.actions.shape[1]

    def starts(self, episodes: Sequence[int] | np.ndarray, transitions: int) -> np.ndarray:
        """Return (n, 2) rows (episode, start) that cover `episodes` once, for evaluation."""
        rows = []
        for episode in episodes:
            last = max(0, self.lengths[episode] - 1 - transitions)
            firsts = {min(start, last) for start in range(0, max(1, self.lengths[episode] - 1), transitions)}
            rows += [(episode, start) for start in sorted(firsts)]
        return np.array(rows, dtype=np.int64).reshape(-1, 2)

    def batch(self, episode: np.ndarray, start: np.ndarray, transitions: int) -> SegmentBatch:
        """Gather segments of `transitions` transitions; beyond an episode's end its last frame is repeated."""
        episode, start = np.asarray(episode), np.asarray(start)
        last = (self.lengths[episode] - 1)[:, None]
        frame = start[:, None] + np.arange(transitions + 1)
        rows = torch.from_numpy(self._first[episode][:, None] + np.minimum(frame, last))
        text = torch.from_numpy(self._text_row[episode])
        return SegmentBatch(
            latents=self.latents[rows],
            actions=self.actions[rows[:, :-1]],
            state=None if self.state is None else self.state[rows],
            text=self.text[text],
            text_mask=self.text_mask[text],
            valid=torch.from_numpy(frame[:, :-1] < last),
            channel_mask=self.channel_mask.expand(len(episode), -1),
            episode=torch.from_numpy(episode.astype(np.int64)),
            start=torch.from_numpy(start.astype(np.int64)),
            data_set=self.number,
        )

    def _stack(self, episodes: list[LatentEpisode]) -> None:
        """Concatenate all frames; transition k of an episode lies in the row of its frame k, the last row is zero."""
        mean, std = _moments(self.meta)
        total = int(self.lengths.sum())
        tokens, d = episodes[0].latents.shape[1:]
        self.latents = torch.empty(total, tokens, d)
        scaled = [scale_actions(episode, self.statistics, self.space) for episode in episodes]
        columns = _columns(self.statistics.actions.channels, self.action_channels, "action")
        self.actions = torch.zeros(total, scaled[0].shape[1], len(self.action_channels))
        state = self.statistics.state
        state_columns = _columns(state.channels, self.state_channels, "state") if state else []
        self.state = torch.zeros(total, len(self.state_channels)) if self.state_channels else None
        for first, episode, actions in zip(self._first, episodes, scaled, strict=True):
            rows = slice(first, first + len(episode.latents))
            self.latents[rows] = torch.from_numpy((np.asarray(episode.latents, np.float32) - mean) / std)
            self.actions[first : first + len(actions), :, columns] = torch.from_numpy(actions)
            if self.state is not None and state is not None:
                self.state[rows, state_columns] = torch.from_numpy(state.standardise(_present(episode.state)))

    def _embed(self) -> None:
        """Embed each distinct instruction once; the hidden states are kept beside the shards."""
        texts = sorted(set(self.tasks))
        cache = text_cache(self.shards.root, self.text_encoder)
        encoder = TextEncoder(self.text_encoder)
        if cache.exists():
            encoder.load_cache(cache)
        if not encoder.knows(texts):
            encoder.encode(texts)
            encoder.save_cache(cache)
        self.text, self.text_mask = encoder.encode(texts)
        self._text_row = np.array([texts.index(task) for task in self.tasks])


class SegmentSampler:
    """Draws segments; item i depends on (seed, i) only, whatever the order, worker or rank that asks for it.

    A start is uniform in [-(F-1), len-2] and then clamped to [0, len-1-F]: so the transitions at an episode's borders
    are seen as often as those in its middle.
    """

    def __init__(self, store: EpisodeStore, transitions: int, seed: int = 0) -> None:
        if transitions < 1:
            raise ValueError(f"expected at least one transition per segment, got {transitions}")
        self.store, self.transitions, self.seed = store, transitions, seed
        lengths = store.lengths[store.train_episodes]
        self._ends = np.cumsum(np.maximum(lengths + transitions - 2, 0))

    def draw(self, index: int) -> tuple[int, int]:
        """Return (episode, start) of item `index`."""
        position = int(np.random.default_rng((self.seed, index)).integers(self._ends[-1]))
        row = int(np.searchsorted(self._ends, position, side="right"))
        episode = int(self.store.train_episodes[row])
        begin = position - (int(self._ends[row - 1]) if row else 0) - (self.transitions - 1)
        last = max(0, int(self.store.lengths[episode]) - 1 - self.transitions)
        return episode, min(max(begin, 0), last)

    def batch(self, indices: Sequence[int]) -> SegmentBatch:
        """Return the segments of `indices`."""
        rows = np.array([self.draw(index) for index in indices])
        return self.store.batch(rows[:, 0], rows[:, 1], self.transitions)


def text_cache(shards: Path, text_encoder: str) -> Path:
    """File beside the shards that holds their embedded instructions."""
    name = "".join(letter if letter.isalnum() else "-" for letter in text_encoder)
    return shards / f"text-{name}.safetensors"


def count_statistics(
    episodes: Sequence[LatentEpisode],
    meta: LatentMeta,
    space: str,
    units: Sequence[str] | None = None,
    kind: ActionKind = "absolute",
) -> Statistics:
    """Count action and state statistics over `episodes`; each action vector of a transition counts."""
    states = [episode.state for episode in episodes if episode.state is not None]
    has_state = bool(meta.state_names) and len(states) == len(episodes)
    state = StateStatistics.from_values(np.concatenate(states), meta.state_names) if has_state else None
    if space == LATENT_SPACE:
        values = np.concatenate([_present(episode.latent_actions) for episode in episodes])
        names = tuple(f"latent_action_{channel}" for channel in range(values.shape[-1]))
    else:
        actions = [_present(episode.actions) for episode in episodes]
        values = np.concatenate([array.reshape(-1, array.shape[-1]) for array in actions])
        names = meta.action_names
    return Statistics(ActionStatistics.from_values(values, names, units, kind), state)


def scale_actions(episode: LatentEpisode, statistics: Statistics, space: str) -> np.ndarray:
    """Return an episode's scaled actions, float32 (frames - 1, a, c).

    Robot actions go to [-1, 1] by their 1st and 99th percentile; latent actions have one vector per transition and are
    standardised by mean and deviation, as the latents are.
    """
    if space != LATENT_SPACE:
        return statistics.actions.normalise(_present(episode.actions))
    mean, std = np.array(statistics.actions.mean), np.maximum(np.array(statistics.actions.std), 1e-6)
    return (((_present(episode.latent_actions) - mean) / std)[:, None]).astype(np.float32)


def _require(episodes: list[LatentEpisode], space: str, shards: LatentShards) -> None:
    if not episodes:
        raise ValueError(f"{shards.root}: the latent shards hold no episodes")
    for episode in episodes:
        if len(episode.latents) < 2:
            raise ValueError(f"{shards.root}: episode {episode.key} has one latent frame; a transition needs two")
        if space == LATENT_SPACE and episode.latent_actions is None:
            raise ValueError(f"{shards.root}: episode {episode.key} has no latent actions; run `latent-action label`")
        if space != LATENT_SPACE and episode.actions is None:
            raise ValueError(f"{shards.root}: episode {episode.key} has no robot actions; action space {space!r}")


def _columns(names: Sequence[str], layout: Sequence[str], what: str) -> list[int]:
    """Where the named channels lie in a layout."""
    if missing := [name for name in names if name not in layout]:
        raise ValueError(f"expected a layout with every {what} channel of the episodes, it lacks {missing}")
    return [list(layout).index(name) for name in names]


def _moments(meta: LatentMeta) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(meta.mean, np.float32), np.maximum(np.asarray(meta.std, np.float32), 1e-6)


def _present(array: np.ndarray | None) -> np.ndarray:
    """An array that `_require` has found in every episode."""
    if array is None:
        raise ValueError("expected an array in every episode of the shards, one is missing")
    return array
