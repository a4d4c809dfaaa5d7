"""What a delay costs in a simulator: counted in its steps, and the same as a runner's on the robot."""

import importlib
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pytest
from repvitok.runtime.errors import UserError
from repwam_core.interface import ActionChunk, BasePolicy
from repwam_core.policy.runner import Runner
from repwam_core.sim.base import evaluation_seeds
from repwam_core.sim.evaluate import evaluate

SEEDS = evaluation_seeds(3)


class Here:
    """A worker that is no process: what is tried here is what happens in a simulator, not where it runs."""

    def __init__(self, make):
        self.served, self.answers = make(), []

    def submit(self, method, *arguments):
        self.answers.append(getattr(self.served, method)(*arguments))

    def result(self):
        return self.answers.pop(0)

    def close(self):
        self.served.close()


@pytest.fixture
def toy(monkeypatch):
    """The documentation's simulator, run in this process."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setattr("repwam_core.sim.evaluate.Worker", Here)
    return importlib.import_module("toy_simulator")


class Braking(BasePolicy):
    """Goes where it is told to, slower the nearer it is, from the place that it believes in; keeps what it was asked.

    What it plans depends on the newest frame and on what is committed, so that a mistake of either changes the episode.
    """

    frames_per_latent, action_kind = 4, "relative"
    asked: list[tuple]

    def __init__(self, embodiment=None):
        self.embodiment, self.asked, self._committed = embodiment, [], None

    def reset(self, instruction, seed=0):
        self.goal = {"left": -1.0, "right": 1.0}[(instruction or "").rpartition(" ")[2]]
        self.asked, self._committed, self._recorded = [], None, None

    def record(self, actions_si):
        self._recorded = actions_si.copy()

    def commit(self, actions_si):
        self._committed = actions_si.copy()

    def act(self, observation):
        self.asked.append((observation.num_frames, self._recorded, self._committed))
        rows = [] if self._committed is None else [float(row[0]) for row in self._committed]
        x = float(observation.states()[-1, 0]) + sum(rows)
        while len(rows) < 8:
            rows.append(float(np.clip(0.3 * (self.goal - x), -0.1, 0.1)))
            x += rows[-1]
        self._committed = None
        return ActionChunk(np.array(rows, np.float32)[:, None], ("move",), 10.0)


class Steps(Executor):
    """Every call but a reset takes `delay` control steps."""

    def __init__(self, delay):
        self.delay, self.now = delay, 0

    def submit(self, call, /, *arguments, **named):
        future, at = Future(), self.now + self.delay
        future.set_result(call(*arguments, **named))
        future.done = lambda: self.now >= at
        return future

    def shutdown(self, wait=True, *, cancel_futures=False):
        pass


@pytest.mark.parametrize("execution", ["wait", "naive", "ensemble", "regrounded"])
@pytest.mark.parametrize("delay", [0, 1, 2, 4])
def test_an_evaluation_is_what_a_runner_does(toy, execution, delay):
    settings = toy.ToySettings(max_steps=100)
    results = evaluate(
        Braking, ["go-left"], SEEDS, settings=settings, execute=4, execution=execution, delay=delay, workers=1
    )
    for result in results:
        task, clock = settings.make_task("go-left"), Steps(delay)
        policy = Braking(settings.embodiment)
        runner = Runner(policy, execution=execution, execute=4, overlap=delay, executor=clock)
        observation = task.reset(result.seed)
        runner.reset(result.instruction)
        while not task.done:
            observation = task.step(runner.step(observation))
            clock.now += 1
        assert (result.success, result.steps) == (task.success, task.steps)
        assert result.success
        assert [frames for frames, _, _ in policy.asked] == [1, *[4] * (len(policy.asked) - 1)]


def test_waiting_costs_steps_and_regrounding_none(toy):
    settings = toy.ToySettings(max_steps=100)

    def steps(execution, delay):
        given = {"settings": settings, "execute": 4, "execution": execution, "delay": delay, "workers": 1}
        return [result.steps for result in evaluate(Braking, ["go-right"], SEEDS, **given)]

    at_once = steps("wait", 0)
    for delay in (1, 2, 4):
        assert steps("regrounded", delay) == at_once  # a policy that knows what is committed plans as if at once
        assert all(
            waited == planned + delay * ((planned - 1) // 4)
            for waited, planned in zip(steps("wait", delay), at_once, strict=True)
        )
    late = zip(steps("naive", 4), at_once, strict=True)
    assert all(naive >= planned for naive, planned in late)  # the toy's wall stops what a stale plan overshoots


def test_bad_requests_are_refused(toy):
    for given, message in (
        ({"delay": -1}, "delay must be at least 0, got -1"),
        ({"execute": 4, "delay": 5, "execution": "naive"}, "cannot execute 4 actions of a chunk of 8 and 5 more"),
        ({"execute": None, "delay": 8, "execution": "naive"}, "leaves nothing of a chunk of 8"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(Braking, ["go-left"], SEEDS, settings=toy.ToySettings(), workers=1, **given)
