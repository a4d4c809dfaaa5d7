"""Fifty tasks in four groups, each task in one; a group's mean weighs its tasks alike."""

from collections import Counter

import pytest
from repwam_core.sim.metaworld import DIFFICULTIES, TASKS, difficulty
from repwam_core.sim.results import EpisodeResult, mean_rates, success_rates


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
