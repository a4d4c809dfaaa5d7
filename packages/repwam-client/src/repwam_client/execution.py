"""From chunks of actions to one action at a time, also while the next chunk is planned. No torch.

`ChunkedPolicy` asks the policy again when the actions to execute have run out; `Handover` does not wait for it:

    request k                   request k + 1
    |<-------- execute -------->|
    |<- overlap ->|             |<- overlap ->|
     chunk k - 1   chunk k       chunk k       chunk k + 1

A chunk is planned from what was seen until it was requested, and its row j is meant for the j-th control step after
that. The first `overlap` steps pass before it is there: the robot spends them on what the chunk before planned for
them, the *committed* actions. Steps are counted, never seconds, and a step in which the robot had to hold still is
none: the plan waits with it.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from .errors import UserError
from .interface import ActionChunk, BasePolicy, Observation, stack_observations

Execution = Literal["wait", "naive", "ensemble", "regrounded"]
"""How a robot spends the steps in which it waits for a chunk:

* "wait": it holds still;
* "naive": it carries out the committed actions; then the new chunk, which was planned without them;
* "ensemble": as "naive", but every action is the mean of all chunks that planned its step (temporal ensembling);
* "regrounded": as "naive", but the policy is told the committed actions and plans what follows them.
"""
EXECUTIONS = get_args(Execution)


class ChunkedPolicy:
    """Drives a robot step by step with a policy that plans chunks.

    Every control step hands in the newest observation and gets one action. The policy is asked at the first step and
    then after every `execute` actions; it receives all frames since it was last asked, so that a streaming tokenizer
    misses none. What a chunk holds beyond `execute` actions is dropped.

    Args:
        policy: What plans.
        execute: Actions carried out before planning again; None means the whole chunk.
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


class Handover:
    """The actions of one episode, handed over from chunk to chunk.

    Args:
        execution: how the steps are spent in which a chunk is planned.
        execute: actions carried out from one request to the next.
    """

    def __init__(self, execution: Execution, execute: int) -> None:
        if execution not in EXECUTIONS:
            raise UserError(f"execution: expected one of {', '.join(EXECUTIONS)}, got {execution!r}")
        if execute < 1:
            raise UserError(f"execute must be at least 1, got {execute}")
        self.execution, self.execute = execution, execute
        self._ahead = self._committed = np.zeros((0, 1), np.float32)  # (0, 1) goes with any number of channels
        self._planned_by = np.zeros(0)  # how many chunks planned each row of what lies ahead

    def request(self, overlap: int) -> np.ndarray:
        """The committed actions, float32 (m, C), to carry out while the chunk requested now is planned.

        m is `overlap`, or what is left of the last chunk if that is less: nothing before the first chunk, and nothing
        with "wait".
        """
        if overlap > self.execute:
            raise UserError(
                f"expected a chunk to take at most the {self.execute} steps between two requests (execute), got an "
                f"overlap of {overlap}: one chunk is planned at a time"
            )
        self._committed = self._ahead[: 0 if self.execution == "wait" else overlap]
        return self._committed

    def take(self, chunk: ActionChunk, overlap: int) -> np.ndarray:
        """All actions from this chunk's request to the next, float32 (execute, C), the committed ones first.

        Args:
            chunk: what was planned.
            overlap: steps that the next chunk will take.
        """
        needed = self.execute + (0 if self.execution == "wait" else overlap)
        if len(chunk) < needed:
            raise UserError(
                f"cannot execute {self.execute} actions of a chunk of {len(chunk)} and {needed - self.execute} more "
                "while the next one is planned: plan longer chunks (chunk_frames, with execute_frames as large), or "
                "execute less"
            )
        rows, planned_by = chunk.actions.copy(), np.ones(len(chunk))
        if self.execution == "ensemble":
            both = min(len(rows), len(self._ahead))
            before = self._planned_by[:both, None]
            rows[:both] = (rows[:both] + before * self._ahead[:both]) / (1 + before)
            planned_by[:both] += self._planned_by[:both]
        rows[: len(self._committed)] = self._committed
        self._ahead, self._planned_by = rows[self.execute :], planned_by[self.execute :]
        return rows[: self.execute]
