"""Loaders: ranks see different items, positions are restored, held-out segments are covered once."""

import pytest
import torch
from repwam_core.data.datamodule import HeldOutLoader, SegmentLoader, WAMDataModule
from repwam_core.data.episodes import SegmentSampler
from repwam_core.data.packing import DataSetSettings, PackingSettings


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_shards) -> WAMDataModule:
    folder = write_shards(tmp_path_factory.mktemp("datamodule") / "latents")
    return WAMDataModule(folder, transitions=3, batch_size=2, held_out=0.25, steps_per_epoch=4)


def test_a_restored_loader_goes_on_where_it_stopped(data):
    whole = [batch.latents for batch in data.train_dataloader()]
    loader = data.train_dataloader()
    iterator = iter(loader)
    first = [next(iterator).latents for _ in range(3)]
    resumed = data.train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    rest = [batch.latents for batch in resumed]
    assert len(rest) == 1
    assert all(torch.equal(a, b) for a, b in zip(whole, first + rest, strict=True))


def test_ranks_share_the_items_of_one_larger_batch(data):
    sampler = SegmentSampler(data.store, 3, seed=0)
    one = next(iter(SegmentLoader(sampler, 4, 1)))
    two = [next(iter(SegmentLoader(sampler, 2, 1, rank, 2))) for rank in range(2)]
    assert torch.equal(one.latents, torch.cat([batch.latents for batch in two]))


def test_held_out_segments_are_of_held_out_episodes_and_thinned(data):
    batches = list(data.test_dataloader())
    episodes = {int(index) for batch in batches for index in batch.episode}
    assert episodes == set(data.store.val_episodes.tolist())
    data.val_segments = 3
    assert not isinstance(data.val_dataloader(), list)
    assert sum(len(batch) for batch in data.val_dataloader()) == 3


def test_every_held_out_transition_counts_once_whatever_the_ranks(data):
    def counted(world_size):
        loaders = [HeldOutLoader(data._held_out_rows(), 2, 3, rank, world_size) for rank in range(world_size)]
        assert len({len(loader) for loader in loaders}) == 1
        return sum(int(batch.valid.sum()) for loader in loaders for batch in loader)

    assert len(HeldOutLoader(data._held_out_rows(), 2, 3)) % 3
    assert counted(2) == counted(3) == counted(4) == counted(1)


def test_a_size_that_is_not_positive_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"batch_size: expected int >= 1 \(0\)"):
        WAMDataModule(tmp_path, batch_size=0)


def test_with_nothing_held_out_there_is_no_validation_and_no_test(data):
    alone = WAMDataModule(data.data_sets[0].latents, held_out=0)
    assert alone.val_dataloader() == []
    with pytest.raises(ValueError, match=r"data\.held_out: nothing is held out"):
        alone.test_dataloader()


def test_numbers_of_episodes_are_those_of_one_data_set(data):
    folder = data.data_sets[0].latents
    named = WAMDataModule(folder, held_out=[3, 7])
    episodes = {int(row) for batch in named.test_dataloader() for row in batch.episode}
    assert episodes == {3, 7}
    with pytest.raises(ValueError, match="numbers of episodes are those of one data set, got 2"):
        WAMDataModule(
            data_sets=[DataSetSettings(latents=folder)] * 2, packing=PackingSettings(token_budget=99), held_out="3,7"
        )
