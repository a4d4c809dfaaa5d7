"""One split for all stages: fixed by the episodes alone, disjoint, complete."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repvitok.data.split import choose_episodes, format_episodes, parse_episodes, split_episodes
from repvitok.errors import UserError


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


@given(st.sets(st.integers(0, 300), min_size=1, max_size=60), st.data())
def test_numbers_and_ranges_name_episodes_whatever_gaps_there_are(there, data):
    chosen = data.draw(st.lists(st.sampled_from(sorted(there)), min_size=1))
    assert choose_episodes(chosen, there, "set") == sorted(set(chosen))
    assert choose_episodes(format_episodes(chosen), there, "set") == sorted(set(chosen))
    assert choose_episodes(None, there, "set") == sorted(there)
    assert [n for part in parse_episodes(format_episodes(there)) for n in part] == sorted(there)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("7", "set: no episodes 7; there are 0-4,6"),
        (5, "no episodes 5; there are 0-4,6"),
        ("3-6", "no episodes 5; there are"),
        ("2-4,0-999999999999", "no episodes 5 and 999999999993 more up to 999999999999; there are"),
        (["0-1", "4,9"], "no episodes 9; there are"),
        ([0, -1], "no episodes -1; there are"),
        ([], "no episodes named; there are"),
        ("", "expected numbers and ranges like 0-9,12, got ''"),
        ("4-2", "expected the lower number of a range first, got '4-2'"),
        ("1-2-3", "expected numbers and ranges"),
        ("1;2", "expected numbers and ranges"),
        ("-1", "expected numbers and ranges"),
        ("²", "expected numbers and ranges"),
    ],
)
def test_what_is_no_episode_is_refused_by_its_number(chosen, message):
    with pytest.raises(UserError, match=message):
        choose_episodes(chosen, [0, 1, 2, 3, 4, 6], "set")
