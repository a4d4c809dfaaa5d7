"""Which episodes are for training and which for testing: two ranges of seeds that cannot meet."""

from __future__ import annotations

from repvitok.runtime.errors import UserError

__all__ = ["EVALUATION_SEEDS_FROM", "collection_seed", "evaluation_seeds", "require_evaluation_seeds"]

EVALUATION_SEEDS_FROM = 1_000_000
MAX_DATASET_SEED = 99
MAX_EPISODES_PER_TASK = 1_000
MAX_ATTEMPTS = 10


def collection_seed(dataset_seed: int, episode: int, attempt: int = 0) -> int:
    """The simulator's seed for one attempt at demonstration number ``episode`` of a task.

    ``dataset_seed * 10,000 + attempt * 1,000 + episode``: distinct for distinct arguments, and below
    ``EVALUATION_SEEDS_FROM``. Tasks share seeds, so that tasks of one scene are shown in the same layouts.

    Raises:
        UserError: If an argument is out of range.
    """
    for what, value, largest in (
        ("the data set's seed", dataset_seed, MAX_DATASET_SEED),
        ("the episode of a task", episode, MAX_EPISODES_PER_TASK - 1),
        ("the attempt", attempt, MAX_ATTEMPTS - 1),
    ):
        if not 0 <= value <= largest:
            raise UserError(f"{what} must lie in 0 .. {largest}, got {value}")
    return dataset_seed * 10_000 + attempt * 1_000 + episode


def evaluation_seeds(count: int, first: int = EVALUATION_SEEDS_FROM) -> list[int]:
    """``count`` consecutive seeds that no collection uses."""
    seeds = list(range(first, first + count))
    require_evaluation_seeds(seeds)
    return seeds


def require_evaluation_seeds(seeds: list[int]) -> None:
    """Raise a UserError if a seed could be one of a collection, or is given twice."""
    seen = [seed for seed in seeds if seed < EVALUATION_SEEDS_FROM]
    if seen:
        raise UserError(
            f"evaluation seeds must be at least {EVALUATION_SEEDS_FROM}, so that no demonstration shows them, "
            f"got {seen[0]}"
        )
    if len(set(seeds)) != len(seeds):
        raise UserError("an evaluation seed may be given once only")
