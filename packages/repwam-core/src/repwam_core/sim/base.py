"""What a simulated task is to the rest: seeds in, observations and success out, actions in SI units."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from repwam_core.embodiment import Embodiment
from repwam_core.interface import Observation

__all__ = ["SimTask"]


class SimTask(ABC):
    """One task in one simulator. The seed of ``start`` fixes the whole episode, whatever ran before it.

    Simulating and rendering are two calls, because rendering costs far more: ``start`` and ``advance`` simulate,
    ``observe`` renders; ``reset`` and ``step`` do both.

    Attributes:
        name: The task's name, as a user gives it.
        embodiment: Action channels with units, state names, camera keys and control rate.
        action_limits: The largest magnitude of each action channel, ``(C,)`` in its unit.
        max_steps: Control steps after which an episode counts as failed.
    """

    name: str
    embodiment: Embodiment
    action_limits: np.ndarray
    max_steps: int

    @abstractmethod
    def start(self, seed: int) -> None:
        """Begin the episode of ``seed`` without rendering."""

    @abstractmethod
    def advance(self, action_si: np.ndarray) -> None:
        """Carry out one action, ``(C,)`` in the embodiment's units, for one control step, without rendering.

        Raises:
            ValueError: If the action has another shape or is not finite.
        """

    @abstractmethod
    def observe(self) -> Observation:
        """Render every camera and read the robot's state, now."""

    @abstractmethod
    def expert_action(self) -> np.ndarray:
        """What the scripted expert would do now, float32 ``(C,)`` in the embodiment's units."""

    @property
    @abstractmethod
    def success(self) -> bool:
        """Whether the task has been solved at any moment of this episode."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Control steps since ``start``."""

    @abstractmethod
    def close(self) -> None:
        """Free what the simulator and the renderer hold."""

    @property
    def done(self) -> bool:
        """Whether the episode is over: solved, or out of steps."""
        return self.success or self.steps >= self.max_steps

    def random_action(self, rng: np.random.Generator) -> np.ndarray:
        """An action drawn uniformly from all that the robot accepts, float32 ``(C,)``."""
        return (rng.uniform(-1.0, 1.0, self.action_limits.shape) * self.action_limits).astype(np.float32)

    def reset(self, seed: int) -> Observation:
        """``start``, then ``observe``."""
        self.start(seed)
        return self.observe()

    def step(self, action_si: np.ndarray) -> Observation:
        """``advance``, then ``observe``."""
        self.advance(action_si)
        return self.observe()

    def __enter__(self) -> SimTask:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
