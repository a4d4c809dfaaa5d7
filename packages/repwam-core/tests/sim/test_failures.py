"""Where failed episodes end, and whose demonstrations they move like."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from repwam_core.sim.base import HAND_TO_OBJECT, OBJECT_TO_GOAL
from repwam_core.sim.results import AWAY, COMPARED_STEPS, SHORT, UNMOVED, UNTOLD, EpisodeResult, MixUp, ending, likeness

CHANNELS = ("x", "y")


def _episode(task: str, success: bool = False, **trace: list[float]) -> EpisodeResult:
    named = {{"hand": HAND_TO_OBJECT, "left": OBJECT_TO_GOAL}.get(name, name): values for name, values in trace.items()}
    return EpisodeResult(task, 0, None, success, 3, trace=named or None)


@pytest.mark.parametrize(
    ("trace", "told"),
    [
        ({}, UNTOLD),
        ({"hand": [0.3, 0.2]}, UNTOLD),
        ({"hand": [0.3, 0.2, 0.3], "left": [0.5, 0.5, 0.5]}, AWAY),
        ({"hand": [0.3, 0.02, 0.3], "left": [0.5, 0.5, 0.49]}, UNMOVED),
        ({"hand": [0.3, 0.02, 0.3], "left": [0.5, 0.3, 0.5]}, SHORT),
    ],
)
def test_endings(trace, told):
    assert ending(_episode("push", **trace)) == told


def _path(direction: float, length: int, noise: int = 0) -> np.ndarray:
    """`length` steps of 1 cm from the origin, in a direction in the plane."""
    along = 0.01 * np.arange(length)[:, None] * [np.cos(direction), np.sin(direction)]
    return along + 1e-4 * np.random.default_rng(noise).standard_normal((length, 2))


DEMONSTRATED = {
    "left": [_path(np.pi + 0.3 * turn, 40, turn) for turn in range(3)],
    "right": [_path(0.3 * turn, 70, turn) for turn in range(3)],
}


def _moved(task: str, success: bool, path: np.ndarray) -> EpisodeResult:
    return _episode(task, success, x=path[:, 0].tolist(), y=path[:, 1].tolist())


def test_a_failed_episode_that_moves_like_another_task_is_a_mix_up():
    results = [
        _moved("left", True, _path(np.pi - 0.1, 50, 9)),
        _moved("right", True, _path(np.pi, 50, 9)),  # solved the other task's way: the measure's own error
        _moved("left", False, _path(0.1, 80, 9)),
        _moved("left", False, _path(0.2, 80, 8)),
        _moved("right", False, _path(0.1, 80, 7)),
        _episode("right"),  # not traced
    ]
    found = likeness(results, DEMONSTRATED, CHANNELS)
    assert (found.own, found.successes) == (1, 2)
    assert found.mix_ups == [MixUp("left", "right", 2)]


@given(task=st.sampled_from(sorted(DEMONSTRATED)), number=st.integers(0, 2), more=st.integers(0, 50))
def test_a_demonstration_is_most_like_itself(task, number, more):
    """However long it stands still at its end, and whatever follows the steps compared."""
    path = DEMONSTRATED[task][number]
    longer = np.concatenate([path, np.repeat(path[-1:], more, axis=0)])
    assert likeness([_moved(task, True, longer)], DEMONSTRATED, CHANNELS).own == 1
    if len(path) > COMPARED_STEPS:
        assert likeness([_moved(task, True, path[:COMPARED_STEPS])], DEMONSTRATED, CHANNELS).own == 1
