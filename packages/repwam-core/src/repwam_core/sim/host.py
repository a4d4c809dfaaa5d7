"""Several simulated episodes side by side in one process, driven by slot number."""

from __future__ import annotations

import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from repvitok.runtime.errors import UserError

from repwam_core.interface import Observation, stack_observations
from repwam_core.sim.base import SimSettings, SimTask, TaskPool

__all__ = ["Progress", "SimHost", "crash"]


@dataclass(frozen=True, eq=False)
class Progress:
    """Where an episode stands after a request.

    Attributes:
        observation: Every frame since the last request; None if the simulator crashed before the first.
        success: Whether the task is solved.
        done: Whether the episode is over.
        steps: Control steps so far.
        crashed: What went wrong in the simulator, or None.
        traceback: Where it went wrong, if the simulator raised an exception.
    """

    observation: Observation | None
    success: bool = False
    done: bool = False
    steps: int = 0
    crashed: str | None = None
    traceback: str | None = None


class SimHost:
    """Runs episodes in numbered slots; lives in a worker process. A crash ends its episode, not the host."""

    def __init__(self, settings: SimSettings) -> None:
        self._pool = TaskPool(settings)
        self._slots: dict[int, SimTask] = {}

    def start(self, episodes: dict[int, tuple[str, int]]) -> dict[int, Progress]:
        """Begin episodes, slot -> (task, seed); any earlier ones are over."""
        for task in self._slots.values():
            self._pool.give_back(task)
        self._slots.clear()
        return {slot: self._start(slot, *episode) for slot, episode in episodes.items()}

    def execute(self, actions: dict[int, np.ndarray]) -> dict[int, Progress]:
        """Carry out actions ``(n, C)`` per slot, one frame after each, until they or the episode end."""
        return {slot: self._execute(slot, rows) for slot, rows in actions.items()}

    def close(self) -> None:
        """Close every simulator."""
        self.start({})
        self._pool.close()

    def _start(self, slot: int, name: str, seed: int) -> Progress:
        task: SimTask | None = None
        try:
            task = self._pool.take(name)
            observation = task.reset(seed)
        except UserError:
            raise  # the user's to mend, such as a missing GL library; the same for every episode
        except Exception as error:
            return Progress(None, done=True, **crash(task, error))
        self._slots[slot] = task
        return Progress(observation)

    def _execute(self, slot: int, actions: np.ndarray) -> Progress:
        task = self._slots[slot]
        seen: list[Observation] = []
        try:
            for action in actions:
                seen.append(task.step(action))
                if task.done:
                    break
        except Exception as error:  # whatever a simulator raises is a failed episode, and is recorded as such
            del self._slots[slot]
            frames = stack_observations(seen) if seen else None
            return Progress(frames, done=True, steps=task.steps, **crash(task, error))
        return Progress(stack_observations(seen), task.success, task.done, task.steps)


def crash(task: SimTask | None, error: Exception) -> dict[str, Any]:
    """What is recorded of an episode whose simulator raised `error`; the simulator is used no more."""
    if task is not None:
        with suppress(Exception):  # one that is broken may not even close
            task.close()
    return {"crashed": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error))}
