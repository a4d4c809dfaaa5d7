"""Seeds of demonstrations and of evaluations can never meet."""

import pytest
from repvitok.runtime.errors import UserError
from repwam_core.sim.base import (
    EVALUATION_SEEDS_FROM,
    MAX_ATTEMPTS,
    MAX_DATASET_SEED,
    MAX_EPISODES_PER_TASK,
    collection_seed,
    evaluation_seeds,
    require_evaluation_seeds,
)


def test_the_largest_collection_seed_lies_below_every_evaluation_seed():
    largest = collection_seed(MAX_DATASET_SEED, MAX_EPISODES_PER_TASK - 1, MAX_ATTEMPTS - 1)
    assert largest < EVALUATION_SEEDS_FROM == evaluation_seeds(1)[0]


def test_collection_seeds_are_distinct():
    triples = [(s, e, a) for s in (0, 1, 99) for e in (0, 1, 500, 999) for a in range(MAX_ATTEMPTS)]
    assert len({collection_seed(*triple) for triple in triples}) == len(triples)


@pytest.mark.parametrize("arguments", [(100, 0, 0), (0, 1000, 0), (0, 0, 10), (-1, 0, 0)])
def test_out_of_range_is_refused(arguments):
    with pytest.raises(UserError, match="must lie in 0"):
        collection_seed(*arguments)


def test_seen_or_repeated_seeds_are_refused_for_evaluation():
    with pytest.raises(UserError, match="no demonstration shows them, got 7"):
        require_evaluation_seeds([EVALUATION_SEEDS_FROM, 7])
    with pytest.raises(UserError, match="once only"):
        require_evaluation_seeds([EVALUATION_SEEDS_FROM] * 2)
