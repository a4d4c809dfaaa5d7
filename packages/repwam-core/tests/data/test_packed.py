"""Packed batches: the stored episodes, several robots in one layout, ranks apart, positions restored."""

import dataclasses

import numpy as np
import pytest
import torch
from repvitok.data import LatentShards, LatentShardWriter
from repvitok.runtime.errors import UserError
from repwam_core.data.mixture import DataSetSettings, Mixture
from repwam_core.data.packing import PackedLoader, PackingSettings, make_packer, read_packed
from repwam_core.model.config import ActionSpace, WAMConfig

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
