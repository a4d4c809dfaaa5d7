"""Wilson's and Newcombe's intervals against values worked out by hand or published."""

import pytest
from repwam_core.sim.results import difference_interval, wilson_interval


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
