"""Statistics of actions and states, their files, and the open-loop score."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from repwam_core.interface import Embodiment
from repwam_core.statistics import (
    HEADLINE,
    STATE_LIMIT,
    VARIANTS,
    ActionStatistics,
    ScoreVariant,
    StateStatistics,
    Statistics,
    count_below,
    motion,
    open_loop_score,
    step_norms,
)

ARM = Embodiment.from_names("arm", ["x", "y", "gripper"], ["px"], ["top"], 20.0, units=["m", "m", "1"])


def _statistics(seed: int = 0) -> ActionStatistics:
    values = np.random.default_rng(seed).normal(size=(500, 3)) * [1.0, 10.0, 0.0] + [0.0, 5.0, 0.25]
    return ActionStatistics.from_values(values, ARM.action_names, ARM.action_units)


@settings(deadline=None)
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


ROWS = np.arange(4000)
_RNG = np.random.default_rng(7)
_NOISE, _PULSE, _SINE = _RNG.normal(size=4000), (ROWS % 200 == 199) * 1.0, np.sin(ROWS / 70)
CHANNELS = {
    "usual": {
        "sine": _SINE,
        "gripper, open half the time": (ROWS // 50 % 2) * 0.04,
        "slow drift": np.linspace(0.7, 0.7002, 4000),
        "small motion far from zero": 1000 + 0.01 * _SINE,
        "small motion far from zero in float32": np.float32(1e4 + 0.01 * _SINE),
        "steps of a keyboard": 0.001 * _RNG.integers(-1, 2, 4000),
        "angle that wraps": np.angle(np.exp(1j * ROWS / 50)),
        "heavy tail": _RNG.laplace(size=4000),
    },
    "rare": {
        "pulse": _PULSE,
        "pulse down": 0.3 - 2 * _PULSE,
        "pulses both ways": _PULSE - np.roll(_PULSE, 37),
        "one row": (ROWS == 777) * 1.0,
        "pulse of exactly 1 %": (ROWS % 100 == 99) * 1.0,
        "pulse on noise": _PULSE + 1e-3 * _NOISE,
        "pulse on a stuck joint": 0.05 * _PULSE + 0.7 + 1e-6 * _NOISE,
        "one of many, hot": (ROWS % 150 == 7) * 1.0,
    },
    "still": {
        "constant": np.full(4000, 0.7),
        "sensor noise": 0.7 + 1e-6 * _NOISE,
        "sensor noise at zero": 1e-6 * _NOISE,
        "rounding of float32": np.float32(1e4 / 3) * (1 + 1e-7 * _RNG.integers(-1, 2, 4000)),
        "encoder between two steps": np.round(0.7709 / 0.0015 + 0.2 * _NOISE) * 0.0015,
        "ticks": 2047.0 + (_NOISE > 0),
    },
    "spiked": {
        "one faulty row": np.where(ROWS == 5, 1e6, _SINE),
        "a value that stands for none": np.where(ROWS % 333 == 0, -999, _SINE),
        "two faulty rows, on noise": np.where(ROWS == 5, 1e6, np.where(ROWS == 9, -3e4, _NOISE)),
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, named in CHANNELS.items() for name in named])
def test_a_channel_is_scaled_by_how_it_moves(kind, name):
    values = np.asarray(CHANNELS[kind][name], np.float64)
    assert motion(values) == kind
    statistics = ActionStatistics.from_values(values[:, None], ["x"])
    scaled = statistics.normalise(values[:, None])
    back = statistics.clip(statistics.denormalise(scaled))[:, 0]
    state = StateStatistics.from_values(values[:, None], ["x"]).standardise(values[:, None])[:, 0]
    if kind == "still":
        assert np.ptp(scaled) == np.ptp(state) == 0
        assert np.abs(back - values).max() <= max(5e-5, np.ptp(values))
    else:
        np.testing.assert_allclose(back, values, rtol=1e-6, atol=1e-6 * np.abs(values).max())
        assert np.ptp(state) > 1.5
    if kind == "rare":
        assert (scaled.min(), scaled.max()) == (-1, 1)
        assert np.abs(state).max() <= 1 + 1e-6
    if kind in ("usual", "spiked"):
        np.testing.assert_allclose(np.quantile(scaled, [0.01, 0.99]), [-1, 1], atol=1e-5)
    if kind in ("usual", "still") and name not in ("sensor noise", "sensor noise at zero"):
        assert np.abs(scaled).max() < 4
    said = {"still": "x: never move", "rare": "x: move in few rows", "spiked": "x: lie far outside", "usual": ""}
    assert [line[: len(said[kind])] for line in statistics.remarks()] == ([said[kind]] if kind != "usual" else [])


@settings(deadline=None)
@given(
    rest=st.floats(-100, 100), height=st.floats(0.01, 1000), sign=st.sampled_from([-1, 1]),
    rows=st.sets(st.integers(0, 799), min_size=1, max_size=8),
)  # fmt: skip
def test_whatever_moves_in_few_rows_comes_back_as_it_was(rest, height, sign, rows):
    values = np.full((800, 1), rest)
    values[sorted(rows)] += sign * height
    statistics = ActionStatistics.from_values(values, ["x"])
    scaled = statistics.normalise(values)
    np.testing.assert_array_equal(np.sort(np.unique(scaled)), [-1, 1])
    back = statistics.clip(statistics.denormalise(scaled))
    np.testing.assert_allclose(back, values, rtol=1e-6, atol=1e-6)
    assert np.ptp(StateStatistics.from_values(values, ["x"]).standardise(values)) == pytest.approx(2)


@settings(deadline=None)
@given(scale=st.floats(1e-3, 1e3), offset=st.floats(-10, 10), seed=st.integers(0, 99))
def test_ordinary_channels_keep_the_percentiles_of_the_paper(scale, offset, seed):
    values = np.random.default_rng(seed).normal(size=(300, 1)) * scale + offset * scale
    statistics = ActionStatistics.from_values(values, ["x"])
    assert (statistics.centre, statistics.scale, statistics.remarks()) == (None, None, [])
    np.testing.assert_allclose(statistics.normalise(np.quantile(values, [0.01, 0.99], axis=0)), [[-1], [1]], atol=1e-5)


def test_a_file_of_version_0_1_means_what_it_meant(tmp_path):
    """Its digest, its constant where a channel moved too rarely for percentiles, its scaling of states."""
    numbers = {"q01": [-1.0, 0.0], "q99": [1.0, 0.0], "min": [-2.0, 0.0], "max": [2.0, 1.0]}
    actions = {"channels": ["x", "trigger"], "units": ["m", "1"], **numbers, "mean": [0.0, 0.005], "std": [0.5, 0.07]}
    actions |= {"count": 1000, "kind": "absolute"}
    state = {"channels": ["px", "pulse"], "mean": [1.0, 0.005], "std": [2.0, 0.07], "count": 1000}
    document = {"format": "repwam-statistics", "format_version": 1, "actions": actions, "state": state}
    path = tmp_path / "statistics.json"
    payload = json.dumps({"actions": actions, "state": state}, sort_keys=True)
    document["digest"] = hashlib.sha256(payload.encode()).hexdigest()
    path.write_text(json.dumps(document))
    old = Statistics.load(path)
    np.testing.assert_allclose(old.actions.normalise(np.array([1.0, 1.0])), [1.0, 0.0])
    np.testing.assert_allclose(old.actions.denormalise(np.array([1.0, 1.0])), [1.0, 0.005])
    np.testing.assert_allclose(old.state.standardise(np.array([3.0, 0.355])), [1.0, 5.0])
    said = "move in few rows and are learned as constants, as version 0.1 did; count statistics anew"
    assert old.remarks() == [f"action channels trigger: {said}"]
    old.save(path)
    assert json.loads(path.read_text()) == document


def test_json_keeps_the_scaling_of_rare_channels(tmp_path):
    values = np.stack([_SINE, _PULSE], axis=1)
    saved = Statistics(ActionStatistics.from_values(values, "ab"), StateStatistics.from_values(values, "ab"))
    assert saved.actions.scale is not None
    assert saved.state.scale is not None
    saved.save(tmp_path / "statistics.json")
    loaded = Statistics.load(tmp_path / "statistics.json")
    assert loaded == saved
    assert saved.actions.widened("acb").normalise(np.ones(3))[2] == saved.actions.normalise(np.ones(2))[1] == 1
    for damage in ({"scale": (1.0, -1.0)}, {"scale": None}):
        with pytest.raises(ValueError, match="centre and scale"):
            dataclasses.replace(loaded.actions, **damage)


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
    np.testing.assert_allclose(statistics.unscaled(expected)[:, :2], (values[0] - values[1])[:, :2], atol=1e-4)


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


CHUNKS = [np.array([[0.03, -0.04], [0.0, 0.0]]), np.array([[0.3, 0.0]])]


def test_norms_by_hand() -> None:
    errors = np.array([[0.3, -0.4]])
    norms = [step_norms(errors, norm)[0] for norm in ("max", "l2", "l1")]
    np.testing.assert_allclose(norms, [0.4, 0.5, 0.7])


@pytest.mark.parametrize(
    ("norm", "span", "expected"),
    [
        ("max", "step", {0.1: 2 / 3, 0.045: 2 / 3, 0.01: 1 / 3}),
        ("l2", "step", {0.1: 2 / 3, 0.045: 1 / 3, 0.01: 1 / 3}),
        ("l1", "step", {0.1: 2 / 3, 0.06: 1 / 3, 0.01: 1 / 3}),
        ("max", "chunk", {0.1: 1 / 2, 0.045: 1 / 2, 0.01: 0.0}),
    ],
)
def test_scores_by_hand(norm, span, expected) -> None:
    scores = open_loop_score(CHUNKS, ScoreVariant(norm, span), tuple(expected))
    assert scores == pytest.approx(expected)


def test_perfect_actions_score_one_and_the_score_grows_with_the_threshold() -> None:
    rng = np.random.default_rng(0)
    chunks = [0.05 * rng.normal(size=(4, 3)) for _ in range(20)]
    for variant in VARIANTS:
        assert set(open_loop_score([np.zeros((4, 3))], variant).values()) == {1.0}
        scores = open_loop_score(chunks, variant)
        assert sorted(scores.values(), reverse=True) == list(scores.values())


def test_a_chunk_counts_less_often_than_a_step_and_l1_is_the_strictest() -> None:
    rng = np.random.default_rng(1)
    chunks = [0.05 * rng.normal(size=(4, 3)) for _ in range(50)]
    at = {(v.norm, v.span): open_loop_score(chunks, v)[0.1] for v in VARIANTS}
    assert at["max", "step"] >= at["l2", "step"] >= at["l1", "step"]
    assert at["max", "step"] >= at["max", "chunk"]


def test_padding_is_not_counted() -> None:
    errors = np.zeros((1, 2, 2, 3))
    errors[0, 1] = 1.0
    below, of = count_below(errors, np.array([[True, False]]), (0.1,))
    assert (below, of) == ({0.1: 2}, 2)


def test_variants_are_named_and_nothing_scores_nothing() -> None:
    assert str(HEADLINE) == "max norm, per step, scaled"
    assert len({str(variant) for variant in VARIANTS}) == len(VARIANTS) == 12
    with pytest.raises(ValueError, match="at least one planned chunk"):
        open_loop_score([], HEADLINE)
