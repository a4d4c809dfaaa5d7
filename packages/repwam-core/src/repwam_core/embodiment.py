"""What a robot is to the model: named action and state channels with units, and how their numbers are scaled.

No torch here, so that a robot's own environment can import it. Conventions:

* `action_si` is in the channel's own unit (SI, or as recorded), `action_norm` lies in about [-1, 1];
* several embodiments share one layout of *named* channels: what an embodiment lacks is zero and masked out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

ActionKind = Literal["absolute", "relative"]

STATISTICS_FORMAT = "repwam-statistics"
FORMAT_VERSION = 1
DEGENERATE = 1e-6
"""A channel whose spread is below this share of its size (or of one) never moves: it carries no information."""
_NUMBERS = ("q01", "q99", "min", "max", "mean", "std")
STATE_LIMIT = 10.0
"""Standardised states are clipped here, so that a pose far outside the data cannot drown the other tokens."""


@dataclass(frozen=True)
class ActionChannel:
    """One number of an action vector: `name` ("gripper", "left_wrist_roll") and its `unit` ("rad", "1")."""

    name: str
    unit: str = "1"


@dataclass(frozen=True)
class Embodiment:
    """A robot as the model meets it.

    Attributes:
        name: what the robot is called, for example "metaworld-sawyer".
        action_channels: the action vector's channels, in order.
        state_channels: names of the state vector's numbers, in order; empty when no state is recorded.
        cameras: camera keys, in the order in which their views are tokenised.
        rate_hz: control rate of the recorded actions.
    """

    name: str
    action_channels: tuple[ActionChannel, ...]
    state_channels: tuple[str, ...]
    cameras: tuple[str, ...]
    rate_hz: float

    def __post_init__(self) -> None:
        names = [channel.name for channel in self.action_channels]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"embodiment {self.name!r}: expected distinct action channel names, got {names}")
        if not self.rate_hz > 0:
            raise ValueError(f"embodiment {self.name!r}: expected rate_hz > 0, got {self.rate_hz}")

    @property
    def action_names(self) -> tuple[str, ...]:
        """Names of the action channels, in order."""
        return tuple(channel.name for channel in self.action_channels)

    @property
    def action_units(self) -> tuple[str, ...]:
        """Units of the action channels, in order."""
        return tuple(channel.unit for channel in self.action_channels)

    @classmethod
    def from_names(
        cls,
        name: str,
        action_names: Sequence[str],
        state_names: Sequence[str] = (),
        cameras: Sequence[str] = (),
        rate_hz: float = 1.0,
        units: Sequence[str] | None = None,
    ) -> Embodiment:
        """Build an embodiment from the names that a LeRobot data set or latent shards carry.

        Raises:
            ValueError: when `units` are given and are not as many as the channels.
        """
        units = ["1"] * len(action_names) if units is None else list(units)
        if len(units) != len(action_names):
            raise ValueError(f"expected one unit per action channel ({len(action_names)}), got {len(units)}")
        channels = tuple(ActionChannel(n, u) for n, u in zip(action_names, units, strict=True))
        return cls(name, channels, tuple(state_names), tuple(cameras), float(rate_hz))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; `from_dict` inverts it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Embodiment:
        """Invert `to_dict`; a missing or unknown key is a ValueError."""
        _check_keys("embodiment", values, cls.__dataclass_fields__)
        channels = tuple(ActionChannel(**channel) for channel in values["action_channels"])
        state, cameras = tuple(values["state_channels"]), tuple(values["cameras"])
        return cls(values["name"], channels, state, cameras, values["rate_hz"])


@dataclass(frozen=True)
class ChannelLayout:
    """One order of named action channels that several embodiments share."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, embodiments: Sequence[Embodiment]) -> ChannelLayout:
        """Return the union of the embodiments' channels, in order of first appearance.

        Raises:
            ValueError: when one name comes with two units.
        """
        units: dict[str, str] = {}
        for embodiment in embodiments:
            for channel in embodiment.action_channels:
                if units.setdefault(channel.name, channel.unit) != channel.unit:
                    raise ValueError(
                        f"action channel {channel.name!r} has unit {channel.unit!r} in {embodiment.name!r} but "
                        f"{units[channel.name]!r} elsewhere; convert one of them or rename the channel"
                    )
        return cls(tuple(units))

    def mask(self, embodiment: Embodiment) -> np.ndarray:
        """Return bool (c,): which of the layout's channels `embodiment` has."""
        own = set(embodiment.action_names)
        return np.array([name in own for name in self.names])

    def scatter(self, actions: np.ndarray, embodiment: Embodiment) -> np.ndarray:
        """Place actions (..., c_embodiment) into the layout (..., c); absent channels are zero."""
        out = np.zeros((*actions.shape[:-1], len(self.names)), dtype=actions.dtype)
        out[..., self._columns(embodiment)] = actions
        return out

    def gather(self, actions: np.ndarray, embodiment: Embodiment) -> np.ndarray:
        """Invert `scatter`: take the embodiment's channels out of (..., c)."""
        return actions[..., self._columns(embodiment)]

    def _columns(self, embodiment: Embodiment) -> list[int]:
        missing = [name for name in embodiment.action_names if name not in self.names]
        if missing:
            raise ValueError(f"embodiment {embodiment.name!r} has channels the layout lacks: {missing}")
        return [self.names.index(name) for name in embodiment.action_names]


@dataclass(frozen=True)
class ActionStatistics:
    """Per-channel statistics of a data set's actions, and the scaling to [-1, 1] made from them.

    Attributes:
        channels: channel names, in the order of the action vector.
        units: their units.
        q01, q99: 1st and 99th percentile; min, max, mean, std: the usual.
        count: number of action vectors counted.
        kind: "absolute" (a target pose) or "relative" (a change).
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
            raise ValueError(f"action statistics: expected {len(self.channels)} numbers a field, got {wrong}")
        if self.kind not in ("absolute", "relative"):
            raise ValueError(f"action statistics: kind must be 'absolute' or 'relative', got {self.kind!r}")

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

    def denormalise(self, action_norm: np.ndarray) -> np.ndarray:
        """Invert `normalise`, float32 (..., c) in the channels' units; a still channel returns to its constant."""
        scale, centre = self._affine(action_norm)
        return (np.asarray(action_norm, np.float64) * scale + centre).astype(np.float32)

    def clip(self, action_si: np.ndarray) -> np.ndarray:
        """Clip actions (..., c) to the recorded [min, max] of each channel."""
        self._affine(action_si)
        return np.clip(action_si, np.array(self.min, np.float32), np.array(self.max, np.float32))

    def _affine(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Half-width and centre per channel; half-width 0 marks a channel that never moves."""
        if actions.shape[-1] != len(self.channels):
            names = ", ".join(self.channels)
            raise ValueError(
                f"expected actions with {len(self.channels)} channels ({names}), got shape {actions.shape}"
            )
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
            raise ValueError(f"expected a state of {len(self.channels)} numbers ({names}), got {state.shape}")
        mean, std = np.array(self.mean), np.array(self.std)
        moves = std > DEGENERATE * np.maximum(1.0, np.abs(mean))
        out = np.where(moves, (np.asarray(state, np.float64) - mean) / np.where(moves, std, 1.0), 0.0)
        return np.clip(out, -STATE_LIMIT, STATE_LIMIT).astype(np.float32)


@dataclass(frozen=True)
class Statistics:
    """What scales a policy's numbers: the file `statistics.json` beside a checkpoint."""

    actions: ActionStatistics
    state: StateStatistics | None = None

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over actions and state."""
        return hashlib.sha256(json.dumps(self._payload(), sort_keys=True).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write JSON with its digest, so that a hand-edited file is noticed when it is read."""
        values = {"format": STATISTICS_FORMAT, "format_version": FORMAT_VERSION, "digest": self.digest}
        Path(path).write_text(json.dumps(values | self._payload(), indent=2) + "\n")

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
            raise ValueError(f"{path}: expected {STATISTICS_FORMAT!r} version {FORMAT_VERSION}, got {got}")
        actions, state = _tuples(values["actions"]), values["state"]
        _check_keys(str(path), actions, ActionStatistics.__dataclass_fields__)
        statistics = cls(ActionStatistics(**actions), None if state is None else StateStatistics(**_tuples(state)))
        if statistics.digest != values["digest"]:
            raise ValueError(f"{path}: the numbers do not fit the stored digest; the file was changed by hand")
        return statistics

    def _payload(self) -> dict[str, Any]:
        return {"actions": asdict(self.actions), "state": None if self.state is None else asdict(self.state)}


def _checked_values(values: np.ndarray, channels: Sequence[str], what: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or len(values) == 0 or values.shape[1] != len(channels):
        raise ValueError(f"expected {what} vectors of shape (n > 0, {len(channels)}), got {values.shape}")
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(f"{what} vector {row} holds {values[row, column]} in channel {channels[column]!r}")
    return values


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _check_keys(what: str, values: dict[str, Any], expected: Any) -> None:
    missing, unknown = set(expected) - set(values), set(values) - set(expected)
    if missing or unknown:
        raise ValueError(f"{what}: missing keys {sorted(missing)}, unknown keys {sorted(unknown)}")
