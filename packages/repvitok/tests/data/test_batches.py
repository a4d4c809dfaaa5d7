"""Batch k is what the seed and k say: on every rank, after every resume, in every mixture."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from repvitok.data.clips import ClipLoader, ClipMixture, MixtureBatches, StepBatches
from torch.utils.data import Dataset


class Numbers(Dataset):
    """Item i is i in a tensor of the given shape."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full(self.shape, float(index))


MIXTURE = MixtureBatches(batch_sizes=(3, 2), weights=(1.0, 3.0), seed=5)


def test_batches_follow_their_number_over_ranks():
    ranks = [list(islice(StepBatches(2, first=3, rank=rank, world_size=2), 2)) for rank in range(2)]
    assert ranks == [[[12, 13], [16, 17]], [[14, 15], [18, 19]]]


def test_ranks_draw_the_same_kind_and_other_clips():
    ranks = [list(islice(MixtureBatches((3, 2), (1.0, 3.0), seed=5, rank=rank, world_size=2), 50)) for rank in range(2)]
    seen = Counter()
    for one, two in zip(*ranks, strict=True):
        kinds = {kind for kind, _ in one + two}
        assert len(kinds) == 1
        assert len(one) == len(two) == (3, 2)[kinds.pop()]
        seen.update(one + two)
    assert max(seen.values()) == 1


def test_kinds_come_as_often_as_their_weights_say():
    kinds = Counter(MIXTURE.kind(batch) for batch in range(4000))
    assert 0.72 < kinds[1] / 4000 < 0.78
    assert [MIXTURE.kind(batch) for batch in range(60)] != [
        MixtureBatches((3, 2), (1.0, 3.0), seed=6).kind(batch) for batch in range(60)
    ]


def test_a_batch_of_a_mixture_has_one_shape():
    loader = ClipLoader(ClipMixture([Numbers(3, 5, 4, 4), Numbers(3, 1, 8, 8)]), MIXTURE)
    for number, batch in enumerate(islice(loader, 30)):
        assert batch.shape == ((3, 3, 5, 4, 4), (2, 3, 1, 8, 8))[MIXTURE.kind(number)]


@pytest.mark.parametrize(("workers", "workers_later"), [(0, 2), (2, 0), (2, 1)])
def test_a_loader_goes_on_at_the_exact_batch_whatever_its_workers(workers, workers_later):
    data = ClipMixture([Numbers(1), Numbers(2)])
    whole = list(islice(ClipLoader(data, MIXTURE), 12))
    first = ClipLoader(data, MIXTURE, num_workers=workers)
    taken = list(islice(first, 5))  # workers are several batches ahead by now
    later = ClipLoader(data, MIXTURE, num_workers=workers_later)
    later.load_state_dict(first.state_dict())
    taken += list(islice(later, 7))
    assert all(torch.equal(one, two) for one, two in zip(whole, taken, strict=True))


def test_a_state_of_other_batches_is_refused():
    loader = ClipLoader(Numbers(1), StepBatches(4))
    with pytest.raises(ValueError, match="'batch_size': 2"):
        loader.load_state_dict(ClipLoader(Numbers(1), StepBatches(2)).state_dict())
