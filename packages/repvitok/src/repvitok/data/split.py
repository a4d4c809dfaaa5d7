"""Which episodes are held out: one rule for every stage, so that none trains on what another one is judged by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from repvitok.errors import UserError

_SPLIT_SEED = 2606


def split_episodes(episodes: Iterable[int], held_out: float | Sequence[int]) -> tuple[list[int], list[int]]:
    """(train, held out) episode indices, both sorted.

    A fraction takes a fixed random choice that depends on the number of distinct episodes alone, never on a run's
    seed: the tokenizer, the latent actions and the world action model hold out the same episodes.

    Args:
        episodes: episode indices of the data set, in any order and with repetitions.
        held_out: a fraction in [0, 1) (rounded, at least one episode if above 0), or the episodes themselves.

    Raises:
        ValueError: the fraction is out of range, a number is no episode, or none would be left to train on.
    """
    distinct = sorted(set(episodes))
    chosen = set(held_out) if isinstance(held_out, Sequence) else _choose(distinct, held_out)
    if outside := sorted(chosen - set(distinct)):
        raise UserError(f"held-out episodes {outside} do not exist: there are {_told(distinct)}")
    train = [index for index in distinct if index not in chosen]
    if not train:
        raise UserError(
            f"holding out {len(chosen)} of {len(distinct)} episodes leaves none to train on; add episodes or hold out "
            "fewer"
        )
    return train, sorted(chosen)


def _choose(distinct: list[int], fraction: float) -> set[int]:
    if not 0 <= fraction < 1:
        raise UserError(f"held_out must be a fraction in [0, 1) or a list of episodes, got {fraction}")
    count = max(round(fraction * len(distinct)), 1) if fraction else 0
    order = np.random.default_rng((_SPLIT_SEED, len(distinct))).permutation(len(distinct))
    return {distinct[i] for i in order[:count]}


def _told(distinct: list[int]) -> str:
    return f"{distinct[0]}..{distinct[-1]}" if distinct else "none"
