"""Which episodes are taken, by their numbers, and which are held out: one rule for every stage."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import zip_longest

import numpy as np

from repvitok.errors import UserError

EpisodeNumbers = int | str | Sequence[int | str]
"""Episodes by their numbers in the data set, never by position: 3, "0-9,12", [0, 1, 12], ["0-9", "12"]."""
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


def choose_episodes(chosen: EpisodeNumbers | None, there: Iterable[int], where: str) -> list[int]:
    """The numbers asked for, each once, in ascending order; None for all there are.

    Args:
        chosen: numbers and ranges; both ends of a range belong to it.
        there: the episodes of the data set.
        where: what an error calls the data set.

    Raises:
        UserError: not numbers and ranges, or numbers of no episode; says which there are.
    """
    present = sorted(set(there))
    if chosen is None:
        return present
    pieces = [chosen] if isinstance(chosen, int | str) else chosen
    asked = [numbers for piece in pieces for numbers in _ranges(piece)]
    taken: set[int] = set()
    unknown: list[str] = []
    for numbers in asked:
        # A range may be far longer than a data set, so it is looked up by its ends and never written out.
        found = present[bisect_left(present, numbers.start) : bisect_left(present, numbers.stop)]
        taken.update(found)
        if missing := len(numbers) - len(found):
            first = next(number for number, nearest in zip_longest(numbers, found) if number != nearest)
            rest = f" and {missing - 1} more up to {numbers[-1]}" if missing > 1 else ""
            unknown.append(f"{first}{rest}")
    if unknown or not asked:
        raise UserError(f"{where}: no episodes {', '.join(unknown) or 'named'}; there are {format_episodes(present)}")
    return sorted(taken)


def parse_episodes(text: str) -> list[range]:
    """Numbers and ranges of episodes: "0-9,12" -> [range(0, 10), range(12, 13)].

    Raises:
        UserError: anything else.
    """
    ranges = []
    for part in text.split(","):
        ends = [end.strip() for end in part.split("-")]
        if len(ends) > 2 or not all(end.isascii() and end.isdecimal() and len(end) < 19 for end in ends):
            raise UserError(f"episodes: expected numbers and ranges like 0-9,12, got {text!r}")
        first, last = int(ends[0]), int(ends[-1])
        if first > last:
            raise UserError(f"episodes: expected the lower number of a range first, got {part.strip()!r}")
        ranges.append(range(first, last + 1))
    return ranges


def format_episodes(numbers: Iterable[int]) -> str:
    """The inverse of `parse_episodes`, as short as can be: [0, 1, 2, 5] -> "0-2,5"; "none" for none."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"


def _ranges(piece: int | str) -> list[range]:
    return parse_episodes(piece) if isinstance(piece, str) else [range(int(piece), int(piece) + 1)]
