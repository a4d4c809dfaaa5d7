"""How a robot's numbers are scaled, and planned actions scored in that scale. No torch.

`action_si` is in the channel's own unit (SI, or as recorded), `action_norm` lies in about [-1, 1]. Statistics are of
recorded actions and states, kept in a file. The open-loop score is the share of planned actions that are nearer than a
threshold to the recorded ones. The paper reports it (Tables 2 and 4) and leaves norm, unit and what is counted open, so
all variants are computed and each says which it is (docs/decisions/036).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float
from repvitok.runtime.documents import Count, From0, load_json, parse, require_format
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import write_text_atomic

ActionKind = Literal["absolute", "relative", "from_state"]
"""What recorded actions are, and what is learned of them:

* "absolute": targets, learned as they are;
* "relative": changes, learned as they are;
* "from_state": targets, learned as changes from the robot's state at the frame before their chunk, channel by channel
  where action and state have one name. A policy gives targets again.
"""

Motion = Literal["still", "usual", "rare", "spiked"]
"""How a channel moves, see `motion`; what follows for its scaling is docs/decisions/055."""

STATISTICS_FORMAT = "repwam-statistics"
FORMAT_VERSION = 1
NOISE = 5e-5
"""A channel that stays within this, in its unit, never moves: arms repeat themselves to about 5e-5 m and 5e-5 rad."""
PRECISION = 1e-6
"""So does one that stays within this share of its size: a few roundings of float32."""
TOGGLE = 5e-3
"""So does one of at most three levels within this share of its size: an encoder that flickers between its steps."""
ROOM = 10.0
"""Where minimum and maximum span more than this many times the percentiles, something happens in 1 % of the rows."""
_NUMBERS = ("q01", "q99", "min", "max", "mean", "std")
STATE_LIMIT = 10.0
"""Standardised states are clipped here, so that a pose far outside the data cannot drown the other tokens."""
THRESHOLDS = (0.1, 0.05, 0.03, 0.01)
Norm = Literal["max", "l2", "l1"]
Span = Literal["step", "chunk"]
Scale = Literal["scaled", "si"]
NORMS: tuple[Norm, ...] = ("max", "l2", "l1")
SPANS: tuple[Span, ...] = ("step", "chunk")
SCALES: tuple[Scale, ...] = ("scaled", "si")


@dataclass(frozen=True)
class ActionStatistics:
    """Per-channel statistics of a data set's actions, and the scaling to [-1, 1] made from them.

    Attributes:
        channels: channel names, in the order of the action vector.
        units: their units.
        q01, q99: 1st and 99th percentile; min, max, mean, std: the usual.
        count: number of action vectors counted.
        kind: "absolute" (a target pose), "relative" (a change) or "from_state", see `ActionKind`.
        centre, scale: what becomes 0, and how far from it 1 is; scale 0 is a channel that never moves. None where the
            percentiles alone say both, as in files of version 0.1.
    """

    channels: tuple[str, ...]
    units: tuple[str, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[From0, ...]
    count: Count
    kind: ActionKind = "absolute"
    centre: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        fields = ("units", *_NUMBERS, *(name for name in ("centre", "scale") if getattr(self, name) is not None))
        sizes = {name: len(getattr(self, name)) for name in fields}
        wrong = {name: size for name, size in sizes.items() if size != len(self.channels)}
        if wrong:
            raise UserError(f"action statistics: expected {len(self.channels)} numbers a field, got {wrong}")
        if self.kind not in get_args(ActionKind):
            raise UserError(f"action statistics: kind must be one of {get_args(ActionKind)}, got {self.kind!r}")
        _check_scaling("action", self.centre, self.scale)

    @classmethod
    def from_values(
        cls,
        values: np.ndarray,
        channels: Sequence[str],
        units: Sequence[str] | None = None,
        kind: ActionKind = "absolute",
    ) -> ActionStatistics:
        """Count statistics over action vectors (n, c).

        The 1st to 99th percentile of an ordinary channel becomes [-1, 1]; of one that moves in under 1 % of the
        vectors, its minimum to maximum.
        """
        values = _checked_values(values, channels, "action")
        q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
        counted = cls(
            tuple(channels),
            tuple(units) if units is not None else ("1",) * len(channels),
            _floats(q01),
            _floats(q99),
            _floats(values.min(axis=0)),
            _floats(values.max(axis=0)),
            _floats(values.mean(axis=0)),
            _floats(values.std(axis=0)),
            len(values),
            kind,
        )
        motions = np.array([motion(column) for column in values.T])
        low, high = (np.where(motions == "rare", a, b) for a, b in ((counted.min, q01), (counted.max, q99)))
        scale = np.where(motions == "still", 0.0, (high - low) / 2)
        centre = np.where(motions == "still", counted.mean, (high + low) / 2)
        return replace(counted, **_unless(counted._affine, centre, scale))

    def widened(self, layout: Sequence[str]) -> ActionStatistics:
        """The statistics of these channels among those of a layout; a channel they lack is constantly zero."""
        if tuple(layout) == self.channels:
            return self
        fields = _NUMBERS if self.scale is None else (*_NUMBERS, "centre", "scale")
        numbers = {name: dict(zip(self.channels, getattr(self, name), strict=True)) for name in fields}
        values = {name: tuple(known.get(channel, 0.0) for channel in layout) for name, known in numbers.items()}
        units = dict(zip(self.channels, self.units, strict=True))
        return replace(self, channels=tuple(layout), units=tuple(units.get(name, "1") for name in layout), **values)

    def normalise(self, action_si: np.ndarray) -> np.ndarray:
        """`action_norm = (x - centre) / scale`, float32 (..., c); 0 for a channel that never moves.

        Of an ordinary channel that is `2 (x - q01) / (q99 - q01) - 1`.
        """
        self.check_channels(action_si)
        centre, scale = self._affine
        moves = scale > 0
        out = (np.asarray(action_si, np.float64) - centre) / np.where(moves, scale, 1.0)
        return np.where(moves, out, 0.0).astype(np.float32)

    def scaled(self, change_si: np.ndarray) -> np.ndarray:
        """A difference of actions in the scale of `normalise`: float32 (..., c), 0 for a channel that never moves."""
        self.check_channels(change_si)
        _, scale = self._affine
        return np.where(scale > 0, change_si / np.where(scale > 0, scale, 1.0), 0.0).astype(np.float32)

    def unscaled(self, change_norm: np.ndarray) -> np.ndarray:
        """Invert `scaled`: a difference in the channels' units, float32 (..., c), 0 for a channel that never moves."""
        self.check_channels(change_norm)
        return (np.asarray(change_norm, np.float64) * self._affine[1]).astype(np.float32)

    def denormalise(self, action_norm: np.ndarray) -> np.ndarray:
        """Invert `normalise`, float32 (..., c) in the channels' units; a still channel returns to its constant."""
        self.check_channels(action_norm)
        centre, scale = self._affine
        return (np.asarray(action_norm, np.float64) * scale + centre).astype(np.float32)

    def clip(self, action_si: np.ndarray) -> np.ndarray:
        """Clip actions (..., c) to the recorded [min, max] of each channel."""
        self.check_channels(action_si)
        return np.clip(action_si, np.array(self.min, np.float32), np.array(self.max, np.float32))

    def check_channels(self, actions: np.ndarray) -> None:
        """Raise a ValueError that names the channels where actions (..., c) have another number of them."""
        if actions.shape[-1] != len(self.channels):
            names = ", ".join(self.channels)
            raise UserError(f"expected actions with {len(self.channels)} channels ({names}), got shape {actions.shape}")

    @property
    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Centre and half-width per channel; half-width 0 marks a channel that never moves."""
        if self.centre is not None and self.scale is not None:
            return np.array(self.centre), np.array(self.scale)
        low, high = np.array(self.q01), np.array(self.q99)
        still = high - low <= PRECISION * np.maximum(1.0, np.abs(low))
        return np.where(still, np.array(self.mean), (high + low) / 2), np.where(still, 0.0, (high - low) / 2)

    def remarks(self) -> list[str]:
        """What a person should know of channels that are not ordinary: one line for each kind of them."""
        (centre, scale), low, high = self._affine, np.array(self.min), np.array(self.max)
        q01, q99, moves = np.array(self.q01), np.array(self.q99), scale > 0
        noise = np.maximum(NOISE, PRECISION * np.maximum(np.abs(q01), np.abs(q99)))
        lost = ~moves & (high - low > noise) & (self.scale is None)
        reach = np.maximum(high - centre, centre - low) / np.where(moves, scale, np.inf)
        kinds = {
            "never move and are learned as constants": ~moves & ~lost,
            "move in few rows and are learned as constants, as version 0.1 did; count statistics anew": lost,
            "move in few rows and are scaled by minimum and maximum": moves
            & (2 * scale == high - low)
            & (q99 - q01 < scale),
            "lie far outside their usual range in few rows; look for faults there": reach > ROOM,
        }
        return [
            f"{', '.join(name for name, has in zip(self.channels, which, strict=True) if has)}: {said}"
            for said, which in kinds.items()
            if which.any()
        ]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over every number and name: the identity of the scaling a checkpoint was trained with."""
        return hashlib.sha256(json.dumps(_fields(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class StateStatistics:
    """Per-channel mean and standard deviation of a data set's robot states.

    Attributes:
        channels: names of the numbers, in the order of the state vector.
        mean, std: of each.
        count: number of states counted.
        centre, scale: what becomes 0, and how far from it 1 is; scale 0 is a number that never changes. None where mean
            and standard deviation alone say both, as in files of version 0.1.
    """

    channels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[From0, ...]
    count: Count
    centre: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.mean) == len(self.std):
            sizes = f"{len(self.mean)} means and {len(self.std)} standard deviations"
            raise UserError(f"state statistics: expected {len(self.channels)} numbers a field, got {sizes}")
        _check_scaling("state", self.centre, self.scale)

    @classmethod
    def from_values(cls, values: np.ndarray, channels: Sequence[str]) -> StateStatistics:
        """Count statistics over state vectors (n, S); errors as in `ActionStatistics.from_values`.

        The range of a number that changes in under 1 % of the rows becomes [-1, 1]; where few rows lie far outside
        all others, they are left out of mean and standard deviation.
        """
        values = _checked_values(values, channels, "state")
        counted = cls(tuple(channels), _floats(values.mean(axis=0)), _floats(values.std(axis=0)), len(values))
        centre, scale = (np.array(numbers) for numbers in (counted.mean, counted.std))
        for channel, column in enumerate(values.T):
            moves = motion(column)
            if moves == "still":
                scale[channel] = 0.0
            elif moves == "rare":
                centre[channel], scale[channel] = (column.max() + column.min()) / 2, (column.max() - column.min()) / 2
            elif moves == "spiked":
                kept = column[
                    np.abs(column - np.median(column)) <= ROOM / 2 * np.ptp(np.quantile(column, [0.01, 0.99]))
                ]
                centre[channel], scale[channel] = kept.mean(), kept.std()
        return replace(counted, **_unless(counted._affine, centre, scale))

    def standardise(self, state: np.ndarray) -> np.ndarray:
        """`(x - centre) / scale` clipped to +-STATE_LIMIT, float32 (..., S); 0 for a number that never changes.

        Of an ordinary number centre and scale are mean and standard deviation.
        """
        if state.shape[-1] != len(self.channels):
            names = ", ".join(self.channels)
            raise UserError(f"expected a state of {len(self.channels)} numbers ({names}), got {state.shape}")
        centre, scale = self._affine
        moves = scale > 0
        out = np.where(moves, (np.asarray(state, np.float64) - centre) / np.where(moves, scale, 1.0), 0.0)
        return np.clip(out, -STATE_LIMIT, STATE_LIMIT).astype(np.float32)

    @property
    def still(self) -> tuple[str, ...]:
        """Names of the numbers that never change."""
        return tuple(name for name, scale in zip(self.channels, self._affine[1], strict=True) if scale == 0)

    @property
    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Centre and standard deviation per number; 0 marks one that never changes."""
        if self.centre is not None and self.scale is not None:
            return np.array(self.centre), np.array(self.scale)
        mean, std = np.array(self.mean), np.array(self.std)
        return mean, np.where(std > PRECISION * np.maximum(1.0, np.abs(mean)), std, 0.0)


@dataclass(frozen=True)
class Statistics:
    """What scales a policy's numbers: the file `statistics.json` beside a checkpoint.

    Attributes:
        actions: of what is learned.
        state: of the robot's states, if there are any.
        recorded: of the actions as they were recorded, where something else is learned of them ("from_state").
    """

    actions: ActionStatistics
    state: StateStatistics | None = None
    recorded: ActionStatistics | None = None

    def __post_init__(self) -> None:
        if (self.recorded is not None) != (self.actions.kind == "from_state"):
            raise UserError("statistics: expected those of the recorded actions with kind 'from_state', and only then")
        if self.recorded is not None:
            shared_channels(self.actions.channels, self.state.channels if self.state else ())

    @property
    def targets(self) -> ActionStatistics:
        """Statistics of the actions that a robot is given."""
        return self.actions if self.recorded is None else self.recorded

    def same_data(self, other: Statistics) -> bool:
        """Whether both were counted on the same numbers, whatever scaling followed from them."""

        def counted(statistics: Statistics) -> tuple[Any, ...]:
            state = statistics.state
            targets = replace(statistics.targets, centre=None, scale=None)
            return targets, None if state is None else replace(state, centre=None, scale=None), statistics.actions.kind

        return counted(self) == counted(other)

    def reference(self, state_si: np.ndarray | None) -> np.ndarray:
        """What actions are measured from: the states (..., S) of the channels' names, 0 elsewhere; float32 (..., c)."""
        if self.actions.kind != "from_state":
            return np.zeros(len(self.actions.channels), np.float32)
        if state_si is None or self.state is None:
            raise UserError("actions are measured from the robot's state (kind 'from_state'): expected one, got none")
        actions, states = shared_channels(self.actions.channels, self.state.channels)
        out = np.zeros((*state_si.shape[:-1], len(self.actions.channels)), np.float32)
        out[..., actions] = state_si[..., states]
        return out

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over actions and state."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write JSON with its digest, so that a hand-edited file is noticed when it is read."""
        values = {"format": STATISTICS_FORMAT, "format_version": FORMAT_VERSION, "digest": self.digest}
        write_text_atomic(path, json.dumps(values | self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote."""
        values = require_format(load_json(path), STATISTICS_FORMAT, FORMAT_VERSION, str(path))
        digest = values.pop("digest", None)
        statistics = cls.from_dict(values, str(path))
        if statistics.digest != digest:
            raise UserError(f"{path}: the numbers do not fit the stored digest; the file was changed by hand")
        return statistics

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "statistics") -> Statistics:
        """Invert `to_dict`; a wrong, missing or unknown field is a UserError that begins with `source`."""
        return parse(values, cls, source, required=("actions", "state"))

    def to_dict(self) -> dict[str, Any]:
        """JSON types and tuples; `from_dict` inverts it."""
        payload = {"actions": _fields(self.actions), "state": None if self.state is None else _fields(self.state)}
        return payload if self.recorded is None else payload | {"recorded": _fields(self.recorded)}

    def remarks(self) -> list[str]:
        """Lines about channels that are not ordinary, see `ActionStatistics.remarks`."""
        lines = [f"action channels {line}" for line in self.targets.remarks()]
        if self.recorded is not None:
            lines += [f"action channels, measured from the state, {line}" for line in self.actions.remarks()]
        if self.state is not None and self.state.still:
            lines.append(f"state channels {', '.join(self.state.still)}: never move and are left out")
        return lines


def motion(values: np.ndarray) -> Motion:
    """How one channel moves over its rows (n,); experiments behind each rule are in docs/decisions/055.

    * "still": it never moves, but for noise, rounding, or an encoder that flickers between neighbouring steps.
    * "usual": its 1st to 99th percentile is its range.
    * "rare": it moves in under 1 % of the rows, so that percentiles do not see it: a pulse, from rest or from noise.
    * "spiked": it moves, and few rows lie far outside all others: faults, or a heavy tail.

    Rows are in the order of time: what differs as much from one row to the next as over the whole is noise.
    """
    low, high = float(values.min()), float(values.max())
    q01, q99 = np.quantile(values, [0.01, 0.99])
    noise = max(NOISE, PRECISION * max(abs(q01), abs(q99)))
    if high - low <= ROOM * (q99 - q01):
        nearest = min(abs(low), abs(high)) if low * high > 0 else 0.0
        flickers = high - low <= TOGGLE * nearest and len(np.unique(values)) <= 3
        return "still" if q99 - q01 <= noise or flickers else "usual"
    if high - low <= noise:
        return "still"
    # What stays without the outermost 1 % on either side, in whole rows: a percentile may lie between rest and pulse.
    least = -(-len(values) // 100)
    ordered = np.sort(values)
    inner = ordered[-1 - least] - ordered[least]
    if inner <= noise:
        return "rare"
    away = np.abs(values - ordered[len(values) // 2])
    far, rest = away[away > ROOM / 2 * inner], values[away <= ROOM / 2 * inner]
    pulses = len(far) >= 3 and np.median(far) >= far.max() / 2
    return "rare" if pulses and np.square(np.diff(rest)).mean() > rest.var() else "spiked"


def shared_channels(actions: Sequence[str], states: Sequence[str]) -> tuple[list[int], list[int]]:
    """Columns of the actions and of the states that have one name."""
    columns = [(place, list(states).index(name)) for place, name in enumerate(actions) if name in states]
    if not columns:
        raise UserError(
            f"action_kind 'from_state': expected action and state channels of the same names, got actions "
            f"{', '.join(actions)} and states {', '.join(states) or 'none'}; name them alike or use 'absolute'"
        )
    return [place for place, _ in columns], [place for _, place in columns]


def _checked_values(values: np.ndarray, channels: Sequence[str], what: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or len(values) == 0 or values.shape[1] != len(channels):
        raise UserError(f"expected {what} vectors of shape (n > 0, {len(channels)}), got {values.shape}")
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise UserError(f"{what} vector {row} holds {values[row, column]} in channel {channels[column]!r}")
    return values


def _check_scaling(what: str, centre: Sequence[float] | None, scale: Sequence[float] | None) -> None:
    if (centre is None) != (scale is None) or (scale is not None and not min(scale) >= 0):
        raise UserError(f"{what} statistics: expected centre and scale >= 0, or neither, got {centre} and {scale}")


def _unless(known: tuple[np.ndarray, np.ndarray], centre: np.ndarray, scale: np.ndarray) -> dict[str, Any]:
    """Centre and scale as fields, where they are not known already: then a file stays as version 0.1 wrote it."""
    if np.array_equal(known, (centre, scale)):
        return {}
    return {"centre": _floats(centre), "scale": _floats(scale)}


def _fields(statistics: ActionStatistics | StateStatistics) -> dict[str, Any]:
    return {name: value for name, value in asdict(statistics).items() if value is not None}


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


@dataclass(frozen=True)
class ScoreVariant:
    """Which open-loop score.

    Attributes:
        norm: of the error over the channels of one action vector: its largest entry, Euclidean length, or sum.
        span: what counts: every action vector, or every planned chunk, which counts if all its vectors do.
        scale: "scaled" errors are of recorded actions whose 1st to 99th percentile spans [-1, 1], whatever is learned
            of them; "si" in recorded units.
    """

    norm: Norm = "max"
    span: Span = "step"
    scale: Scale = "scaled"

    def __str__(self) -> str:
        return f"{self.norm} norm, per {self.span}, {self.scale}"


HEADLINE = ScoreVariant()
"""What is printed first: of scaled actions, because one threshold for metres and radians alike has no meaning."""

VARIANTS = tuple(ScoreVariant(*choice) for choice in product(NORMS, SPANS, SCALES))


def step_norms(errors: Float[np.ndarray, "*steps c"], norm: Norm) -> Float[np.ndarray, "*steps"]:
    """The norm of each error vector; channels an embodiment lacks must be 0."""
    size = np.abs(errors)
    if norm == "max":
        return size.max(axis=-1)
    return np.sqrt((size**2).sum(axis=-1)) if norm == "l2" else size.sum(axis=-1)


def open_loop_score(
    chunks: Iterable[Float[np.ndarray, "_ c"]], variant: ScoreVariant, thresholds: Sequence[float] = THRESHOLDS
) -> dict[float, float]:
    """Return threshold -> score in [0, 1], a score being the share with an error strictly below the threshold.

    Args:
        chunks: errors (planned minus recorded) of each planned chunk, in the unit that `variant.scale` names.
        variant: the norm and what counts.
        thresholds: in that unit.
    """
    norms = [step_norms(errors, variant.norm) for errors in chunks if len(errors)]
    if not norms:
        raise UserError("open-loop score: expected at least one planned chunk, got none")
    values = np.concatenate(norms) if variant.span == "step" else np.array([steps.max() for steps in norms])
    return {threshold: float((values < threshold).mean()) for threshold in thresholds}


def count_below(
    errors: Float[np.ndarray, "b frames a c"], valid: Bool[np.ndarray, "b frames"], thresholds: Sequence[float]
) -> tuple[dict[float, int], int]:
    """Return how many action vectors of valid transitions are below each threshold in `HEADLINE`, and of how many."""
    norms = step_norms(errors[valid], HEADLINE.norm)
    return {threshold: int((norms < threshold).sum()) for threshold in thresholds}, norms.size
