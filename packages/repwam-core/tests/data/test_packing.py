"""Which episodes share a sequence, and what a packed batch holds."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repvitok.data import LatentShards, LatentShardWriter
from repvitok.runtime.errors import UserError
from repwam_core.data.packing import (
    DataSetSettings,
    Mixture,
    PackedLoader,
    PackedPieces,
    PackingSettings,
    SequencePacker,
    Source,
    TokenCost,
    make_packer,
    read_packed,
)
from repwam_core.model.config import ActionSpace, WAMConfig

METAWORLD_FRAMES = {
    28: 1, 29: 2, 35: 2, 37: 2, 38: 3, 39: 1, 40: 6, 41: 10, 42: 9, 43: 9, 44: 9, 45: 12, 46: 12, 47: 10, 48: 5,
    49: 8, 50: 8, 51: 6, 52: 2, 53: 3, 54: 5, 55: 5, 56: 3, 57: 5, 58: 2, 59: 2, 60: 2, 61: 2, 62: 1, 63: 1, 65: 2,
}  # fmt: skip
"""Frames (40 Hz) of 150 demonstrations that `repwam quickstart` collects on five tasks: how many have how many."""


def source(transitions: list[int] | np.ndarray, weight: float = 1.0, **cost: int) -> Source:
    lengths = np.array(transitions)
    return Source(np.arange(len(lengths)), lengths, TokenCost(**{"video": 16, "vectors": 2, **cost}), weight)


def packer(sources: list[Source], budget: int = 4000, seed: int = 0, **changes: int) -> SequencePacker:
    return SequencePacker(sources, PackingSettings(token_budget=budget, **changes), seed)


def first(stream: SequencePacker, count: int) -> list[PackedPieces]:
    return list(itertools.islice(stream, count))


def test_the_cost_is_that_of_the_layout():
    from repwam_core.model.sequence import training_layout

    for state, history in itertools.product((False, True), repeat=2):
        cost = TokenCost(video=6, vectors=3, state=state, action_history=history)
        layout = training_layout(6, (2, 2, 1), (1, 2, 3), 3, state=state, action_history=history)
        assert cost.of(5) == len(layout)
        assert cost.fitting(len(layout)) == 5
        assert cost.fitting(len(layout) - 1) == 4


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(0, 5), st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_no_budget_is_broken_and_every_pass_covers_every_transition_once(lengths, seed, open_sequences):
    cost = TokenCost(16, 2)
    budget = cost.of(24)
    stream = packer([source(lengths)], budget, seed, open_sequences=open_sequences)
    seen: dict[tuple[int, int], list[int]] = {}
    for packed in first(stream, 6 * len(lengths) + 12 * open_sequences):
        assert packed.tokens == sum(cost.of(piece.transitions) for piece in packed.pieces) <= budget
        for piece in packed.pieces:
            seen.setdefault((piece.visit, piece.episode), []).extend(
                range(piece.start, piece.start + piece.transitions)
            )
    finished = [visit for visit in range(10) if all(len(seen.get((visit, e), [])) == n for e, n in enumerate(lengths))]
    assert 0 in finished
    for visit in finished:
        for episode, length in enumerate(lengths):
            assert sorted(seen[visit, episode]) == list(range(length))


def test_long_episodes_are_cut_at_chunk_borders_elsewhere_at_each_visit():
    cost = TokenCost(16, 2)
    stream = packer([source([100])], cost.of(30), chunk_multiple=12)
    starts = [piece.start for packed in first(stream, 40) for piece in packed.pieces]
    assert all(start % 12 == 0 for start in starts)
    assert {12, 24} <= set(starts)
    whole = packer([source([30, 100])], cost.of(30), chunk_multiple=12)
    assert {p.transitions for packed in first(whole, 20) for p in packed.pieces if p.episode == 0} == {30}


def test_a_sequence_depends_on_seed_and_index_only_and_the_stream_resumes_exactly():
    sources = [source(np.arange(3, 40)), source(np.arange(5, 20), weight=2.0)]
    whole = first(packer(sources), 60)
    assert whole == first(packer(sources), 60)
    assert whole != first(packer(sources, seed=1), 60)
    stopped = packer(sources)
    first(stopped, 23)
    resumed = packer(sources)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert resumed.waste == stopped.waste
    assert first(resumed, 37) == whole[23:]


def test_a_state_of_other_data_is_refused():
    with pytest.raises(ValueError, match=r"saved with \[2\] episodes per data set, these have \[3\]"):
        packer([source([3, 4, 5])]).load_state_dict(packer([source([3, 4])]).state_dict())


@pytest.mark.parametrize("budget", [8192, 16384])
def test_waste_is_under_three_percent_on_metaworlds_lengths(budget):
    frames = np.repeat(list(METAWORLD_FRAMES), list(METAWORLD_FRAMES.values()))
    stream = packer([source(np.maximum(1, (frames - 1) // 4), vectors=4)], budget)
    packed = first(stream, 400)
    assert stream.waste < 0.03
    assert stream.waste == pytest.approx(1 - sum(p.tokens for p in packed) / (400 * budget))


def test_ranks_are_balanced():
    stream = packer([source(np.arange(5, 26), vectors=4)], 16384)
    tokens = np.array([packed.tokens for packed in first(stream, 400)]).reshape(-1, 4)
    assert (tokens.max(1) / tokens.mean(1)).mean() < 1.02


def test_data_sets_get_their_share_of_tokens_whatever_their_sizes():
    sources = [source([8] * 50, weight=3.0), source([40] * 3, weight=1.0), source([12] * 9, weight=2.0, video=48)]
    tokens = np.zeros(3)
    for packed in first(packer(sources, 20_000), 200):
        for piece in packed.pieces:
            tokens[piece.data_set] += sources[piece.data_set].cost.of(piece.transitions)
    np.testing.assert_allclose(tokens / tokens.sum(), [0.5, 1 / 6, 1 / 3], atol=0.01)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match=r"token_budget: expected int >= 1 \(0\)"):
        PackingSettings(token_budget=0)
    with pytest.raises(ValueError, match=r"expected at least \d+ tokens for the episodes of data set 0, got 100"):
        packer([source([50])], 100)
    with pytest.raises(ValueError, match="at least one data set"):
        packer([])
    with pytest.raises(ValueError, match="weight above 0"):
        source([3], weight=0.0)


SETTINGS = PackingSettings(token_budget=300, open_sequences=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, write_shards, write_text_cache):
    """Two robots: (x, y, still) with two cameras' tokens, and (y, grip) seen by one."""
    root = tmp_path_factory.mktemp("mixture")
    first = write_shards(root / "first", episodes=10, grid=(2, 1, 2))
    source = LatentShards(write_shards(root / "source", episodes=6, seed=3))
    meta = dataclasses.replace(source.meta, action_names=("y", "grip"), state_names=("py", "width"))
    with LatentShardWriter(root / "second", meta) as writer:
        for episode in source:
            changed = {"actions": episode.actions[..., 1:], "state": episode.state[:, 1:]}
            writer.add(dataclasses.replace(episode, **changed))
    write_text_cache(root / "second")
    return first, root / "second"


@pytest.fixture(scope="module")
def mixture(folders):
    return Mixture([DataSetSettings(latents=folders[0]), DataSetSettings(latents=folders[1], weight=2.0)])


def config(mixture: Mixture) -> WAMConfig:
    space = ActionSpace(channels=4, vectors_per_transition=2, state_channels=5)
    return WAMConfig.preset("tiny", state_token=True, spaces={"robot": space})


def loader(mixture: Mixture, rank: int = 0, world_size: int = 1, batches: int = 6) -> PackedLoader:
    return PackedLoader(mixture, make_packer(mixture, SETTINGS, config(mixture), seed=0), batches, rank, world_size)


def test_labels_over_different_numbers_of_latent_frames_do_not_mix(folders, tmp_path):
    source = LatentShards(folders[0])
    with LatentShardWriter(tmp_path / "longer", dataclasses.replace(source.meta, latent_action_frames=2)) as writer:
        for episode in source:
            writer.add(episode)
    settings = [DataSetSettings(latents=folder) for folder in (folders[0], tmp_path / "longer")]
    with pytest.raises(UserError, match=r"transition_frames.*first: 1, .*longer: 2"):
        Mixture(settings, space="latent")


def test_robots_share_the_union_of_their_channels(mixture):
    assert mixture.action_channels == ("x", "y", "still", "grip")
    assert mixture.state_channels == ("px", "py", "constant", "width")
    first, second = (store.batch(np.array([0]), np.array([0]), 3) for store in mixture.stores)
    assert first.channel_mask[0].tolist() == [True, True, True, False]
    assert second.channel_mask[0].tolist() == [False, True, False, True]
    assert (first.actions[..., 3] == 0).all()
    assert (second.actions[..., [0, 2]] == 0).all()
    stored = LatentShards(mixture.stores[1].shards.root)[0].actions[:3]
    own = second.actions[0][..., [1, 3]].numpy()
    np.testing.assert_allclose(mixture.stores[1].statistics.actions.denormalise(own), stored, atol=1e-6)


def test_a_packed_batch_is_the_stored_episodes(mixture):
    packer = make_packer(mixture, SETTINGS, config(mixture), seed=0)
    seen = set()
    for _ in range(12):
        packed = next(packer)
        batch = read_packed(mixture, packed, 300)
        assert batch.tokens <= batch.token_budget == 300
        for number, piece in enumerate(packed.pieces):
            store, segment = mixture.stores[piece.data_set], batch.segment(number)
            whole = store.batch(np.array([piece.episode]), np.array([0]), int(store.lengths[piece.episode]) - 1)
            for name in ("latents", "actions", "state", "channel_mask"):
                assert torch.equal(getattr(segment, name), getattr(whole, name)), name
            assert torch.equal(segment.text[segment.text_mask], whole.text[whole.text_mask])
            assert segment.valid.all()
            assert batch.documents.grids[number] == store.meta.grid
            seen.add(piece.data_set)
    assert seen == {0, 1}


def test_ranks_take_turns_and_a_restored_loader_goes_on_also_with_other_ranks(mixture):
    one = loader(mixture)
    whole = [batch.index for batch in one]
    assert whole == list(range(6))
    halves = [[batch.index for batch in loader(mixture, rank, 2, batches=3)] for rank in range(2)]
    assert halves == [[0, 2, 4], [1, 3, 5]]
    stopped = loader(mixture, 0, 2, batches=4)
    iterator = iter(stopped)
    next(iterator), next(iterator)
    resumed = loader(mixture, 1, 2, batches=4)
    resumed.load_state_dict(stopped.state_dict())
    assert [batch.index for batch in resumed] == [5, 7]
    alone = loader(mixture, batches=8)
    alone.load_state_dict(stopped.state_dict())
    assert next(iter(alone)).index == 4
    assert stopped.waited_s > 0


def test_an_epoch_left_early_loses_no_sequence_that_was_read_ahead(mixture):
    early = loader(mixture)
    first = [batch.index for _, batch in zip(range(2), early, strict=False)]
    assert [*first, *(batch.index for batch in early)] == [0, 1, 2, 3, 4, 5]


def test_data_sets_that_do_not_go_together_are_refused(folders, tmp_path, write_shards):
    other = write_shards(tmp_path / "other", episodes=3, digest="1" * 64)
    with pytest.raises(ValueError, match="the tokenizer of the latents to be the same"):
        Mixture([DataSetSettings(latents=folders[0]), DataSetSettings(latents=other)])
    ranged, source = [tmp_path / "near", tmp_path / "far"], LatentShards(folders[0])
    for root, reach_m in zip(ranged, (2.0, 5.0), strict=True):
        with LatentShardWriter(root, dataclasses.replace(source.meta, depth_range=(0.0, reach_m))) as writer:
            writer.add(source[0])
    with pytest.raises(ValueError, match="the depth range of the latents to be the same"):
        Mixture([DataSetSettings(latents=root) for root in (folders[0], *ranged)])
    with pytest.raises(ValueError, match="'y' is relative"):
        Mixture([DataSetSettings(latents=folders[0]), DataSetSettings(latents=folders[1], action_kind="relative")])
    units = [DataSetSettings(latents=folders[0]), DataSetSettings(latents=folders[1], action_units=["m", "1"])]
    with pytest.raises(ValueError, match="'y' has unit 'm'"):
        Mixture(units)
    with pytest.raises(ValueError, match="weight: expected float > 0"):
        DataSetSettings(latents=folders[0], weight=-1.0)
