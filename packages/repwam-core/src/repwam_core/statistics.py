"""What scales a robot's numbers: statistics of recorded actions and states, and the file that keeps them. No torch.

`action_si` is in the channel's own unit (SI, or as recorded), `action_norm` lies in about [-1, 1].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from repvitok.errors import UserError
from repvitok.files import write_text_atomic

from repwam_core.embodiment import check_keys

ActionKind = Literal["absolute", "relative", "from_state"]
"""What recorded actions are, and what is learned of them:

* "absolute": targets, learned as they are;
* "relative": changes, learned as they are;
* "from_state": targets, learned as changes from the robot's state at the frame before their chunk, channel by channel
  where action and state have one name. A policy gives targets again.
"""

STATISTICS_FORMAT = "repwam-statistics"
FORMAT_VERSION = 1
DEGENERATE = 1e-6
"""A channel whose spread is below this share of its size (or of one) never moves: it carries no information."""
_NUMBERS = ("q01", "q99", "min", "max", "mean", "std")
STATE_LIMIT = 10.0
"""Standardised states are clipped here, so that a pose far outside the data cannot drown the other tokens."""


@dataclass(frozen=True)
class ActionStatistics:
    """Per-channel statistics of a data set's actions, and the scaling to [-1, 1] made from them.

    Attributes:
        channels: channel names, in the order of the action vector.
        units: their units.
        q01, q99: 1st and 99th percentile; min, max, mean, std: the usual.
        count: number of action vectors counted.
        kind: "absolute" (a target pose), "relative" (a change) or "from_state", see `ActionKind`.
    """

    channels: tuple[str, ...]
    units: tuple[str, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int
    kind: ActionKind = "absolute"

    def __post_init__(self) -> None:
        sizes = {name: len(getattr(self, name)) for name in ("units", "q01", "q99", "min", "max", "mean", "std")}
        wrong = {name: size for name, size in sizes.items() if size != len(self.channels)}
        if wrong:
            raise UserError(f"action statistics: expected {len(self.channels)} numbers a field, got {wrong}")
        if self.kind not in get_args(ActionKind):
            raise UserError(f"action statistics: kind must be one of {get_args(ActionKind)}, got {self.kind!r}")

    @classmethod
    def from_values(
        cls,
        values: np.ndarray,
        channels: Sequence[str],
        units: Sequence[str] | None = None,
        kind: ActionKind = "absolute",
    ) -> ActionStatistics:
        """Count statistics over action vectors (n, c).

        Raises:
            ValueError: when there are no vectors, a wrong number of channels, or a value that is not finite.
        """
        values = _checked_values(values, channels, "action")
        q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
        return cls(
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

    def widened(self, layout: Sequence[str]) -> ActionStatistics:
        """The statistics of these channels among those of a layout; a channel they lack is constantly zero."""
        if tuple(layout) == self.channels:
            return self
        numbers = {name: dict(zip(self.channels, getattr(self, name), strict=True)) for name in _NUMBERS}
        values = {name: tuple(known.get(channel, 0.0) for channel in layout) for name, known in numbers.items()}
        units = dict(zip(self.channels, self.units, strict=True))
        return replace(self, channels=tuple(layout), units=tuple(units.get(name, "1") for name in layout), **values)

    def normalise(self, action_si: np.ndarray) -> np.ndarray:
        """`action_norm = 2 (x - q01) / (q99 - q01) - 1`, float32 (..., c); 0 for a channel that never moves."""
        scale, centre = self._affine(action_si)
        moves = scale > 0
        out = (np.asarray(action_si, np.float64) - centre) / np.where(moves, scale, 1.0)
        return np.where(moves, out, 0.0).astype(np.float32)

    def scaled(self, change_si: np.ndarray) -> np.ndarray:
        """A difference of actions in the scale of `normalise`: float32 (..., c), 0 for a channel that never moves."""
        scale, _ = self._affine(change_si)
        return np.where(scale > 0, change_si / np.where(scale > 0, scale, 1.0), 0.0).astype(np.float32)

    def denormalise(self, action_norm: np.ndarray) -> np.ndarray:
        """Invert `normalise`, float32 (..., c) in the channels' units; a still channel returns to its constant."""
        scale, centre = self._affine(action_norm)
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

    def _affine(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Half-width and centre per channel; half-width 0 marks a channel that never moves."""
        self.check_channels(actions)
        low, high = np.array(self.q01), np.array(self.q99)
        still = high - low <= DEGENERATE * np.maximum(1.0, np.abs(low))
        return np.where(still, 0.0, (high - low) / 2), np.where(still, np.array(self.mean), (high + low) / 2)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over every number and name: the identity of the scaling a checkpoint was trained with."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class StateStatistics:
    """Per-channel mean and standard deviation of a data set's robot states."""

    channels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int

    @classmethod
    def from_values(cls, values: np.ndarray, channels: Sequence[str]) -> StateStatistics:
        """Count statistics over state vectors (n, S); errors as in `ActionStatistics.from_values`."""
        values = _checked_values(values, channels, "state")
        return cls(tuple(channels), _floats(values.mean(axis=0)), _floats(values.std(axis=0)), len(values))

    def standardise(self, state: np.ndarray) -> np.ndarray:
        """`(x - mean) / std` clipped to +-STATE_LIMIT, float32 (..., S); 0 for a number that never changes."""
        if state.shape[-1] != len(self.channels):
            names = ", ".join(self.channels)
            raise UserError(f"expected a state of {len(self.channels)} numbers ({names}), got {state.shape}")
        mean, std = np.array(self.mean), np.array(self.std)
        moves = std > DEGENERATE * np.maximum(1.0, np.abs(mean))
        out = np.where(moves, (np.asarray(state, np.float64) - mean) / np.where(moves, std, 1.0), 0.0)
        return np.clip(out, -STATE_LIMIT, STATE_LIMIT).astype(np.float32)


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

    def reference(self, state_si: np.ndarray | None) -> np.ndarray:
        """What actions are measured from: the states (..., S) of the channels' names, 0 elsewhere; float32 (..., c).

        Raises:
            ValueError: a state is needed and there is none.
        """
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
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when it is no statistics file, or its numbers do not fit its digest.
        """
        values = json.loads(Path(path).read_text())
        if values.get("format") != STATISTICS_FORMAT or values.get("format_version") != FORMAT_VERSION:
            got = f"{values.get('format')!r} version {values.get('format_version')!r}"
            raise UserError(f"{path}: expected {STATISTICS_FORMAT!r} version {FORMAT_VERSION}, got {got}")
        check_keys(str(path), values["actions"], ActionStatistics.__dataclass_fields__)
        statistics = cls.from_dict(values)
        if statistics.digest != values["digest"]:
            raise UserError(f"{path}: the numbers do not fit the stored digest; the file was changed by hand")
        return statistics

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Statistics:
        """Invert `to_dict`; other keys are not looked at."""
        state, recorded = values["state"], values.get("recorded")
        return cls(
            ActionStatistics(**_tuples(values["actions"])),
            None if state is None else StateStatistics(**_tuples(state)),
            None if recorded is None else ActionStatistics(**_tuples(recorded)),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON types and tuples; `from_dict` inverts it."""
        payload = {"actions": asdict(self.actions), "state": None if self.state is None else asdict(self.state)}
        return payload if self.recorded is None else payload | {"recorded": asdict(self.recorded)}


def shared_channels(actions: Sequence[str], states: Sequence[str]) -> tuple[list[int], list[int]]:
    """Columns of the actions and of the states that have one name.

    Raises:
        ValueError: there are none.
    """
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


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
