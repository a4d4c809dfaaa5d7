"""Drives a robot step by step while the policy plans in a thread: the next chunk is made as the last is carried out.

No torch: the policy may be a local one or a `PolicyClient`.

```python
with PolicyClient("gpu-machine", 8000) as policy, Runner(policy, limits=Limits.load("limits.yaml")) as runner:
    runner.reset("stack the cups")
    try:
        while not done():
            command(runner.step(Observation(images=cameras(), state=joints())))
            wait_for_the_next_control_step()
    finally:
        runner.stop(command)  # whatever ended the loop, the robot is told to hold still
```
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import NoReturn, Protocol, runtime_checkable

import numpy as np
from repvitok.runtime.errors import UserError

from repwam_core.interface import ActionChunk, BasePolicy, CommandKind, Embodiment, Observation, stack_observations
from repwam_core.policy.execution import Execution, Handover
from repwam_core.policy.limits import Limits

log = logging.getLogger(__name__)
DELAYS_KEPT = 10
"""Of so many requests the longest delay is what the next one is expected to take at most, and one step more."""


class RunnerStopped(UserError):
    """The runner gives no more actions until `reset`; the message says why, its cause is the error that stopped it."""


@runtime_checkable
class Recorder(Protocol):
    """What keeps the episodes of a runner; `recording.RolloutRecorder` writes a data set."""

    def begin(self, instruction: str | None, seed: int = 0) -> None:
        """Begin an episode."""
        ...

    def add(self, observation: Observation, action: np.ndarray, *, intervention: bool = False) -> None:
        """Add one control step: one frame, and the action (C,) carried out after it."""
        ...

    def end(self, success: bool | None, *, held_steps: int = 0) -> object:
        """Keep the episode."""
        ...


class Runner:
    """One robot's control loop: every control step hands in the newest observation and gets one action at once.

    A chunk is requested every `execute` steps and planned in a thread, while the robot carries out the first `overlap`
    actions of what the chunk before planned for these steps (see `Handover`). A chunk that is later than that makes the
    robot hold still until it is there (`Embodiment.hold`); such steps are neither shown to the policy nor recorded, its
    time waits with the robot. The policy is told what was carried out after limits and interventions.

    The first `step` of an episode waits for its chunk: the robot does not move yet. An observation's `instruction`
    changes what is to be done from the next request on, without a reset.

    Args:
        policy: what plans. It has `embodiment`, and `frames_per_latent` and `action_kind` unless they are 1 and
            "absolute".
        execution: how steps are spent in which a chunk is planned.
        execute: actions between two requests, a multiple of the policy's `frames_per_latent`; None: half a chunk where
            planning overlaps, a whole one where the robot waits.
        overlap: control steps that planning may take before the robot has to hold still; None: the longest of the last
            requests, measured in steps, and one more.
        limits: what the robot must never be told.
        recorder: keeps the episodes, such as a `RolloutRecorder`.
        dry_run: give no action but to hold still; `planned` says what would have been.
        patience: control steps of holding still for a late chunk, one after the other, after which the runner stops.
        executor: where the policy runs, one call at a time; None is a thread of the runner's own.

    Attributes:
        steps: actions carried out in this episode.
        held: control steps in which the robot held still for a late chunk, in this episode.
        delays: control steps that each request took, but for the first of every episode.
        clamped: action channel -> steps of this episode in which it was kept within its limits.
        planned: the action, float32 (C,), that the policy wanted in the last step, before limits.

    Raises:
        UserError: for arguments, limits or a policy that do not fit each other.
    """

    def __init__(
        self,
        policy: BasePolicy,
        *,
        execution: Execution = "regrounded",
        execute: int | None = None,
        overlap: int | None = None,
        limits: Limits | None = None,
        recorder: Recorder | None = None,
        dry_run: bool = False,
        patience: int = 100,
        executor: Executor | None = None,
    ) -> None:
        self.policy, self.limits, self.recorder = policy, limits, recorder
        self.execution: Execution = execution
        self.dry_run, self.patience = dry_run, patience
        embodiment = getattr(policy, "embodiment", None)
        if not isinstance(embodiment, Embodiment):
            raise UserError(
                f"expected a policy with the robot that it drives (embodiment), got {type(policy).__name__}"
            )
        self.embodiment = embodiment
        of_policy: CommandKind = getattr(policy, "action_kind", "absolute")
        self.kind: CommandKind = (limits and limits.kind) or of_policy
        self._per = int(getattr(policy, "frames_per_latent", 1))
        if limits is not None:
            limits.check(self.embodiment)
        if execute is not None and execute % self._per:
            raise UserError(
                f"execute: the policy takes {self._per} frames at a time, expected a multiple, got {execute}"
            )
        if (overlap is not None and overlap < 0) or patience < 1:
            raise UserError(f"expected overlap >= 0 and patience >= 1, got {overlap} and {patience}")
        if dry_run and recorder is not None:
            raise UserError("a dry run carries nothing out: there is nothing to record")
        if execute is not None:
            Handover(execution, execute).request(overlap or 0)  # refuses an overlap that is too long
        self._execute, self._overlap = execute, overlap
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="policy")
        self.delays: deque[int] = deque(maxlen=1000)
        self._why_stopped: str | None = "reset was not called: no episode has begun"
        self._begin()

    def _begin(self) -> None:
        self._handover: Handover | None = None
        self._pending: Future[ActionChunk] | None = None
        self._since_request = 0  # control steps
        self._waiting: list[Observation] = []  # frames that the policy has not seen
        self._executed: list[np.ndarray] = []  # actions since the last request
        self._queue: list[np.ndarray] = []
        self._told: str | None = None  # an instruction that the policy was not given yet
        self._told_recorder: str | None = None
        self._last: np.ndarray | None = None
        self._newest: Observation | None = None
        self._holding = 0  # control steps, one after the other
        self._row: tuple[Observation, np.ndarray, bool] | None = None
        self.planned: np.ndarray | None = None
        self.steps = self.held = 0
        self.clamped: Counter[str] = Counter()

    def reset(self, instruction: str | None, seed: int = 0) -> None:
        """Begin an episode, as `BasePolicy.reset`; waits for what is still being planned.

        Raises:
            RunnerStopped: if the policy cannot begin.
        """
        self._begin()
        self._why_stopped = None
        if self.recorder is not None:
            self.recorder.begin(instruction, seed)
        try:
            self._executor.submit(self.policy.reset, instruction, seed).result()
        except Exception as error:
            self._fail(error)

    def step(self, observation: Observation) -> np.ndarray:
        """The action to carry out now, float32 (C,) in the channels' units, for the newest observation of one frame.

        Raises:
            RunnerStopped: for an observation that does not fit, an action beyond limits that refuse, an error of the
                policy or its server, or a chunk that `patience` steps were not enough for. Call `stop`.
        """
        if self._why_stopped is not None:
            raise RunnerStopped(self._why_stopped)
        try:
            observation = self._checked(observation)
            self._see(observation)
            self._take_chunk_if_there()
            if self._pending is None and (self._handover is None or len(self._executed) == self._handover.execute):
                self._request()
            return self._next(observation)
        except Exception as error:
            self._fail(error)

    def override(self, action: np.ndarray) -> None:
        """Say that this action, (C,), was carried out in place of the one returned last: a person took over."""
        action = np.asarray(action, np.float32)
        if action.shape != (len(self.embodiment.action_channels),) or not np.isfinite(action).all():
            raise UserError(
                f"expected one finite action of the channels {', '.join(self.embodiment.action_names)}, got {action}"
            )
        if self._last is None:
            raise UserError("override comes after step: no action was given yet")
        self._last = action
        if not self._holding:
            self._executed[-1] = action
        if self._row is not None:
            self._row = (self._row[0], action, True)

    def hold(self) -> np.ndarray | None:
        """The action, float32 (C,), that keeps the robot where it is; None if it was never told to move."""
        return None if self._last is None else self.embodiment.hold(self._last, self.kind)

    def stop(self, command: Callable[[np.ndarray], object]) -> None:
        """End the episode: tell the robot to hold still, by calling `command`. Never fails for the policy's sake."""
        if (still := self.hold()) is not None:
            command(still)
        if self._why_stopped is None:
            self._why_stopped = "it was told to stop; call reset to begin another episode"

    def end(self, success: bool | None = None) -> None:
        """Keep the episode, after `stop`: the recorder writes it, and whether the task was solved, if that is known."""
        self._why_stopped = self._why_stopped or "the episode has ended; call reset to begin another one"
        self._record_row()
        if self.recorder is not None:
            self.recorder.end(success, held_steps=self.held)

    def close(self) -> None:
        """End the runner; the policy is not closed."""
        self._why_stopped = "it is closed"
        self._executor.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- one control step ----------------------------------------------------------------------------------------

    def _checked(self, observation: Observation) -> Observation:
        """The robot's cameras alone, or an error that says what does not fit."""
        robot, first = self.embodiment, self._newest
        if observation.num_frames != 1:
            raise UserError(f"expected one frame per control step, got {observation.num_frames}")
        if missing := [camera for camera in robot.cameras if camera not in observation.images]:
            raise UserError(f"expected the cameras {list(robot.cameras)}, got {list(observation.images)}: no {missing}")
        images = {camera: observation.images[camera] for camera in robot.cameras or observation.cameras}
        for camera in images:
            size = observation.frames(camera).shape[1:3]
            known = self.limits.cameras.get(camera) if self.limits is not None else None
            before = known or (None if first is None else first.frames(camera).shape[1:3])
            if before is not None and tuple(before) != size:
                raise UserError(
                    f"camera {camera!r}: expected pictures of {before[0]} x {before[1]}, got {size[0]} x {size[1]}; "
                    "are the cameras exchanged?"
                )
        states = observation.states()
        if states is not None and robot.state_channels and states.shape[1] != len(robot.state_channels):
            names = ", ".join(robot.state_channels)
            raise UserError(f"expected a state of {len(robot.state_channels)} numbers ({names}), got {states.shape[1]}")
        return replace(observation, images=images)

    def _see(self, observation: Observation) -> None:
        """Note what the last action led to; after a step of holding still, it replaces what was seen before that."""
        if observation.instruction is not None:
            self._told = self._told_recorder = observation.instruction
        self._record_row()
        if not self._holding:
            self._waiting.append(observation)
        elif self._waiting:
            self._waiting[-1] = observation
        self._newest = observation
        self._since_request += 1

    def _request(self) -> None:
        """Ask for the next chunk; until it is there the committed actions are carried out."""
        handover = self._handover
        committed = np.zeros((0, 0), np.float32) if handover is None else handover.request(self._expected_delay())
        seen = replace(stack_observations(self._waiting), instruction=self._told)
        executed = np.stack(self._executed) if self._executed else None
        self._waiting, self._executed, self._told, self._since_request = [], [], None, 0
        self._queue = list(committed)
        told = self._limited(committed) if self.execution == "regrounded" and len(committed) else None
        self._pending = self._executor.submit(self._think, seen, executed, told)
        if handover is None:
            self._take_chunk(self._pending.result())
        else:
            self._take_chunk_if_there()

    def _think(self, seen: Observation, executed: np.ndarray | None, committed: np.ndarray | None) -> ActionChunk:
        """In the policy's thread."""
        if executed is not None:
            self.policy.record(executed)
        if committed is not None:
            self.policy.commit(committed)
        return self.policy.act(seen)

    def _take_chunk_if_there(self) -> None:
        if self._pending is not None and self._pending.done():
            self.delays.append(self._since_request)
            self._take_chunk(self._pending.result())

    def _take_chunk(self, chunk: ActionChunk) -> None:
        """Queue the actions up to the next request; those that were carried out meanwhile are past, by count."""
        self._pending = None
        names = self.embodiment.action_names
        if chunk.channels != names:
            raise UserError(f"expected actions of the channels {', '.join(names)}, got {', '.join(chunk.channels)}")
        if self._handover is None:
            self._handover = Handover(self.execution, self._execute or self._default_execute(len(chunk)))
            self._handover.request(self._overlap or 0)  # refuses an overlap that is too long, before the robot moves
        rows = self._handover.take(chunk, 1 if self._overlap is None else self._overlap)
        self._queue = list(rows[len(self._executed) :])

    def _next(self, observation: Observation) -> np.ndarray:
        """The next action of the queue, or to hold still if the next chunk is late."""
        if not self._queue:
            self._holding, self.held = self._holding + 1, self.held + 1
            if self._holding > self.patience:
                raise UserError(
                    f"no actions for {self.patience} control steps: the policy or its server does not answer"
                )
            assert self._last is not None  # the first chunk was waited for
            self._last = self.embodiment.hold(self._last, self.kind)
            return self._last.copy()
        self._holding = 0
        self.planned = self._queue.pop(0)
        if self._last is None:
            self._last = self._standing(observation)
        action = self._limited(self.planned[None])[0]
        self._count_clamped(action)
        action = self._still() if self.dry_run else action
        self._last = action
        self._executed.append(action)
        self._row = (replace(observation, instruction=self._told_recorder), action, False)
        self._told_recorder = None
        self.steps += 1
        return action.copy()

    def _still(self) -> np.ndarray:
        if self._last is None:
            raise UserError(
                "a dry run holds still where the robot stands: expected state channels with the names of the action "
                f"channels {', '.join(self.embodiment.action_names)}, as actions are targets"
            )
        return self.embodiment.hold(self._last, self.kind)

    # -- what follows from measurement and embodiment ------------------------------------------------------------

    def _standing(self, observation: Observation) -> np.ndarray | None:
        """What holds the robot before its first action: zero changes, or the state as target; None if unknown."""
        robot, states = self.embodiment, observation.states()
        if self.kind == "relative":
            return np.zeros(len(robot.action_channels), np.float32)
        if states is None or not set(robot.action_names) <= set(robot.state_channels):
            return None
        return states[-1][[robot.state_channels.index(name) for name in robot.action_names]]

    def _limited(self, actions: np.ndarray) -> np.ndarray:
        return actions if self.limits is None else self.limits.apply(self.embodiment, actions, self._last)

    def _count_clamped(self, action: np.ndarray) -> None:
        """Every step is counted; a line is written when a channel reaches its limits for the first time."""
        assert self.planned is not None
        if self.limits is None:
            return
        for name, told in self.limits.exceeded(self.embodiment, self.planned, action).items():
            if not self.clamped[name]:
                log.warning("step %d: clamped %s", self.steps, told)
            self.clamped[name] += 1

    def _expected_delay(self) -> int:
        """Control steps that the next chunk may take before the robot has to hold still."""
        assert self._handover is not None
        if self._overlap is not None:
            return self._overlap
        recent = list(self.delays)[-DELAYS_KEPT:]
        return min(self._handover.execute, max(recent) + 1 if recent else self._handover.execute)

    def _default_execute(self, rows: int) -> int:
        frames = rows // self._per
        if self.execution == "wait":
            return frames * self._per
        if frames < 2:
            raise UserError(
                f"the policy gives {rows} actions and has to see {self._per} frames before it plans again: none are "
                "left while it plans; load it with execute_frames=2 or more (of chunk_frames), or let it 'wait'"
            )
        return frames // 2 * self._per

    # -- ends ----------------------------------------------------------------------------------------------------

    def _record_row(self) -> None:
        row, self._row = self._row, None
        if row is not None and self.recorder is not None:
            observation, action, intervention = row
            self.recorder.add(observation, action, intervention=intervention)

    def _fail(self, error: Exception) -> NoReturn:
        """Stop, and raise what the robot's program shows its operator."""
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        self._why_stopped = f"stopped after {self.steps} actions: {said}"
        log.error("%s", self._why_stopped)
        raise RunnerStopped(self._why_stopped) from error
