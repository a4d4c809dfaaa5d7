"""The arrays behind an episode store, scaled for training: in memory, or read from shards as they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from repvitok.data import LatentMeta, LatentShards
from repvitok.data.contents import without_actions
from repvitok.data.latents import Standardizer
from repvitok.data.split import LatentSpan
from repvitok.runtime.errors import UserError
from torch import Tensor

from repwam_core.model.config import LATENT_SPACE
from repwam_core.statistics import ActionKind, ActionStatistics, StateStatistics, Statistics, shared_channels

COUNTED_TRANSITIONS = 500_000
"""Statistics of more transitions than this are counted on evenly spaced episodes that have about so many."""


class Rows(NamedTuple):
    """Frames of some episodes, scaled.

    Attributes:
        latents: standardised latents, (b, frames, tokens, d).
        actions: scaled actions of the transition that begins at each frame but the last, (b, frames - 1, a, c).
        state: standardised states, (b, frames, S), or None.
        reference: the state that each transition's actions are measured from, in their scale, (b, frames - 1, c);
            None where actions are learned as they were recorded.
    """

    latents: Float[Tensor, "b frames tokens d"]
    actions: Float[Tensor, "b transitions a c"]
    state: Float[Tensor, "b frames S"] | None
    reference: Float[Tensor, "b transitions c"] | None


class EpisodeArrays(Protocol):
    """Where the frames of episodes, or of parts of them, are found."""

    vectors: int

    def rows(self, part: Int[np.ndarray, " b"], frame: Int[np.ndarray, "b frames"]) -> Rows:
        """Return frames, counted from each part's first; after a part's last transition actions are zero."""
        ...


@dataclass(frozen=True, eq=False)
class Scaling:
    """From what shards hold to what is trained on.

    Attributes:
        meta: of the shards.
        statistics: of actions and states.
        space: "latent" for latent actions, any other name for the recorded ones.
        action_channels, state_channels: the layout; channels that the episodes lack are zero.
    """

    meta: LatentMeta
    statistics: Statistics
    space: str
    action_channels: tuple[str, ...]
    state_channels: tuple[str, ...]

    def latents(self, raw: np.ndarray) -> Tensor:
        """Standardised latents (frames, tokens, d)."""
        return torch.from_numpy(self.meta.standardizer(np.asarray(raw, np.float32)))

    @property
    def from_state(self) -> bool:
        """Whether actions are measured from the state."""
        return self.space != LATENT_SPACE and self.statistics.actions.kind == "from_state"

    def reference(self, state: np.ndarray | None) -> Tensor:
        """What actions are measured from at each frame, in their scale and layout, but for a constant: (frames, c).

        Only differences between frames are used. The mean state is taken off before scaling, so that a small motion far
        from zero keeps its digits in float32.
        """
        statistics = self.statistics.actions
        mean = None if self.statistics.state is None else np.array(self.statistics.state.mean)
        moved = self.statistics.reference(state).astype(np.float64) - self.statistics.reference(mean)
        scaled = torch.from_numpy(statistics.scaled(moved))
        return _placed(scaled, statistics.channels, self.action_channels, "action")

    def actions(self, raw: np.ndarray, state: np.ndarray | None = None) -> Tensor:
        """Scaled actions (transitions, a, c) in the layout, measured from the state (transitions, S) before each.

        Robot actions go to [-1, 1] by their 1st and 99th percentile; latent actions have one vector per transition and
        are standardised by mean and standard deviation, as the latents are.
        """
        statistics = self.statistics.actions
        if self.space == LATENT_SPACE:
            standardised = Standardizer(np.array(statistics.mean), np.array(statistics.std))(raw)
            scaled = standardised[:, None].astype(np.float32)
        else:
            before = self.statistics.reference(state)[..., None, :] if self.from_state else 0.0
            scaled = statistics.normalise(raw - before)
        return _placed(torch.from_numpy(scaled), statistics.channels, self.action_channels, "action")

    def state(self, raw: np.ndarray | None) -> Tensor | None:
        """Standardised states (frames, S) in the layout, None where the data set has none."""
        statistics = self.statistics.state
        if not self.state_channels or statistics is None:
            return None
        if raw is None:
            raise UserError(f"{self.meta.source}: expected a robot state in every episode, one has none")
        scaled = torch.from_numpy(statistics.standardise(raw))
        return _placed(scaled, statistics.channels, self.state_channels, "state")


class StackedEpisodes:
    """Every part in memory, one after the other; drawing a batch is indexing alone.

    Transition k of a part lies in the row of its frame k; the row of its last frame is zero.
    """

    def __init__(self, shards: LatentShards, scaling: Scaling, parts: Sequence[LatentSpan]) -> None:
        lengths = np.array([part.last - part.first for part in parts])
        # part n begins at row _first[n] of all frames
        self._first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self.vectors = vectors_per_transition(shards, scaling.space, parts[0].number)
        total, (tokens, d) = int(lengths.sum()), (shards.meta.tokens, shards.meta.latent_dim)
        self.latents = torch.empty(total, tokens, d)
        self.actions = torch.zeros(total, self.vectors, len(scaling.action_channels))
        self.state = torch.zeros(total, len(scaling.state_channels)) if scaling.state_channels else None
        self.reference = torch.zeros(total, len(scaling.action_channels)) if scaling.from_state else None
        for part, first, length in zip(parts, self._first, lengths, strict=True):
            require_finite(shards, part.number, scaling.space, np.arange(part.first, part.last))
            arrays, frames = shards.mapped(part.number), slice(part.first, part.last)
            self.latents[first : first + length] = scaling.latents(arrays["latents"][frames])
            raw = read_actions(shards, part.number, scaling.space)[part.first : part.last - 1]
            state_si = arrays["state"][frames] if "state" in arrays else None
            # transition k leads from frame k to k + 1, so the last frame has none: its row stays zero
            before = None if state_si is None else state_si[:-1]
            self.actions[first : first + length - 1] = scaling.actions(raw, before)
            if self.reference is not None:
                self.reference[first : first + length] = scaling.reference(state_si)
            state = scaling.state(state_si)
            if self.state is not None and state is not None:
                self.state[first : first + length] = state

    def rows(self, part: Int[np.ndarray, " b"], frame: Int[np.ndarray, "b frames"]) -> Rows:
        """See `EpisodeArrays`."""
        rows = torch.from_numpy(self._first[part][:, None] + frame)  # (b, frames)
        before = rows[:, :-1]  # (b, transitions): a transition lies in the row of the frame it begins at
        return Rows(
            latents=self.latents[rows],
            actions=self.actions[before],
            state=None if self.state is None else self.state[rows],
            reference=None if self.reference is None else self.reference[before],
        )


class MappedEpisodes:
    """Episodes that stay in their shards: only the frames asked for are read, by memory maps.

    What was read lies in the operating system's page cache, which all ranks of a node share. A data set may be larger
    than the memory, and larger than what one rank ever reads.
    """

    def __init__(self, shards: LatentShards, scaling: Scaling, parts: Sequence[LatentSpan]) -> None:
        self._shards, self._scaling, self._parts = shards, scaling, parts
        self.vectors = vectors_per_transition(shards, scaling.space, parts[0].number)

    def rows(self, part: Int[np.ndarray, " b"], frame: Int[np.ndarray, "b frames"]) -> Rows:
        """See `EpisodeArrays`."""
        read = [self._read(self._parts[row], frames) for row, frames in zip(part, frame, strict=True)]
        latents, actions, states, references = zip(*read, strict=True)
        return Rows(torch.stack(latents), torch.stack(actions), _stacked(states), _stacked(references))

    def _read(
        self, part: LatentSpan, frames: Int[np.ndarray, " frames"]
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What `Rows` holds, of one part."""
        number, frames = part.number, part.first + frames
        arrays, scaling = self._shards.mapped(number), self._scaling
        require_finite(self._shards, number, scaling.space, frames)
        state_si = np.asarray(arrays["state"][frames]) if "state" in arrays else None
        raw = read_actions(self._shards, number, scaling.space)
        real = frames[:-1] < part.last - 1  # padding repeats the last frame, where no transition begins
        actions = torch.zeros(len(real), self.vectors, len(scaling.action_channels))
        if real.any():
            before = None if state_si is None else state_si[:-1][real]
            actions[torch.from_numpy(real)] = scaling.actions(np.asarray(raw[frames[:-1][real]]), before)
        state = scaling.state(state_si)
        if state is None and scaling.state_channels:
            state = torch.zeros(len(frames), len(scaling.state_channels))
        reference = scaling.reference(state_si)[:-1] if scaling.from_state else None
        return scaling.latents(arrays["latents"][frames]), actions, state, reference


def read_actions(shards: LatentShards, number: int, space: str) -> np.ndarray:
    """The actions of an episode as stored, (frames - 1, a, C), or latent actions (frames - 1, d_l)."""
    arrays = shards.mapped(number)
    name = "latent_actions" if space == LATENT_SPACE else "actions"
    if name not in arrays:
        key = shards.keys[number]
        if space == LATENT_SPACE:
            raise UserError(
                f"{shards.root}: episode {key} has no latent actions; make them with `latent-action label --lat LAT "
                f"--latents {shards.root} --out LABELLED`, and train on those"
            )
        raise UserError(f"{shards.root}: episode {key} has no robot actions. {without_actions(shards)}")
    return arrays[name]


def require_finite(
    shards: LatentShards, number: int, space: str, frames: Int[np.ndarray, " frames"] | None = None
) -> None:
    """Stop at an action or state of an episode that is no number; of its latent frames `frames` only, if given."""
    arrays, info, meta = {"actions": read_actions(shards, number, space)}, shards.infos[number], shards.meta
    if "state" in (stored := shards.mapped(number)):
        arrays["state"] = stored["state"]
    names = {"actions": meta.action_names if space != LATENT_SPACE else (), "state": meta.state_names}
    per = arrays["actions"].shape[1] if space != LATENT_SPACE else 1
    for what, array in arrays.items():
        # (frames,) of (frames, a, C) or (frames, S): one axis between, so that both are (frames, vectors, channels)
        chosen = np.arange(len(array)) if frames is None else frames[frames < len(array)]
        values = array[chosen].reshape(len(chosen), -1, array.shape[-1])
        if np.isfinite(values).all():
            continue
        frame, vector, channel = np.argwhere(~np.isfinite(values))[0]
        # row of the recording: `per` actions for each latent frame, from the raw frame that encoding began at
        row = info.offset + per * int(chosen[frame]) + int(vector)
        place = f"row {row}" if space != LATENT_SPACE else f"latent frame {chosen[frame]}"
        name = names[what][channel] if names[what] else channel
        raise UserError(
            f"{shards.root}: episode {info.episode_index}, {place}, channel {name!r} of the {what}: expected a number, "
            f"got {values[frame, vector, channel]}; mend the data set or leave the episode out, then encode it again"
        )


def vectors_per_transition(shards: LatentShards, space: str, number: int) -> int:
    """Action vectors of a latent transition, a; 1 for latent actions; read off entry `number` of the shards."""
    raw = read_actions(shards, number, space)
    return 1 if space == LATENT_SPACE else raw.shape[1]


def count_statistics(
    shards: LatentShards,
    parts: Sequence[LatentSpan],
    space: str,
    units: Sequence[str] | None = None,
    kind: ActionKind = "absolute",
    most: int = COUNTED_TRANSITIONS,
    chunk_frames: int = 1,
) -> Statistics:
    """Count action and state statistics over episodes or parts of them; each action vector of a transition counts.

    Actions of kind "from_state" are counted as they are learned: measured from the state at every frame from which a
    chunk of at most `chunk_frames` could reach them.

    Args:
        shards: the latent shards.
        parts: of the shards, of at least two latent frames each, see `repvitok.data.split.split_latents`.
        space: "latent" for latent actions.
        units: of the action channels.
        kind: what recorded actions are and what is learned of them.
        most: see `COUNTED_TRANSITIONS`.
        chunk_frames: latent frames of the longest chunk that is learned; for "from_state" alone.
    """
    meta = shards.meta
    reach = chunk_frames if kind == "from_state" and space != LATENT_SPACE else 1
    transitions = reach * sum(part.last - part.first - 1 for part in parts)
    # every n-th part, n = ceil(transitions / most): spread over the data set, whole parts
    counted = parts[:: max(1, -(-transitions // most))]
    for part in counted:
        require_finite(shards, part.number, space, np.arange(part.first, part.last))
    states: list[np.ndarray] = []
    if meta.state_names and all("state" in shards.mapped(part.number) for part in counted):
        states = [shards.mapped(part.number)["state"][part.first : part.last] for part in counted]
    state = StateStatistics.from_values(np.concatenate(states), meta.state_names) if states else None
    actions = [read_actions(shards, part.number, space)[part.first : part.last - 1] for part in counted]
    values = np.concatenate([array.reshape(-1, array.shape[-1]) for array in actions])
    if space == LATENT_SPACE:
        latent = tuple(f"latent_action_{channel}" for channel in range(values.shape[-1]))
        return Statistics(ActionStatistics.from_values(values, latent, units), state)
    if kind != "from_state":
        return Statistics(ActionStatistics.from_values(values, meta.action_names, units, kind), state)
    ours, theirs = shared_channels(meta.action_names, state.channels if state else ())
    learned = []
    for offset in range(reach):
        for array, before in zip(actions, states, strict=True):
            # the transition `offset` frames into a chunk, less the state at the frame the chunk began at
            changes = np.array(array[offset:])
            changes[..., ours] -= before[: len(changes), None, theirs]
            learned.append(changes.reshape(-1, changes.shape[-1]))
    recorded = ActionStatistics.from_values(values, meta.action_names, units)
    learned = ActionStatistics.from_values(np.concatenate(learned), meta.action_names, units, kind)
    return Statistics(learned, state, recorded)


def suggested_kind(shards: LatentShards, parts: Sequence[LatentSpan]) -> ActionKind:
    """How recorded actions are best learned: "from_state" where they are targets close to the robot's state.

    That is where every action channel has a state of its name and most lie in a range under half as wide when measured
    from it (docs/decisions/045); "absolute" otherwise.
    """
    if not set(shards.meta.action_names) <= set(shards.meta.state_names):
        return "absolute"
    statistics = count_statistics(shards, parts, "robot", kind="from_state")
    ranges = [np.subtract(counted.q99, counted.q01) for counted in (statistics.actions, statistics.targets)]
    return "from_state" if np.mean(ranges[0] < ranges[1] / 2) > 0.5 else "absolute"


def _stacked(values: Sequence[Tensor | None]) -> Tensor | None:
    present = [value for value in values if value is not None]
    return torch.stack(present) if present else None


def _placed(values: Tensor, names: Sequence[str], layout: Sequence[str], what: str) -> Tensor:
    """Put named channels, the last axis, where a layout has them."""
    if tuple(names) == tuple(layout):
        return values
    if missing := [name for name in names if name not in layout]:
        raise UserError(f"expected a layout with every {what} channel of the episodes, it lacks {missing}")
    # channel k of the episodes goes to the column that the layout has for its name
    placed = torch.zeros(*values.shape[:-1], len(layout))
    placed[..., [list(layout).index(name) for name in names]] = values
    return placed
