"""Meta-World behind the simulator interface: its tasks, their groups and their instructions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from repvitok.runtime.errors import UserError
from repwam_core.sim.base import TaskPool
from repwam_core.sim.metaworld import (
    DIFFICULTIES,
    SAME_SCENE_PAIR,
    TASKS,
    MetaWorldSettings,
    MetaWorldTask,
    difficulty,
    instruction,
    paraphrases,
)
from repwam_core.sim.mujoco import import_mujoco
from repwam_core.sim.results import EpisodeResult, mean_rates, success_rates

SMALL = MetaWorldSettings(size=(32, 32))


def states(task: MetaWorldTask, seed: int, steps: int = 12) -> np.ndarray:
    """The expert's trajectory: every state, bit for bit."""
    task.start(seed)
    seen = [task.state]
    for _ in range(steps):
        task.advance(task.expert_action())
        seen.append(task.state)
    return np.stack(seen)


@pytest.mark.parametrize("name", ["button-press-topdown", "button-press-topdown-v3"])
def test_names_come_with_or_without_their_version(name):
    assert MetaWorldSettings.task_name(name) == "button-press-topdown"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("button-press-top", "did you mean button-press"),
        ("coffe-button", "did you mean coffee-button"),
        ("ZZZ", "unknown"),
    ],
)
def test_an_unknown_task_names_the_closest_ones(name, words):
    with pytest.raises(UserError, match=words):
        MetaWorldSettings.task_name(name)


def test_no_task_or_one_twice_is_refused():
    with pytest.raises(UserError, match="at least one task"):
        MetaWorldSettings.task_names([])
    with pytest.raises(UserError, match="once only"):
        MetaWorldSettings.task_names(["reach", "reach-v3"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": (60, 64)}, r"multiples of 16 up to 4096, got \(60, 64\)"),
        ({"size": (0, 64)}, r"multiples of 16 up to 4096, got \(0, 64\)"),
        ({"cameras": ("front",)}, r"got \['front'\]"),
        ({"cameras": ()}, r"got \[\]"),
        ({"act_repeat": 0}, "act_repeat must be at least 1, got 0"),
        ({"max_env_steps": 501}, r"must lie in \[act_repeat, 500\], got 501"),
        ({"same_scene": (("reach", "push"), ("push-v3", "sweep"))}, "one group of same_scene only"),
    ],
)
def test_settings_are_checked(values, words):
    with pytest.raises(ValueError, match=words):
        MetaWorldSettings(**values)


def test_settings_survive_json():
    settings = MetaWorldSettings(("corner2", "gripper"), (48, 64), same_scene=(SAME_SCENE_PAIR,))
    assert MetaWorldSettings.from_dict(settings.to_dict()) == settings
    with pytest.raises(ValueError, match="missing fields"):
        MetaWorldSettings.from_dict({"size": [64, 64]})


@pytest.mark.sim
class TestSimulation:
    def test_ours_are_all_its_tasks(self):
        import_mujoco()
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        assert tuple(name.removesuffix("-v3") for name in ALL_V3_ENVIRONMENTS) == TASKS

    @pytest.mark.parametrize("name", ["button-press-topdown", "push", "pick-place-wall"])
    def test_the_seed_decides_whatever_ran_before(self, name):
        with MetaWorldTask(name) as used, MetaWorldTask(name) as fresh:
            first = states(used, 3)
            other = states(used, 4)
            np.testing.assert_array_equal(states(used, 3), first)
            np.testing.assert_array_equal(states(fresh, 3), first)
        assert not np.array_equal(other, first)

    def test_an_action_is_metres_per_control_step(self):
        """Half of the largest command, three steps on: the hand lags behind, then keeps the commanded speed."""
        with MetaWorldTask("reach") as task:
            task.start(0)
            action = np.array([0.0, 0.01, 0.0, 0.0])
            for _ in range(8):
                task.advance(action)
            before = task.state
            task.advance(action)
            assert task.state[1] - before[1] == pytest.approx(0.01, rel=0.1)
            assert task.action_limits.tolist() == [0.02, 0.02, 0.02, 1.0]

    def test_the_expert_stays_within_the_limits_and_succeeds(self):
        with MetaWorldTask("handle-press-side") as task:
            task.start(0)
            while not task.done:
                action = task.expert_action()
                assert (np.abs(action) <= task.action_limits + 1e-7).all()
                task.advance(action)
            assert task.success
            assert task.steps < task.max_steps == 100

    def test_a_wrong_action_is_refused(self):
        with MetaWorldTask("reach") as task:
            with pytest.raises(RuntimeError, match="start the episode"):
                task.advance(np.zeros(4))
            task.start(0)
            with pytest.raises(ValueError, match="expected 4 finite numbers"):
                task.advance(np.zeros(3))
            with pytest.raises(ValueError, match="expected 4 finite numbers"):
                task.advance(np.array([0, 0, np.nan, 0]))

    def test_tasks_of_different_models_share_no_scene(self):
        settings = MetaWorldSettings(same_scene=(("door-open", "drawer-open"),))
        with pytest.raises(ValueError, match="different models"):
            MetaWorldTask("drawer-open", settings)

    def test_the_pool_lends_each_simulator_once(self):
        pool = TaskPool(SMALL, keep=1)
        first, second = pool.take("reach"), pool.take("reach")
        assert first is not second
        pool.give_back(first)
        assert pool.take("reach") is first
        pool.give_back(first)
        pool.give_back(second)
        assert pool.take("reach") is second
        pool.close()


@pytest.mark.sim
@pytest.mark.usefixtures("rendering")
class TestPictures:
    def test_a_seed_gives_the_same_pictures_and_another_one_others(self):
        with MetaWorldTask("window-open", SMALL) as task:
            first, again, other = (task.reset(seed).frames("observation.images.corner2") for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)

    def test_cameras_share_a_size_and_see_different_things(self):
        settings = MetaWorldSettings(("corner2", "gripper"), (32, 48))
        with MetaWorldTask("window-open", settings) as task:
            seen = task.reset(0)
        assert seen.cameras == settings.camera_keys == task.embodiment.cameras
        pictures = [seen.frames(camera)[0] for camera in seen.cameras]
        assert [picture.shape for picture in pictures] == [(32, 48, 3)] * 2
        assert not np.array_equal(*pictures)

    def test_corner_cameras_are_the_right_side_up(self):
        """Lifting the hand moves the arm's red pixels up in the picture, to the rows that come first."""
        for camera in ("corner", "corner2", "corner3"):
            with MetaWorldTask("reach", MetaWorldSettings((camera,), (64, 64))) as task:
                low = _highest_red_row(task.reset(0).frames(f"observation.images.{camera}")[0])
                for _ in range(12):
                    task.advance(np.array([0, 0, 0.02, 0]))
                high = _highest_red_row(task.observe().frames(f"observation.images.{camera}")[0])
            assert high < low, camera

    def test_one_picture_cannot_tell_the_pair_apart(self):
        settings = MetaWorldSettings(same_scene=(SAME_SCENE_PAIR,))
        with MetaWorldTask(SAME_SCENE_PAIR[0], settings) as one, MetaWorldTask(SAME_SCENE_PAIR[1], settings) as two:
            for seed in range(5):
                first, second = one.reset(seed), two.reset(seed)
                np.testing.assert_array_equal(*(seen.frames(seen.cameras[0]) for seen in (first, second)))
                np.testing.assert_array_equal(first.state, second.state)

    def test_without_the_option_it_can(self):
        with MetaWorldTask(SAME_SCENE_PAIR[0]) as one, MetaWorldTask(SAME_SCENE_PAIR[1]) as two:
            first, second = one.reset(0), two.reset(0)
        assert not np.array_equal(first.frames(first.cameras[0]), second.frames(second.cameras[0]))


def _highest_red_row(picture: np.ndarray) -> float:
    """Mean row of the ten highest rows' worth of arm: the arm is the one dark red thing."""
    red, green, blue = (picture[..., channel].astype(int) for channel in range(3))
    rows = np.nonzero((red > 80) & (red > 2 * green) & (red > 2 * blue))[0]
    return float(np.sort(rows)[: len(rows) // 4].mean())


DIRECTIONS = {"open": "close", "right": "left"}


def test_every_task_has_several_sentences_of_its_own():
    assert len(TASKS) == 50
    every = [sentence for task in TASKS for sentence in paraphrases(task)]
    assert all(len(paraphrases(task)) >= 4 for task in TASKS)
    assert len(set(every)) == len(every)


def test_the_draw_depends_on_task_and_seed_alone():
    drawn = [instruction("faucet-open", seed) for seed in range(40)]
    assert drawn == [instruction("faucet-open", seed) for seed in range(40)]
    assert set(drawn) == set(paraphrases("faucet-open"))


def test_faucet_sentences_differ_in_the_direction_alone():
    for opened, closed in zip(paraphrases("faucet-open"), paraphrases("faucet-close"), strict=True):
        assert " ".join(DIRECTIONS.get(word, word) for word in opened.replace(":", " :").split()) == " ".join(
            closed.replace(":", " :").split()
        )


def test_unknown_task_is_refused():
    with pytest.raises(ValueError, match="no instructions for task 'fly'"):
        paraphrases("fly")


def result(task: str, seed: int, success: bool) -> EpisodeResult:
    return EpisodeResult(task, 1_000_000 + seed, None, success, 10)


def test_the_groups_have_the_published_sizes():
    assert Counter(map(difficulty, TASKS)) == {"easy": 28, "medium": 11, "hard": 6, "very hard": 5}


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="canonical name, got 'push-v3'"):
        difficulty("push-v3")


def test_means_are_over_tasks_and_absent_groups_are_left_out():
    episodes = [result("push", 0, True), result("drawer-open", 0, True)]
    episodes += [result("door-lock", seed, seed == 0) for seed in range(4)]
    assert mean_rates(success_rates(episodes), DIFFICULTIES) == {"easy": (1 + 1 / 4) / 2, "hard": 1.0}
