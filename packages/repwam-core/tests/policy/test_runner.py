"""A robot that does not wait: what is carried out, seen and told, with planning that takes control steps."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repvitok.runtime.errors import UserError
from repwam_core.interface import ActionChunk, BasePolicy, Embodiment, Observation
from repwam_core.policy.execution import EXECUTIONS, Handover
from repwam_core.policy.limits import ChannelLimits, Limits
from repwam_core.policy.runner import Runner, RunnerStopped

ARM = Embodiment.from_names("arm", ["x", "grip"], ["x", "grip"], ["eye"], 20.0, ["m", "1"])
STEP_M = 0.05
"""The largest change of x from one action of a chunk to the next."""


class _Late(Future):
    """Is done at a control step; whoever waits for it does not have to."""

    def __init__(self, clock: "Clock", at: float) -> None:
        super().__init__()
        self.clock, self.at = clock, at

    def done(self) -> bool:
        return self.clock.now >= self.at


class Clock(Executor):
    """Calls take as many control steps as `delays` says, one after the other; `now` counts control steps."""

    def __init__(self, delays: Iterator[float]) -> None:
        self.delays, self.now = delays, 0

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future:
        asks = call.__name__ != "reset"
        late = _Late(self, self.now + next(self.delays) if asks else self.now)
        try:
            late.set_result(call(*arguments, **named))
        except Exception as error:
            late.set_exception(error)
        return late

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing runs."""


class Walker(BasePolicy):
    """Walks x towards the target by at most `STEP_M` an action, from where it believes the robot to be.

    Without committed actions it believes in the newest state, which is where the robot was when it was asked.
    """

    embodiment, frames_per_latent, action_kind = ARM, 4, "absolute"

    def __init__(self, rows: int = 8, target_m: float = 100.0) -> None:
        self.rows, self.target_m = rows, target_m
        self.frames: list[list[int]] = []
        self.told: list[str | None] = []
        self.recorded: list[np.ndarray] = []
        self.committed: list[np.ndarray | None] = []
        self._committed: np.ndarray | None = None

    def reset(self, instruction: str | None, seed: int = 0) -> None:
        self.frames, self.told, self.recorded, self.committed = [], [instruction], [], []

    def record(self, actions_si: np.ndarray) -> None:
        self.recorded.append(actions_si.copy())

    def commit(self, actions_si: np.ndarray) -> None:
        self._committed = actions_si.copy()

    def act(self, observation: Observation) -> ActionChunk:
        self.frames.append(observation.frames("eye")[:, 0, 0, 0].tolist())
        self.told.append(observation.instruction)
        self.committed.append(self._committed)
        if self.told[-1] == "back":
            self.target_m = -100.0
        known, self._committed = self._committed, None
        states = observation.states()
        assert states is not None
        rows = [] if known is None else [float(row[0]) for row in known]
        x = rows[-1] if rows else float(states[-1, 0])
        while len(rows) < self.rows:
            x += float(np.clip(self.target_m - x, -STEP_M, STEP_M))
            rows.append(x)
        actions = np.stack([rows, np.ones(self.rows)], axis=1).astype(np.float32)
        return ActionChunk(actions, ARM.action_names, ARM.rate_hz)


def see(number: int, x_m: float, **more: Any) -> Observation:
    """Frame `number`, with the robot at x."""
    return Observation({"eye": np.full((2, 2, 3), number % 256, np.uint8)}, np.array([x_m, 1.0], np.float32), **more)


class Arm:
    """Is at once where it is told to be; keeps what it was told."""

    def __init__(self):
        self.x, self.commands = 0.0, []

    def command(self, action):
        self.commands.append(action)
        self.x = float(action[0])


def drive(runner, clock, steps, arm=None, at=None):
    """So many control steps; `at` gives an instruction at a step."""
    arm = arm or Arm()
    for step in range(steps):
        clock.now = step
        told = {"instruction": at[step]} if at and step in at else {}
        arm.command(runner.step(see(step, arm.x, **told)))
    return arm


def started(execution, delays, policy=None, **settings):
    clock = Clock(iter(delays))
    runner = Runner(policy or Walker(), execution=execution, executor=clock, **settings)
    runner.reset("go")
    return runner, clock


def jumps(arm):
    return np.abs(np.diff([0.0, *(float(action[0]) for action in arm.commands)]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=30, max_size=30), st.integers(1, 4))
def test_regrounded_never_jumps_however_late_the_chunks_are(delays, overlap):
    runner, clock = started("regrounded", itertools.cycle(delays), execute=4, overlap=overlap)
    arm = drive(runner, clock, 60)
    assert jumps(arm).max() <= STEP_M + 1e-5
    assert runner.steps + runner.held == 60
    policy = runner.policy
    for asked in range(1, len(policy.frames)):
        sent = policy.recorded[asked - 1]
        assert len(sent) == len(policy.frames[asked]) == 4
        assert len(policy.committed[asked]) == overlap
        if asked < len(policy.recorded):  # what was said to be carried out next was
            np.testing.assert_array_equal(policy.recorded[asked][:overlap], policy.committed[asked])
    carried_out = [action for action, held in zip(arm.commands, held_steps(arm), strict=True) if not held]
    told = np.concatenate(policy.recorded)
    np.testing.assert_allclose(told, carried_out[: len(told)])


def held_steps(arm):
    """An arm that walks repeats an action only when it holds still."""
    return [False, *(bool((a == b).all()) for a, b in itertools.pairwise(arm.commands))]


@pytest.mark.parametrize("delay", [0, 1, 2, 4])
def test_delays_are_counted_in_steps_and_the_first_request_is_not_counted(delay):
    runner, clock = started("regrounded", [9, *[delay] * 20], execute=4, overlap=4)
    drive(runner, clock, 30)
    assert set(runner.delays) == {delay}
    assert len(runner.delays) >= 6
    assert runner.held == 0


def test_naive_jumps_back_to_where_the_robot_was_when_it_was_asked():
    arms = {}
    for execution in ("naive", "regrounded"):
        runner, clock = started(execution, itertools.repeat(3), execute=4, overlap=3)
        arms[execution] = lagging(runner, clock)
    assert jumps(arms["regrounded"]).max() <= STEP_M + 1e-6
    assert jumps(arms["naive"]).max() > 2 * STEP_M


def lagging(runner, clock, steps=40):
    """An arm whose state is read four actions late: a plan from its state starts behind the committed actions."""
    arm, xs = Arm(), [0.0] * 5
    for step in range(steps):
        clock.now = step
        arm.command(runner.step(see(step, xs[-5])))
        xs.append(arm.x)
    return arm


def test_ensemble_is_the_mean_of_all_chunks_that_planned_a_step():
    handover = Handover("ensemble", 2)
    chunks = [np.full((6, 1), value, np.float32) for value in (0, 3, 6, 9)]
    rows = []
    for chunk in chunks:
        handover.request(1)
        rows += handover.take(ActionChunk(chunk, ("x",), 20.0), 1)[:, 0].tolist()
    # the first row after a request was committed before the new chunk was there
    assert rows == [0, 0, 0, 1.5, 1.5, 3, 4.5, 6]


def test_waiting_holds_still_for_every_chunk_and_shows_no_frame_of_it():
    runner, clock = started("wait", [5, *[3] * 20], execute=4)
    arm = drive(runner, clock, 25)
    assert (runner.held, set(runner.delays)) == (9, {3})
    assert runner.policy.frames == [[0], [1, 2, 3, 4], [8, 9, 10, 11], [15, 16, 17, 18]][: len(runner.policy.frames)]
    assert jumps(arm).max() <= STEP_M + 1e-6


def test_a_late_chunk_makes_the_robot_hold_the_last_action_and_then_go_on_from_there():
    runner, clock = started("regrounded", [0, 7, *[1] * 20], execute=4, overlap=2)
    arm = drive(runner, clock, 20)
    x = [round(float(action[0]) / STEP_M) for action in arm.commands]
    assert x == [1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert runner.held == 5
    assert runner.policy.frames[2] == [5, 10 + 1, 12, 13][:1] + runner.policy.frames[2][1:]


def test_changes_are_held_by_none_but_the_gripper_s_command_stays():
    class Pusher(Walker):
        action_kind = "relative"

        def act(self, observation):
            actions = np.tile(np.array([[0.01, 0.7]], np.float32), (8, 1))
            return ActionChunk(actions, ARM.action_names, 20.0)

    runner, clock = started("regrounded", [0, 99], Pusher(), execute=4, overlap=2, patience=3)
    arm = Arm()
    with pytest.raises(RunnerStopped, match="no actions for 3 control steps"):
        drive(runner, clock, 20, arm)
    expected = [[0.01, 0.7]] * 6 + [[0.0, 0.7]] * 3
    np.testing.assert_allclose(arm.commands, expected)
    runner.stop(arm.command)
    np.testing.assert_allclose(arm.commands[-1], [0.0, 0.7])


def test_velocities_are_held_by_none_whatever_the_kind():
    robot = Embodiment.from_names("base", ["v", "x", "grip"], units=["m/s", "m", "1"])
    last = np.array([0.3, 0.4, 0.5], np.float32)
    assert robot.hold(last, "absolute").tolist() == pytest.approx([0, 0.4, 0.5])
    assert robot.hold(last, "relative").tolist() == pytest.approx([0, 0, 0.5])


def test_the_overlap_follows_the_delays_that_were_measured():
    runner, clock = started("regrounded", [0, 3, *[1] * 40], execute=4)
    drive(runner, clock, 80)
    assert [len(rows) for rows in runner.policy.committed[1:14]] == [4, 4, *[4] * 9, 2, 2]
    assert runner.held == 0


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_an_instruction_changes_in_mid_episode_without_a_reset(execution):
    runner, clock = started(execution, itertools.repeat(1), execute=4)
    arm = drive(runner, clock, 40, at={10: "back"})
    assert runner.policy.told[0] == "go"
    assert runner.policy.told.count("back") == 1
    assert arm.commands[-1][0] < arm.commands[14][0] - 10 * STEP_M
    assert jumps(arm).max() <= STEP_M + 1e-5 or execution != "regrounded"


def test_a_new_episode_forgets_the_old_one():
    runner, clock = started("regrounded", itertools.repeat(1), execute=4)
    drive(runner, clock, 10)
    runner.reset("again")
    assert (runner.steps, runner.held, runner.hold()) == (0, 0, None)
    drive(runner, clock, 3)
    assert runner.policy.frames == [[0]]


def test_the_loop_of_the_documentation_with_a_thread():
    """Real threads: a policy that is slower than the loop, and every step answers at once.

    The loop goes on until enough actions are out, however late the machine runs the policy's thread.
    """
    gate, policy = threading.Semaphore(0), Walker()
    act = policy.act

    def slow(observation):
        if policy.frames:
            gate.acquire(timeout=30)
        return act(observation)

    policy.act = slow
    arm = Arm()
    deadline = time.monotonic() + 60
    with Runner(policy, execute=4, overlap=4, patience=10**9) as runner:
        runner.reset("go")
        for number in itertools.count():
            if number % 7 == 0:
                gate.release()
            arm.command(runner.step(see(number, arm.x)))
            if runner.steps >= 40 or time.monotonic() > deadline:
                break
            time.sleep(1e-4)  # until the next control step, as a robot's loop: the other thread gets its turn
        gate.release()
        runner.stop(arm.command)
    assert runner.steps >= 40
    assert jumps(arm).max() <= STEP_M + 1e-5
    with pytest.raises(RunnerStopped, match="closed"):
        runner.step(see(0, 0))


class Failing(Walker):
    """Fails when it is asked for the third time."""

    def __init__(self, error, rows=8):
        super().__init__(rows)
        self.error = error

    def act(self, observation):
        if len(self.frames) == 2:
            raise self.error
        return super().act(observation)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("error", [UserError("expected more light"), RuntimeError("secret"), OSError("no route")])
def test_an_error_of_the_policy_is_one_clear_error_and_a_safe_stop(execution, error, caplog):
    runner, clock = started(execution, itertools.repeat(1), Failing(error), execute=4)
    arm = Arm()
    with pytest.raises(RunnerStopped, match=r"stopped after \d+ actions: .*" + str(error)) as stopped:
        drive(runner, clock, 30, arm)
    assert stopped.value.__cause__ is error
    runner.stop(arm.command)
    np.testing.assert_array_equal(arm.commands[-1], arm.commands[-2])  # targets: to hold is to keep the last one
    with pytest.raises(RunnerStopped, match=str(error)):
        runner.step(see(0, 0))
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1
    runner.policy.error = None


def test_a_policy_that_cannot_begin_stops_too():
    class Broken(Walker):
        def reset(self, instruction, seed=0):
            raise ConnectionError("gone")

    with pytest.raises(RunnerStopped, match="ConnectionError: gone"):
        started("regrounded", [0], Broken())


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (lambda: Observation({"ear": np.zeros((2, 2, 3), np.uint8)}), r"no \['eye'\]"),
        (lambda: Observation({"eye": np.zeros((4, 2, 3), np.uint8)}), "2 x 2, got 4 x 2; are the cameras exchanged"),
        (lambda: Observation({"eye": np.zeros((2, 2, 2, 3), np.uint8)}), "one frame per control step, got 2"),
        (
            lambda: Observation({"eye": np.zeros((2, 2, 3), np.uint8)}, np.zeros(3, np.float32)),
            r"2 numbers \(x, grip\), got 3",
        ),
        (lambda: see(0, np.nan), "state must be finite"),
        (lambda: see(0, np.inf), "state must be finite"),
    ],
)
def test_what_the_sensors_cannot_mean_stops_the_robot(seen, message):
    runner, clock = started("regrounded", itertools.repeat(1), execute=4)
    arm = drive(runner, clock, 6)
    with pytest.raises(UserError, match=message):
        arm.command(runner.step(seen()))
    runner.stop(arm.command)
    np.testing.assert_array_equal(arm.commands[-1], arm.commands[-2])
    assert len(arm.commands) == 7


def test_actions_that_are_no_numbers_or_of_other_channels_stop_the_robot():
    class Wild(Walker):
        def act(self, observation):
            chunk = super().act(observation)
            if len(self.frames) < 2:
                return chunk
            return ActionChunk(chunk.actions * self.factor, self.names, 20.0)

    for factor, names, message in ((np.nan, ARM.action_names, "must be finite"), (1, ("x", "y"), "x, grip, got x, y")):
        policy = Wild()
        policy.factor, policy.names = np.float32(factor), names
        runner, clock = started("regrounded", itertools.repeat(1), policy, execute=4)
        with pytest.raises(RunnerStopped, match=message):
            drive(runner, clock, 20)


def test_limits_are_clamped_and_what_was_carried_out_is_told(caplog):
    limits = Limits(
        channels={"x": ChannelLimits(high=0.3, step=0.02, unit="m"), "grip": ChannelLimits(low=0.0, high=0.5)}
    )
    runner, clock = started("regrounded", itertools.repeat(2), execute=4, overlap=3, limits=limits)
    arm = drive(runner, clock, 40)
    x = np.array([action[0] for action in arm.commands])
    assert x.max() <= 0.3 + 1e-6
    assert jumps(arm).max() <= 0.02 + 1e-6
    assert all(action[1] == 0.5 for action in arm.commands)
    told = np.concatenate(runner.policy.recorded)
    np.testing.assert_allclose(told[:, 0], x[: len(told)])
    assert [record.message for record in caplog.records] == [
        "step 0: clamped x 0.05 m instead of 0.02", "step 0: clamped grip 1 1 instead of 0.5"
    ]  # fmt: skip
    assert runner.clamped["grip"] == 40


def test_limits_that_refuse_stop_the_robot_before_the_action():
    limits = Limits(channels={"x": ChannelLimits(high=0.3, unit="m"), "grip": ChannelLimits()}, beyond="refuse")
    runner, clock = started("regrounded", itertools.repeat(1), execute=4, limits=limits)
    arm = Arm()
    with pytest.raises(RunnerStopped, match=r"beyond the limits was refused: x 0\.35"):
        drive(runner, clock, 40, arm)
    assert arm.x <= 0.3 + 1e-6
    assert arm.x > 0.19


def test_an_intervention_is_told_to_the_policy():
    runner, clock = started("regrounded", itertools.repeat(1), execute=4, overlap=2)
    for step in range(5):
        clock.now = step
        runner.step(see(step, 0.0))
        if step == 2:
            runner.override(np.array([0.4, 0.0]))
    np.testing.assert_allclose(runner.policy.recorded[0][:, 0], [0.05, 0.1, 0.4, 0.2], atol=1e-6)
    with pytest.raises(UserError, match="one finite action of the channels x, grip"):
        runner.override(np.zeros(3))


def test_a_dry_run_moves_nothing_and_says_what_it_would_do():
    runner, clock = started("regrounded", itertools.repeat(1), execute=4, dry_run=True)
    wanted = []
    for step in range(10):
        clock.now = step
        assert runner.step(see(step, 0.5))[0] == 0.5
        wanted.append(float(runner.planned[0]))
    assert wanted[0] == pytest.approx(0.55)
    assert all(row[0] == 0.5 for row in np.concatenate(runner.policy.recorded))

    class Blind(Walker):
        embodiment = type(ARM).from_names("arm", ["x", "grip"], [], ["eye"], 20.0, ["m", "1"])

    runner, clock = started("regrounded", [0], Blind(), dry_run=True)
    with pytest.raises(RunnerStopped, match="a dry run holds still where the robot stands"):
        runner.step(see(0, 0))


def test_what_cannot_be_is_refused():
    class Mute(BasePolicy):
        embodiment = ARM

        def reset(self, instruction, seed=0):
            pass

        def act(self, observation):
            return ActionChunk(np.zeros((8, 2), np.float32), ARM.action_names, 20.0)

    class Nobodys(Mute):
        embodiment = None

    for arguments, message in (
        ({"execute": 3}, "the policy takes 4 frames at a time, expected a multiple, got 3"),
        ({"execute": 4, "overlap": 5}, "at most the 4 steps between two requests"),
        ({"overlap": -1}, "overlap >= 0"),
    ):
        with pytest.raises(UserError, match=message):
            Runner(Walker(), executor=Clock(itertools.repeat(0)), **arguments)
    with pytest.raises(UserError, match="the robot that it drives"):
        Runner(Nobodys())
    runner, clock = started("regrounded", itertools.repeat(1), Mute(), execute=4)
    with pytest.raises(RunnerStopped, match="Mute cannot plan on from committed actions"):
        drive(runner, clock, 20)
    runner, clock = started("naive", itertools.repeat(1), Mute(), execute=4)
    drive(runner, clock, 20)
    for policy, settings_, message in (
        (Walker(4), {}, "the policy gives 4 actions and has to see 4 frames"),
        (Walker(8), {"execute": 8}, "cannot execute 8 actions of a chunk of 8 and 1 more"),
    ):
        runner, clock = started("regrounded", itertools.repeat(1), policy, **settings_)
        with pytest.raises(RunnerStopped, match=message):
            runner.step(see(0, 0.0))
    with pytest.raises(RunnerStopped, match="reset was not called"):
        Runner(Walker()).step(see(0, 0.0))
