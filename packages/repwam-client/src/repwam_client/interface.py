"""What passes between a policy and whatever it drives, and what a robot is to the model: numpy, SI units, no torch.

A robot's or simulator's own environment needs this package and nothing else of ours. Cameras give uint8 RGB, states and
actions are float32 in SI units with named channels, and every array is checked where it is made, so that a wrong shape
is reported at the hand-off and not inside a model. Several embodiments share one layout of *named* channels: what an
embodiment lacks is zero and masked out. How numbers are scaled is in
`repwam_core.statistics`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import MISSING, asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, Mapping, Sequence, Union

import numpy as np

from .errors import UserError

CommandKind = Literal["absolute", "relative"]
"""What a robot is given: targets, which it keeps to, or changes, of which zero is no motion."""
MAX_INSTRUCTION_BYTES = 4096
"""An instruction longer than this in UTF-8 is refused unread: a text encoder takes some hundred tokens at most."""

Units = Union[Sequence[str], Mapping[str, str], str]
"""One unit per channel, in order; or by patterns of names, {"left_*": "rad"}; or one for all."""


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
            raise UserError(f"embodiment {self.name!r}: expected distinct action channel names, got {names}")
        if not self.rate_hz > 0:
            raise UserError(f"embodiment {self.name!r}: expected rate_hz > 0, got {self.rate_hz}")

    @property
    def action_names(self) -> tuple[str, ...]:
        """Names of the action channels, in order."""
        return tuple(channel.name for channel in self.action_channels)

    @property
    def action_units(self) -> tuple[str, ...]:
        """Units of the action channels, in order."""
        return tuple(channel.unit for channel in self.action_channels)

    def hold(self, last: np.ndarray, kind: CommandKind) -> np.ndarray:
        """The action, float32 (C,), that keeps the robot where it is after the action `last` (C,).

        Zero in a channel that is a velocity (a unit per second), and in every channel with a unit if actions are
        changes (`kind` "relative"); elsewhere the last action again: a target, or the command of a gripper (unit "1").
        """
        moves = [unit.endswith("/s") or (kind == "relative" and unit != "1") for unit in self.action_units]
        return np.where(moves, 0.0, last).astype(np.float32)

    @classmethod
    def from_names(
        cls,
        name: str,
        action_names: Sequence[str],
        state_names: Sequence[str] = (),
        cameras: Sequence[str] = (),
        rate_hz: float = 1.0,
        units: Units | None = None,
    ) -> Embodiment:
        """Build an embodiment from the names that a LeRobot data set or latent shards carry."""
        each = channel_units(units, action_names)
        channels = tuple(ActionChannel(n, u) for n, u in zip(action_names, each))
        return cls(name, channels, tuple(state_names), tuple(cameras), float(rate_hz))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; `from_dict` inverts it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Embodiment:
        """Invert `to_dict`; a wrong, missing or unknown field is a UserError."""
        told = _fields("embodiment", values, cls)
        channels = [
            _fields(f"embodiment, action_channels[{n}]", channel, ActionChannel)
            for n, channel in enumerate(_list("action_channels", told["action_channels"]))
        ]
        for name in ("name", "state_channels", "cameras"):
            many = [told[name]] if name == "name" else _list(name, told[name])
            if not all(isinstance(one, str) for one in many):
                raise UserError(f"embodiment, field {name!r}: expected text, got {told[name]!r:.80}")
        rate_hz = told["rate_hz"]
        if isinstance(rate_hz, bool) or not isinstance(rate_hz, (int, float)):
            raise UserError(f"embodiment, field 'rate_hz': expected a number, got {rate_hz!r:.80}")
        return cls(
            told["name"],
            tuple(ActionChannel(**channel) for channel in channels),
            tuple(told["state_channels"]),
            tuple(told["cameras"]),
            float(rate_hz),
        )


def channel_units(units: Units | None, names: Sequence[str]) -> list[str]:
    """The unit of each action channel; "1" where none is given.

    Args:
        units: a list with one per channel, in order; a word for all channels; or units by shell patterns of names,
            {"left_*": "rad"}, of which the first that fits a channel counts.
        names: of the channels.
    """
    if units is None or isinstance(units, str):
        return [units or "1"] * len(names)
    if isinstance(units, Mapping):
        for pattern in units:
            if not any(fnmatchcase(name, pattern) for name in names):
                told = f"units of action channels: {pattern!r} fits no channel"
                raise UserError(f"{told}; the channels are {', '.join(names)}")
        return [next((unit for pattern, unit in units.items() if fnmatchcase(name, pattern)), "1") for name in names]
    if len(units) != len(names):
        raise UserError(
            f"expected one unit per action channel ({len(names)}: {', '.join(names)}), got {len(units)}; a word in "
            "place of the list is the unit of all of them"
        )
    return list(units)


def two_arm_names(joints: tuple[int, int] = (6, 6)) -> tuple[str, ...]:
    """Names of the channels of two arms with grippers, left arm first, by the joints of each; as our layouts name them.

    >>> two_arm_names((1, 1))
    ('left_arm_0', 'left_gripper', 'right_arm_0', 'right_gripper')
    """
    left, right = ([f"{side}_arm_{n}" for n in range(count)] for side, count in zip(("left", "right"), joints))
    return (*left, "left_gripper", *right, "right_gripper")


def shared_channels(embodiments: Sequence[Embodiment]) -> tuple[str, ...]:
    """One order of named action channels for several embodiments: their union, in order of first appearance."""
    units: dict[str, str] = {}
    for embodiment in embodiments:
        for channel in embodiment.action_channels:
            if units.setdefault(channel.name, channel.unit) != channel.unit:
                raise UserError(
                    f"action channel {channel.name!r} has unit {channel.unit!r} in {embodiment.name!r} but "
                    f"{units[channel.name]!r} elsewhere; convert one of them or rename the channel"
                )
    return tuple(units)


@dataclass(frozen=True, eq=False)
class Observation:
    """What the robot sensed since the policy was last asked, oldest first.

    Attributes:
        images: Camera name -> uint8 RGB, `(H, W, 3)` for one frame or `(n, H, W, 3)` for all frames since the last
            `act`. Every camera holds the same number of frames; sizes may differ between cameras.
        state: float32 `(S,)` with one frame, `(n, S)` with n of them, in the embodiment's units; None where the
            robot reports none.
        instruction: What to do, in words. None keeps the one given to `reset`.
        time_s: Seconds since the episode began, at the newest frame.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray | None = None
    instruction: str | None = None
    time_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.images:
            raise UserError("an observation needs at least one camera image, got none")
        for camera, image in self.images.items():
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
                raise UserError(f"image of camera {camera!r} must be a uint8 numpy array, got {_described(image)}")
            if image.ndim not in (3, 4) or image.shape[-1] != 3 or 0 in image.shape:
                raise UserError(
                    f"image of camera {camera!r} must have shape (H, W, 3) or (n, H, W, 3), none of them 0, got "
                    f"{image.shape}"
                )
        counts = {camera: self.frames(camera).shape[0] for camera in self.images}
        if len(set(counts.values())) != 1:
            raise UserError(f"every camera must hold the same number of frames, got {counts}")
        if (state := self.state) is not None:
            if not isinstance(state, np.ndarray) or state.dtype != np.float32:
                raise UserError(f"state must be a float32 numpy array or None, got {_described(state)}")
            frames = self.num_frames
            if not (state.ndim == 1 and frames == 1) and not (state.ndim == 2 and state.shape[0] == frames):
                raise UserError(
                    f"state must have shape (S,) with one frame or (n, S) with n frames; there are {frames} frames "
                    f"and the state has shape {state.shape}"
                )
            if not np.isfinite(state).all():
                raise UserError(f"state must be finite, got {state[~np.isfinite(state)][0]}")
        if not np.isfinite(self.time_s):
            raise UserError(f"time_s must be finite, got {self.time_s!r}")

    @property
    def cameras(self) -> tuple[str, ...]:
        """Camera names, in the order of `images`."""
        return tuple(self.images)

    @property
    def num_frames(self) -> int:
        """Number of frames per camera, at least 1."""
        return self.frames(next(iter(self.images))).shape[0]

    def frames(self, camera: str) -> np.ndarray:
        """The frames of one camera, uint8 `(n, H, W, 3)`, oldest first."""
        if camera not in self.images:
            raise UserError(f"no camera {camera!r} in this observation; it has {sorted(self.images)}")
        image = self.images[camera]
        return image if image.ndim == 4 else image[None]

    def states(self) -> np.ndarray | None:
        """The states of the frames, float32 `(n, S)`, or None."""
        if self.state is None:
            return None
        return self.state if self.state.ndim == 2 else self.state[None]


def stack_observations(observations: Sequence[Observation]) -> Observation:
    """Join consecutive observations, oldest first, into one that holds all their frames.

    Instruction and time are those of the newest.
    """
    if not observations:
        raise UserError("expected at least one observation to stack, got none")
    newest = observations[-1]
    for observation in observations:
        if observation.cameras != newest.cameras or (observation.state is None) != (newest.state is None):
            raise UserError(
                f"observations to stack must agree in cameras and in whether they hold a state, got cameras "
                f"{observation.cameras} and {newest.cameras}"
            )
    images = {
        camera: np.concatenate([observation.frames(camera) for observation in observations])
        for camera in newest.cameras
    }
    states = [states for observation in observations if (states := observation.states()) is not None]
    state = np.concatenate(states) if states else None
    return Observation(images, state, newest.instruction, newest.time_s)


@dataclass(frozen=True, eq=False)
class ActionChunk:
    """Actions to carry out one after the other, the first one now.

    Attributes:
        actions: float32 `(n, C)`, n >= 1, each channel in the SI unit its embodiment names.
        channels: The C channel names.
        rate_hz: Actions per second.
    """

    actions: np.ndarray
    channels: tuple[str, ...]
    rate_hz: float

    def __post_init__(self) -> None:
        actions = self.actions
        if not isinstance(actions, np.ndarray) or actions.dtype != np.float32:
            raise UserError(f"actions must be a float32 numpy array, got {_described(actions)}")
        if actions.ndim != 2 or actions.shape[0] < 1 or actions.shape[1] != len(self.channels):
            raise UserError(
                f"actions must have shape (n >= 1, {len(self.channels)}) for the channels "
                f"{tuple(self.channels)}, got {actions.shape}"
            )
        if not np.isfinite(actions).all():
            row, column = np.argwhere(~np.isfinite(actions))[0]
            raise UserError(
                f"actions must be finite, got {actions[row, column]} in row {row}, {self.channels[column]!r}"
            )
        if not self.rate_hz > 0:
            raise UserError(f"rate_hz must be positive, got {self.rate_hz!r}")

    def __len__(self) -> int:
        return self.actions.shape[0]


class BasePolicy(ABC):
    """One robot, one episode at a time: `reset` once, then `act` whenever actions have run out."""

    @abstractmethod
    def reset(self, instruction: str | None, seed: int = 0) -> None:
        """Begin an episode. `seed` fixes every draw of the policy in it."""

    def record(self, actions_si: np.ndarray) -> None:  # noqa: B027 many policies remember no actions
        """Learn which actions (n, C) were carried out since the last `act`, where they are not those returned."""

    def commit(self, actions_si: np.ndarray) -> None:  # noqa: ARG002
        """Learn which actions (m, C) are carried out while the next `act` computes; the chunk begins with them."""
        raise UserError(f"{type(self).__name__} cannot plan on from committed actions; choose another execution")

    @abstractmethod
    def act(self, observation: Observation) -> ActionChunk:
        """The next actions, given every frame since the previous call."""


class BatchedBasePolicy(ABC):
    """Many episodes in step, for evaluation: entry i of every list belongs to episode i of the last `reset`.

    All observations of one call hold the same number of frames. Episodes that have ended keep their place in the list,
    with their last frame repeated, and what is returned for them is ignored.
    """

    @abstractmethod
    def reset(self, instructions: Sequence[str | None], seeds: Sequence[int]) -> None:
        """Begin `len(instructions)` episodes, each with its own seed."""

    def record(self, actions_si: Sequence[np.ndarray]) -> None:  # noqa: B027 many policies remember no actions
        """`BasePolicy.record` for every episode."""

    def commit(self, actions_si: Sequence[np.ndarray]) -> None:  # noqa: ARG002
        """`BasePolicy.commit` for every episode, with the same number of actions in each."""
        raise UserError(f"{type(self).__name__} cannot plan on from committed actions; choose another execution")

    @abstractmethod
    def act(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """The next actions of each episode, given every frame since the previous call."""


def _fields(what: str, values: Any, kind: type) -> dict[str, Any]:
    """A map with the fields of a dataclass, all that have no default and no others; those of a channel are text."""
    if not isinstance(values, Mapping):
        raise UserError(f"{what}: expected a map, got {type(values).__name__}")
    known = {field.name: field for field in fields(kind)}
    if missing := [name for name, field in known.items() if name not in values and field.default is MISSING]:
        raise UserError(f"{what}: missing {missing[0]!r}")
    if unknown := sorted(set(map(str, values)) - set(known)):
        raise UserError(f"{what}: unknown field {unknown[0]!r}; expected {sorted(known)}")
    if kind is ActionChannel and not all(isinstance(value, str) for value in values.values()):
        raise UserError(f"{what}: expected text, got {dict(values)!r:.80}")
    return dict(values)


def _list(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"embodiment, field {name!r}: expected a list, got {type(value).__name__}")
    return value


def _described(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return type(value).__name__
