"""From chunks of actions to one action at a time: asks the policy again when the actions to execute have run out."""

from __future__ import annotations

import numpy as np
from repvitok.runtime.errors import UserError

from repwam_core.interface import ActionChunk, BasePolicy, Observation, stack_observations

__all__ = ["ChunkedPolicy"]


class ChunkedPolicy:
    """Drives a robot step by step with a policy that plans chunks.

    Every control step hands in the newest observation and gets one action. The policy is asked at the first step and
    then after every `execute` actions; it receives all frames since it was last asked, so that a streaming tokenizer
    misses none. What a chunk holds beyond `execute` actions is dropped.

    Args:
        policy: What plans.
        execute: Actions carried out before planning again; None means the whole chunk.

    Raises:
        ValueError: If `execute` is not positive, or larger than a chunk the policy returns.
    """

    def __init__(self, policy: BasePolicy, execute: int | None = None) -> None:
        if execute is not None and execute < 1:
            raise UserError(f"execute must be at least 1, or None for the whole chunk, got {execute}")
        self.policy = policy
        self.execute = execute
        self._waiting: list[Observation] = []
        self._actions: list[np.ndarray] = []

    def reset(self, instruction: str | None, seed: int = 0) -> None:
        """Begin an episode; frames and actions of the last one are forgotten."""
        self.policy.reset(instruction, seed)
        self._waiting, self._actions = [], []

    def step(self, observation: Observation) -> np.ndarray:
        """The next action, float32 `(C,)` in SI units, for the newest observation."""
        self._waiting.append(observation)
        if not self._actions:
            chunk = self.policy.act(stack_observations(self._waiting))
            self._actions = list(actions_to_execute(chunk, self.execute))
            self._waiting = []
        return self._actions.pop(0)


def actions_to_execute(chunk: ActionChunk, execute: int | None) -> np.ndarray:
    """The first `execute` actions of a chunk, float32 `(execute, C)`; all of them for None."""
    if execute is None:
        return chunk.actions
    if execute > len(chunk):
        raise UserError(f"cannot execute {execute} actions of a chunk of {len(chunk)}; plan longer chunks")
    return chunk.actions[:execute]
