"""Closed loop: what the policy sees, how episodes end, what a crash costs."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
from repvitok.runtime.errors import UserError
from repwam_core.interface import ActionChunk, BasePolicy, BatchedBasePolicy
from repwam_core.sim.base import HAND_TO_OBJECT, OBJECT_TO_GOAL, evaluation_seeds
from repwam_core.sim.evaluate import OnePolicyEach, evaluate
from repwam_core.sim.metaworld import TASKS, MetaWorldSettings, MetaWorldTask
from repwam_core.sim.results import load_results
from repwam_core.sim.workers import VectorEnv

SMALL = MetaWorldSettings(size=(32, 32), max_env_steps=60)
CHANNELS = ("ee_delta_x", "ee_delta_y", "ee_delta_z", "gripper_effort")
SEEDS = evaluation_seeds(2)

pytestmark = [pytest.mark.sim, pytest.mark.usefixtures("rendering")]


def chunk(actions: np.ndarray) -> ActionChunk:
    return ActionChunk(actions.astype(np.float32), CHANNELS, 40.0)


class Scripted(BatchedBasePolicy):
    """Replays the expert's actions, computed beside it for the same seeds; keeps what it was shown."""

    def __init__(self, tasks: list[str]):
        self.tasks = tasks
        self.frames: list[list[int]] = []
        self.resets: list[tuple] = []

    def reset(self, instructions, seeds):
        self.resets.append((list(instructions), list(seeds)))
        names = [self.tasks[i % len(self.tasks)] for i in range(len(seeds))]
        self.plans = [expert_actions(name, seed) for name, seed in zip(names, seeds, strict=True)]
        self.step = 0

    def act(self, observations):
        self.frames.append([seen.num_frames for seen in observations])
        now, self.step = self.step, self.step + 4
        return [chunk(plan[now : now + 4]) for plan in self.plans]


def expert_actions(name: str, seed: int) -> np.ndarray:
    """Enough for every step; zeros after success."""
    actions = np.zeros((40, 4))
    with MetaWorldTask(name, SMALL) as task:
        task.start(seed)
        while not task.done:
            actions[task.steps] = task.expert_action()
            task.advance(actions[task.steps])
    return actions


class Still(BasePolicy):
    def reset(self, instruction, seed=0):
        self.told = instruction

    def act(self, observation):
        return chunk(np.zeros((4, 4)))


def test_the_expert_s_actions_succeed_in_step_with_a_failing_episode(tmp_path):
    policy = Scripted(["handle-press-side", "assembly"])
    results = evaluate(policy, policy.tasks, SEEDS, settings=SMALL, workers=2, filmed_per_task=1, out=tmp_path)
    assert [(r.task, r.seed) for r in results] == [(task, seed) for seed in SEEDS for task in policy.tasks]
    assert [r.success for r in results] == [True, False] * 2
    assert [r.steps for r in results if not r.success] == [30, 30]
    assert all(frames == [4] * 4 for frames in policy.frames[1:])
    assert policy.frames[0] == [1] * 4
    assert len(policy.frames) == 8
    for result, filmed in zip(results, [True, True, False, False], strict=True):
        assert (result.frames is not None) == filmed
        if result.frames is not None:
            assert len(result.frames) == result.steps + 1
    loaded, about = load_results(tmp_path / "results.json")
    assert [r.to_dict() for r in loaded] == [r.to_dict() for r in results]
    assert MetaWorldSettings.from_dict(about["settings"]) == SMALL


def test_the_first_success_and_the_first_failure_of_a_task_are_filmed_and_all_are_traced(tmp_path):
    policy = Scripted(["handle-press-side", "assembly"])
    options = {"settings": SMALL, "workers": 1, "batch_size": 2, "filmed_per_task": "outcomes", "traced": True}
    results = evaluate(policy, policy.tasks, SEEDS, **options, out=tmp_path)
    assert [r.frames is not None for r in results] == [True, True, False, False]
    for result in results:
        actions = {f"action/{name}" for name in SMALL.embodiment.action_names}
        distances = {HAND_TO_OBJECT, OBJECT_TO_GOAL, "hand to goal"}
        assert set(result.trace) == {*SMALL.embodiment.state_channels, *distances, *actions}
        assert all(len(rows) == result.steps + (name not in actions) for name, rows in result.trace.items())
    with MetaWorldTask("assembly", SMALL) as task:
        task.start(SEEDS[0])
        first = task.distances()
    assert results[1].trace[HAND_TO_OBJECT][0] == pytest.approx(first[HAND_TO_OBJECT], abs=1e-4)
    loaded, _ = load_results(tmp_path / "results.json")
    assert [r.trace for r in loaded] == [r.trace for r in results]


def test_many_tasks_run_ten_at_a_time_and_come_back_in_order():
    names = list(TASKS[:12])
    seen: list[list[str]] = []

    class Watching(OnePolicyEach):
        def reset(self, instructions, seeds):
            seen.append(list(instructions))
            super().reset(instructions, seeds)

    tiny = MetaWorldSettings(size=(16, 16), max_env_steps=8)
    told = {"instruction_of": lambda task, seed: task, "batch_size": 10, "workers": 1}
    results = evaluate(Watching(Still), names, SEEDS, settings=tiny, **told)
    assert [(r.task, r.seed) for r in results] == [(task, seed) for seed in SEEDS for task in names]
    assert [set(batch) for batch in seen] == [set(names[:10]), set(names[:10]), set(names[10:])]


def test_batches_and_instructions():
    policy = Scripted(["handle-press-side"])
    evaluate(
        policy, policy.tasks, evaluation_seeds(3), settings=SMALL, batch_size=2, workers=1,
        instruction_of=lambda task, seed: f"{task} {seed}" if seed % 2 else None,
    )  # fmt: skip
    first = SEEDS[0]
    assert policy.resets == [
        ([None, f"handle-press-side {first + 1}"], [first, first + 1]),
        ([None], [first + 2]),
    ]


def test_single_policies_are_made_for_each_place():
    results = evaluate(Still, ["reach"], SEEDS, settings=SMALL, workers=1)
    assert [(r.success, r.steps, r.crashed) for r in results] == [(False, 30, None)] * 2


@pytest.mark.slow
def test_a_killed_simulator_fails_its_episodes_and_the_rest_go_on():
    class Killer(Scripted):
        def act(self, observations):
            if len(self.frames) == 1:
                victim = min(multiprocessing.active_children(), key=lambda child: child.pid or 0)
                os.kill(victim.pid or 0, signal.SIGKILL)
                victim.join()
            return super().act(observations)

    policy = Killer(["handle-press-side"])
    results = evaluate(policy, policy.tasks, evaluation_seeds(4), settings=SMALL, workers=2, batch_size=2)
    crashed = [result for result in results if result.crashed]
    assert len(crashed) == 1
    assert "ended unexpectedly" in (crashed[0].crashed or "")
    assert sum(result.success for result in results) == 3


def test_an_error_in_the_simulator_is_a_failed_episode(monkeypatch):
    host = VectorEnv(SMALL)
    host.start({0: ("reach", SEEDS[0]), 1: ("reach", SEEDS[1])})

    def explode(action):
        raise RuntimeError("the arm came off")

    monkeypatch.setattr(host._slots[0], "advance", explode)
    after = host.execute({slot: np.zeros((4, 4), np.float32) for slot in (0, 1)})
    assert (after[0].crashed, after[0].success, after[0].done) == ("RuntimeError: the arm came off", False, True)
    assert "explode" in (after[0].traceback or "")
    assert (after[1].crashed, after[1].steps) == (None, 4)
    host.close()


@pytest.mark.parametrize("method", ["__init__", "reset"])
def test_an_error_before_the_first_frame_is_one_too(monkeypatch, method):
    def explode(self, *_):
        raise ValueError("not the user's")

    host = VectorEnv(SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(MetaWorldTask, method, explode)
        began = host.start({0: ("reach", SEEDS[0])})
    assert (began[0].crashed, began[0].done, began[0].observation) == ("ValueError: not the user's", True, None)
    assert host.start({0: ("reach", SEEDS[0])})[0].crashed is None
    host.close()


def test_an_evaluation_that_was_cut_off_goes_on_with_the_next_batch(tmp_path):
    class Cut(Scripted):
        def reset(self, instructions, seeds):
            if len(self.resets) == 1:
                raise KeyboardInterrupt
            super().reset(instructions, seeds)

    def run(policy, out):
        given = {"settings": SMALL, "batch_size": 1, "workers": 1, "filmed_per_task": 2, "about": {"who": "scripted"}}
        return evaluate(policy, policy.tasks, SEEDS, out=out, **given)

    tasks = ["handle-press-side"]
    with pytest.raises(KeyboardInterrupt):
        run(Cut(tasks), tmp_path / "cut")
    resumed, whole = Scripted(tasks), Scripted(tasks)
    results = run(resumed, tmp_path / "cut"), run(whole, tmp_path / "whole")
    assert len(resumed.resets) == 1
    assert [r.to_dict() for r in results[0]] == [r.to_dict() for r in results[1]]
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one.frames, other.frames)
    assert (tmp_path / "cut/results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()


def test_bad_requests_are_refused():
    with pytest.raises(UserError, match="no demonstration shows them"):
        evaluate(Still, ["reach"], [0], settings=SMALL)
    with pytest.raises(UserError, match="unknown Meta-World task"):
        evaluate(Still, ["fly"], SEEDS, settings=SMALL)
    with pytest.raises(UserError, match="must be at least 1"):
        evaluate(Still, ["reach"], SEEDS, settings=SMALL, execute=0)
