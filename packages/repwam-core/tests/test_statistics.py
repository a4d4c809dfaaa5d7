"""Scaling inverts, still channels survive, JSON keeps every number, and targets come back from changes of the state."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from repwam_core.embodiment import Embodiment
from repwam_core.statistics import STATE_LIMIT, ActionStatistics, StateStatistics, Statistics

ARM = Embodiment.from_names("arm", ["x", "y", "gripper"], ["px"], ["top"], 20.0, units=["m", "m", "1"])


def _statistics(seed: int = 0) -> ActionStatistics:
    values = np.random.default_rng(seed).normal(size=(500, 3)) * [1.0, 10.0, 0.0] + [0.0, 5.0, 0.25]
    return ActionStatistics.from_values(values, ARM.action_names, ARM.action_units)


@given(arrays(np.float64, (7, 2), elements=st.floats(-100, 100)))
def test_denormalise_inverts_normalise(moving):
    statistics = _statistics()
    action_si = np.concatenate([moving, np.full((7, 1), 0.25)], axis=1)
    back = statistics.denormalise(statistics.normalise(action_si))
    np.testing.assert_allclose(back, action_si, atol=1e-4)


def test_percentiles_go_to_minus_one_and_one():
    statistics = _statistics()
    ends = statistics.normalise(np.array([statistics.q01, statistics.q99]))
    np.testing.assert_allclose(ends[:, :2], [[-1, -1], [1, 1]], atol=1e-6)


def test_a_still_channel_is_zero_and_returns_to_its_constant():
    statistics = _statistics()
    assert (statistics.normalise(np.random.default_rng(1).normal(size=(5, 3)))[:, 2] == 0).all()
    np.testing.assert_allclose(statistics.denormalise(np.full((5, 3), 3.0))[:, 2], 0.25)


def test_clip_keeps_actions_inside_the_recorded_range():
    statistics = _statistics()
    clipped = statistics.clip(np.array([[1e9, -1e9, 0.25]], np.float32))
    np.testing.assert_allclose(clipped, [[statistics.max[0], statistics.min[1], 0.25]], rtol=1e-6)


def test_states_are_standardised_and_bounded():
    statistics = StateStatistics.from_values(np.array([[0.0, 3.0], [2.0, 3.0]]), ["moves", "still"])
    np.testing.assert_allclose(statistics.standardise(np.array([[2.0, 9.0]])), [[1.0, 0.0]])
    assert statistics.standardise(np.array([1e6, 3.0]))[0] == STATE_LIMIT


def test_json_round_trip_keeps_every_number(tmp_path):
    state = StateStatistics.from_values(np.random.default_rng(2).normal(size=(9, 1)), ["px"])
    saved = Statistics(_statistics(), state)
    saved.save(tmp_path / "statistics.json")
    loaded = Statistics.load(tmp_path / "statistics.json")
    assert loaded == saved
    assert loaded.digest == saved.digest
    assert loaded.actions.digest != _statistics(seed=1).digest


def test_an_edited_statistics_file_is_refused(tmp_path):
    path = tmp_path / "statistics.json"
    Statistics(_statistics()).save(path)
    values = json.loads(path.read_text())
    values["actions"]["q01"][0] += 1.0
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="digest"):
        Statistics.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="repwam-statistics"):
        Statistics.load(path)


def _from_state() -> Statistics:
    rng = np.random.default_rng(4)
    state = StateStatistics.from_values(rng.normal(size=(50, 2)), ["gripper", "x"])
    changes = ActionStatistics.from_values(rng.normal(size=(50, 3)), ARM.action_names, kind="from_state")
    return Statistics(changes, state, _statistics())


def test_what_actions_are_measured_from_is_found_by_name(tmp_path):
    statistics = _from_state()
    state = np.array([[0.5, 7.0], [0.25, -3.0]])
    np.testing.assert_array_equal(statistics.reference(state), [[7.0, 0.0, 0.5], [-3.0, 0.0, 0.25]])
    assert statistics.targets == _statistics()
    statistics.save(tmp_path / "statistics.json")
    assert Statistics.load(tmp_path / "statistics.json") == statistics
    with pytest.raises(ValueError, match="expected one, got none"):
        statistics.reference(None)
    plain = Statistics(_statistics())
    assert plain.targets == plain.actions
    np.testing.assert_array_equal(plain.reference(None), np.zeros(3))


def test_a_scaled_difference_is_the_difference_of_scaled_actions():
    statistics, values = _statistics(), np.random.default_rng(5).normal(size=(2, 6, 3))
    expected = statistics.normalise(values[0]) - statistics.normalise(values[1])
    np.testing.assert_allclose(statistics.scaled(values[0] - values[1]), expected, atol=1e-5)


def test_changes_from_a_state_need_states_of_the_actions_names():
    changes = ActionStatistics.from_values(np.eye(3), ARM.action_names, kind="from_state")
    with pytest.raises(ValueError, match="recorded actions"):
        Statistics(changes)
    other = StateStatistics.from_values(np.eye(3)[:, :1], ["px"])
    with pytest.raises(ValueError, match="same names, got actions x, y, gripper and states px"):
        Statistics(changes, other, _statistics())


@pytest.mark.parametrize(
    ("values", "message"),
    [(np.zeros((0, 3)), "n > 0"), (np.zeros((4, 2)), r"\(4, 2\)"), (np.array([[0, np.nan, 0]]), "'y'")],
)
def test_bad_action_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        ActionStatistics.from_values(values, ARM.action_names)


def test_a_wrong_number_of_channels_is_named():
    with pytest.raises(ValueError, match=r"3 channels \(x, y, gripper\), got shape \(4,\)"):
        _statistics().normalise(np.zeros(4))
