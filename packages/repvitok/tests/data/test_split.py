"""One split for all stages: an episode's side depends on its number alone, whatever a stage leaves out."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repvitok.data.split import (
    LatentSpan,
    choose_episodes,
    format_episodes,
    held_out_tail,
    left_out,
    parse_episodes,
    split_episodes,
    split_latents,
)
from repvitok.runtime.errors import UserError

EPISODES = st.sets(st.integers(0, 500), min_size=2, max_size=60)
FRACTIONS = st.floats(0.001, 0.999)


@given(EPISODES, st.floats(0, 0.999))
def test_a_split_is_disjoint_and_complete_and_neither_side_empty(episodes, fraction):
    train, held_out = split_episodes(episodes, fraction)
    assert sorted(train + held_out) == sorted(episodes)
    assert train
    assert bool(held_out) == bool(fraction)
    assert (train, held_out) == split_episodes([*sorted(episodes, reverse=True), *episodes], fraction)


@given(EPISODES, FRACTIONS, st.data())
def test_no_stage_trains_on_what_another_one_holds_out(episodes, fraction, data):
    """Each stage leaves out some episodes of its own, and what is left keeps its side."""
    stages = [data.draw(st.sets(st.sampled_from(sorted(episodes)), min_size=1)) for _ in range(3)]
    whole = split_episodes(episodes, fraction)
    for usable in stages:
        train, held_out = split_episodes(episodes, fraction, usable)
        assert sorted(train + held_out) == sorted(usable)
        if usable & set(whole[0]):
            assert set(train) <= set(whole[0])
            assert set(held_out) <= set(whole[1])
        else:  # all that is left is held out elsewhere: one of them is trained on
            assert len(train) == 1


@given(EPISODES, FRACTIONS, FRACTIONS)
def test_a_larger_share_holds_out_the_same_episodes_and_more(episodes, one, two):
    less, more = (set(split_episodes(episodes, fraction)[1]) for fraction in sorted((one, two)))
    assert less <= more


@given(EPISODES, st.integers(501, 600), FRACTIONS)
def test_an_episode_more_moves_one_other_at_most(episodes, added, fraction):
    """Only the two guarantees, one episode on each side, look at more than an episode's own number."""
    before, after = (set(split_episodes(known, fraction)[1]) for known in (episodes, episodes | {added}))
    assert len((before ^ after) - {added}) <= 1


@pytest.mark.parametrize("fraction", [0.04, 0.1, 0.2, 0.25])
def test_about_as_many_are_held_out_as_asked(fraction):
    for count in range(2, 61):
        assert abs(len(split_episodes(range(count), fraction)[1]) - max(1, fraction * count)) <= 2


def test_the_choice_never_changes():
    """Runs of later versions must hold out the same episodes."""
    assert split_episodes(range(40), 0.1)[1] == [18, 22, 26, 32]
    assert split_episodes([2, 5, 9, 40], 0.2) == ([2, 5, 9], [40])
    assert split_episodes(range(6), 0.2) == ([1, 2, 3, 4, 5], [0])


def test_a_list_names_the_episodes_itself():
    assert split_episodes(range(5), [3, 1]) == ([0, 2, 4], [1, 3])
    assert split_episodes([2, 5, 9, 40], [9, 40], usable=[2, 9]) == ([2], [9])
    assert split_episodes([2, 5, 9, 40], ["9", 40]) == ([2, 5], [9, 40])
    assert split_episodes(range(9), "0-2,7") == ([3, 4, 5, 6, 8], [0, 1, 2, 7])
    assert split_episodes([2, 5], []) == ([2, 5], [])


def test_the_choice_is_spread_over_interleaved_tasks():
    """Episode i shows task i % 5: an evenly spaced choice would hold out one task only."""
    _, held_out = split_episodes(range(150), 0.1)
    assert len({index % 5 for index in held_out}) >= 4


def test_a_single_episode_is_trained_on():
    assert split_episodes([4, 4, 4], 0.5) == ([4], [])
    assert split_episodes([7, 9], 0.1, usable=[7])[0] == split_episodes([7, 9], 0.1, usable=[7, 7])[0] == [7]


@pytest.mark.parametrize(
    ("episodes", "held_out", "message"),
    [
        (range(20), 1.0, r"fraction in \[0, 1\)"),
        (range(20), [20], "held_out: no episodes 20; there are 0-19"),
        (range(20), "18-25", "held_out: no episodes 20 and 5 more up to 25; there are 0-19"),
        (range(20), ["first"], "expected numbers and ranges like 0-9,12, got 'first'"),
        (range(3), [0, 1, 2], "none to train on"),
        ([], 0.5, "none of 0 episodes"),
    ],
)
def test_impossible_splits_are_errors(episodes, held_out, message):
    with pytest.raises(ValueError, match=message):
        split_episodes(episodes, held_out)


@given(st.integers(1, 300), st.floats(0, 0.999), st.integers(1, 40), st.integers(1, 40))
def test_the_tail_of_an_only_episode_leaves_most_of_it(length, fraction, shortest, shortest_train):
    tail = held_out_tail(length, fraction, shortest, shortest_train)
    if not fraction or length < shortest + max(shortest, shortest_train):
        assert tail == 0
    if tail:
        assert tail >= shortest
        assert length - tail >= max(tail, shortest_train)
        assert abs(tail - max(fraction * length, shortest)) <= 0.5


def test_what_is_left_out_is_told_in_one_line():
    assert left_out([3, 9, 5], 40, "a clip takes 17 frames") == (
        "left out 3 of 40 episodes, too short with a length of 3 to 9: a clip takes 17 frames"
    )
    assert "too short with a length of 5: " in left_out([5], 2, "x")


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


ENTRIES = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 30)), min_size=1, max_size=4, unique_by=lambda e: e[0])


def latent_shards(entries: dict[int, list[tuple[int, int]]], per_latent: int) -> SimpleNamespace:
    """Shards of episodes, each with (offset, latent frames) of its entries."""
    infos = [
        SimpleNamespace(episode_index=number, offset=offset, frames=frames, augmentation=0)
        for number, encoded in sorted(entries.items())
        for offset, frames in encoded
    ]
    meta = SimpleNamespace(frames_per_latent=per_latent)
    return SimpleNamespace(infos=infos, meta=meta, recorded=sorted(entries), root="latents")


def raw_frames(shards: SimpleNamespace, spans: list[LatentSpan]) -> set[int]:
    """The raw frames that the latents of some spans stand for: the first of an entry for one, the others for p each."""
    seen: set[int] = set()
    for span in spans:
        offset, per = shards.infos[span.number].offset, shards.meta.frames_per_latent
        seen.update(range(max(offset, offset + per * (span.first - 1) + 1), offset + per * (span.last - 1) + 1))
    return seen


@given(ENTRIES, st.integers(1, 8), st.floats(0.01, 0.9), st.integers(2, 3))
def test_no_raw_frame_of_an_only_episode_is_on_both_sides(entries, per_latent, fraction, shortest):
    shards = latent_shards({7: entries}, per_latent)
    longest = max(frames for _, frames in entries)
    if longest < shortest:
        with pytest.raises(UserError, match=f"no episode has {shortest} latent frames, the longest {longest}"):
            split_latents(shards, fraction, shortest)
        return
    train, kept = split_latents(shards, fraction, shortest)
    assert train
    assert all(span.first >= 0 and span.last <= shards.infos[span.number].frames for span in [*train, *kept])
    assert min(span.last - span.first for span in train) >= shortest
    assert all(span.last - span.first >= 2 for span in kept)
    assert bool(kept) == bool(held_out_tail(longest, fraction, 2, shortest))
    assert not raw_frames(shards, train) & raw_frames(shards, kept)


@given(st.dictionaries(st.integers(0, 99), st.integers(1, 12), min_size=2, max_size=20), FRACTIONS)
def test_latents_too_short_for_a_stage_move_no_other_episode(lengths, fraction):
    shards = latent_shards({number: [(0, frames), (2, frames)] for number, frames in lengths.items()}, 4)
    whole = split_episodes(lengths, fraction)
    for shortest in (2, 3, 6):
        usable = {number for number, frames in lengths.items() if frames >= shortest}
        if len(usable) < 2:
            continue
        sides = split_latents(shards, fraction, shortest)
        found = [[shards.infos[span.number].episode_index for span in side] for side in sides]
        expected = split_episodes(lengths, fraction, usable)
        assert found == [sorted([*side, *side]) for side in expected]
        if usable & set(whole[0]):
            assert [set(side) & usable for side in whole] == [set(side) for side in expected]
