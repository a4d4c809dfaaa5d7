"""Counting and keeping results, Wilson's and Newcombe's intervals, and what failed episodes have come to."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from repvitok.data.video import VideoFile
from repwam_core.sim.base import HAND_TO_OBJECT, OBJECT_TO_GOAL
from repwam_core.sim.results import (
    AWAY,
    COMPARED_STEPS,
    SHORT,
    UNMOVED,
    UNTOLD,
    EpisodeResult,
    MixUp,
    difference_interval,
    ending,
    likeness,
    load_results,
    mean_rate,
    save_results,
    success_rates,
    wilson_interval,
    write_films,
)

RESULTS = [
    EpisodeResult("push", 0, "push it", True, 12, frames=np.zeros((1, 2, 2, 3), np.uint8)),
    EpisodeResult("reach", 0, None, False, 100),
    EpisodeResult("push", 1, "push it", False, 3, crashed="RuntimeError: boom"),
    EpisodeResult("reach", 1, None, True, 9),
    EpisodeResult("push", 2, "push it", False, 100),
]


def test_rates_count_a_crash_as_a_failure():
    rates = success_rates(RESULTS)
    assert list(rates) == ["push", "reach"]
    assert (rates["push"].successes, rates["push"].episodes, rates["push"].crashed) == (1, 3, 1)
    assert mean_rate(success_rates(RESULTS)) == pytest.approx((1 / 3 + 1 / 2) / 2)


@pytest.mark.parametrize("size", [(32, 48), (31, 47)])
def test_films_are_there_to_look_at(tmp_path, size):
    frames = np.linspace(0, 255, 6, dtype=np.uint8)[:, None, None, None].repeat(3, -1)
    frames = np.ascontiguousarray(np.broadcast_to(frames, (6, *size, 3)))
    results = [EpisodeResult("push", 7, None, True, 6, frames=frames), EpisodeResult("push", 8, None, False, 6)]
    (film,) = write_films(tmp_path / "films", results, rate_hz=20.0)
    assert film == tmp_path / "films" / "push-7-success.mp4"
    video = VideoFile(film)
    assert (len(video), video.fps) == (6, 20)
    assert np.abs(video.read().astype(int) - frames).max() < 6


def test_results_survive_json_without_their_frames(tmp_path):
    save_results(tmp_path / "results.json", RESULTS, policy="abc")
    loaded, about = load_results(tmp_path / "results.json")
    assert about == {"policy": "abc"}
    assert [result.to_dict() for result in loaded] == [result.to_dict() for result in RESULTS]
    assert json.loads((tmp_path / "results.json").read_text())["rates"]["all"]["successes"] == 2


def test_a_crash_is_never_a_success():
    with pytest.raises(ValueError, match="cannot be a success"):
        EpisodeResult("push", 0, None, True, 1, crashed="boom")


def test_another_file_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="expected format 'repwam-evaluation' version 1, got None version None"):
        load_results(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [
        (0, 20, 0.0, 0.1611),  # z^2 / (n + z^2) = 3.8415 / 23.8415
        (20, 20, 0.8389, 1.0),
        (10, 20, 0.2993, 0.7007),  # 0.5 +- 1.96 sqrt(0.0125 + 0.0024) / 1.1921
        (51, 60, 0.7389, 0.9190),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_hand_values(successes, episodes, low, high):
    assert wilson_interval(successes, episodes) == pytest.approx((low, high), abs=1e-4)


def test_narrows_with_more_episodes_and_mirrors():
    few, many = wilson_interval(5, 10), wilson_interval(500, 1000)
    assert many[1] - many[0] < few[1] - few[0]
    low, high = wilson_interval(3, 17)
    assert wilson_interval(14, 17) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("successes", "episodes"), [(0, 0), (3, 2), (-1, 5)])
def test_impossible_counts_are_refused(successes, episodes):
    with pytest.raises(ValueError, match=f"got {successes} of {episodes}"):
        wilson_interval(successes, episodes)


def test_newcombes_own_example():
    assert difference_interval((56, 70), (48, 80)) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_differences_mirror_and_hold_zero_for_equal_rates():
    low, high = difference_interval((3, 17), (11, 20))
    assert difference_interval((11, 20), (3, 17)) == pytest.approx((-high, -low))
    low, high = difference_interval((5, 10), (10, 20))
    assert low < 0 < high


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
