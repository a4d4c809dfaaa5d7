"""One split for all stages: fixed by the episodes alone, disjoint, complete."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repvitok.data.split import split_episodes


@given(st.sets(st.integers(0, 500), min_size=2, max_size=60), st.floats(0, 0.5))
def test_a_split_is_disjoint_complete_and_of_the_asked_size(episodes, fraction):
    train, held_out = split_episodes(episodes, fraction)
    assert sorted(train + held_out) == sorted(episodes)
    assert len(held_out) == (max(1, round(fraction * len(episodes))) if fraction else 0)
    assert (train, held_out) == split_episodes([*sorted(episodes, reverse=True), *episodes], fraction)


def test_a_list_names_the_episodes_itself():
    assert split_episodes(range(5), [3, 1]) == ([0, 2, 4], [1, 3])


def test_the_choice_is_spread_over_interleaved_tasks():
    """Episode i shows task i % 5: an evenly spaced choice would hold out one task only."""
    _, held_out = split_episodes(range(150), 0.1)
    assert len({index % 5 for index in held_out}) >= 4


@pytest.mark.parametrize(
    ("episodes", "held_out", "message"),
    [
        (range(20), 1.0, r"fraction in \[0, 1\)"),
        (range(20), [20], r"\[20\] do not exist"),
        (range(3), [0, 1, 2], "none to train on"),
        ([4, 4, 4], 0.5, "none to train on"),
    ],
)
def test_impossible_splits_are_errors(episodes, held_out, message):
    with pytest.raises(ValueError, match=message):
        split_episodes(episodes, held_out)
