"""One demonstration: the expert drives, disturbed if asked for, and what it saw and did is kept."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import msgspec
import numpy as np
from repvitok.runtime.documents import Count, From0, Share, check_fields, parse
from repvitok.runtime.errors import UserError

from repwam_core.interface import Observation
from repwam_core.sim.base import SimTask

__all__ = ["NOISE_MODES", "Demonstration", "Noise", "record_demonstration"]


@dataclass(frozen=True)
class Noise:
    """How the expert is disturbed, so that the data also shows how to recover.

    The recorded action is always what the expert wanted at that moment, never the disturbed one that was carried out.

    Attributes:
        pushes: Number of short pushes in random directions at full speed.
        push_steps: Control steps each push lasts.
        push_within_steps: Control steps from the start in which all pushes happen, each in its own share of them.
        action_std: Standard deviation of Gaussian noise on every motion channel, as a share of the largest action.
        share: Share of the episodes that are disturbed, drawn by the episode's seed.
    """

    pushes: Count = 0
    push_steps: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 4
    push_within_steps: Count = 24
    action_std: From0 = 0.0
    share: Share = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.pushes and self.push_within_steps // self.pushes < self.push_steps:
            raise UserError(
                f"{self.pushes} pushes of {self.push_steps} steps do not fit into {self.push_within_steps} steps"
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; ``from_dict`` inverts it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Noise:
        """Invert ``to_dict``; a wrong, missing or unknown field is a UserError."""
        return parse(values, cls, "noise", required=[field.name for field in fields(cls)])


NOISE_MODES = {
    "none": Noise(),
    "pushes": Noise(pushes=2),
    "gaussian": Noise(action_std=0.3),
    "pushes+gaussian": Noise(pushes=2, action_std=0.3),
}
"""Noise by name, as ``repwam collect --noise`` takes it. A push of 4 control steps lasts 8 environment steps."""


@dataclass(frozen=True, eq=False)
class Demonstration:
    """What one successful episode showed.

    Attributes:
        frames: Camera key -> uint8 ``(T, H, W, 3)``.
        state: float32 ``(T, S)``; None where the robot tells none.
        action: float32 ``(T, C)``: what the expert wanted to do after frame i.
    """

    frames: dict[str, np.ndarray]
    state: np.ndarray | None
    action: np.ndarray

    def __len__(self) -> int:
        return len(self.action)


def record_demonstration(
    task: SimTask, seed: int, noise: Noise | None = None, extra_steps: int = 4
) -> Demonstration | None:
    """Let the expert solve the episode of ``seed``; None if it does not.

    Args:
        task: The simulated task.
        seed: Fixes the layout and every disturbance.
        noise: None leaves the expert alone.
        extra_steps: Control steps recorded after the first success.
    """
    disturbance = _Disturbance(task, noise or Noise(), seed)
    observations: list[Observation] = []
    actions: list[np.ndarray] = []
    observation, left = task.reset(seed), extra_steps
    while True:
        wanted = task.expert_action()
        observations.append(observation)
        actions.append(wanted)
        task.advance(disturbance.applied_to(wanted, task.steps))
        if task.success:
            if left == 0 or task.steps >= task.max_steps:
                return _demonstration(observations, actions)
            left -= 1
        elif task.done:
            return None
        observation = task.observe()


def _demonstration(observations: list[Observation], actions: list[np.ndarray]) -> Demonstration:
    cameras = observations[0].cameras
    frames = {camera: np.concatenate([seen.frames(camera) for seen in observations]) for camera in cameras}
    states = [states for seen in observations if (states := seen.states()) is not None]
    return Demonstration(frames, np.concatenate(states) if states else None, np.stack(actions))


class _Disturbance:
    """The pushes and the noise of one episode, all drawn from its seed."""

    def __init__(self, task: SimTask, noise: Noise, seed: int) -> None:
        self._rng = np.random.default_rng([seed, zlib.crc32(task.name.encode()), 1])
        self._limits = task.action_limits
        self._moves = np.array([unit != "1" for unit in task.embodiment.action_units])
        active = self._rng.random() < noise.share
        self._std = noise.action_std if active else 0.0
        self._pushes: dict[int, np.ndarray] = {}
        share = noise.push_within_steps // max(1, noise.pushes)
        for push in range(noise.pushes if active else 0):
            first = push * share + int(self._rng.integers(share - noise.push_steps + 1))
            direction = self._rng.standard_normal(self._limits.shape)
            velocity = direction / np.abs(direction[self._moves]).max() * self._limits
            for step in range(first, first + noise.push_steps):
                self._pushes[step] = velocity

    def applied_to(self, wanted: np.ndarray, step: int) -> np.ndarray:
        """The action to carry out at control step ``step`` in place of ``wanted``, float32 ``(C,)``."""
        action = np.where(self._moves, self._pushes[step], wanted) if step in self._pushes else wanted
        if self._std:
            action = action + self._std * self._rng.standard_normal(wanted.shape) * self._limits * self._moves
        return np.clip(action, -self._limits, self._limits).astype(np.float32)
