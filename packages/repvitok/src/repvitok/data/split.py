"""Which episodes are taken, by their numbers, and which are held out: one rule for every stage."""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from repvitok.runtime.documents import parse_episodes
from repvitok.runtime.errors import UserError

if TYPE_CHECKING:
    from repvitok.data.shards import LatentShards

log = logging.getLogger(__name__)

EpisodeNumbers = int | str | Sequence[int | str]
"""Episodes by their numbers in the data set, never by position: 3, "0-9,12", [0, 1, 12], ["0-9", "12"]."""
HeldOut = float | int | Sequence[int | str] | str
"""A share of the episodes, or their numbers as in `EpisodeNumbers`: 0.1, "0-9,12", [3, 7]."""

# Of the first 12,000 salts the one whose held-out counts stay nearest to fraction * n for data sets numbered from 0:
# within 2 episodes for every n up to 60.
_SALT = 1486


def split_episodes(
    episodes: Iterable[int], held_out: HeldOut, usable: Iterable[int] | None = None
) -> tuple[list[int], list[int]]:
    """(train, held out) episode numbers, both sorted.

    Of a fraction f, episode e is held out where hash(e) < f; the hash is uniform in [0, 1) and a function of e alone.
    So no stage's choice depends on a run's seed, on how many episodes there are, or on what that stage leaves out: the
    tokenizer, the latent actions and the world action model have each episode on the same side. A larger fraction
    holds out the same episodes and more (docs/decisions/054).

    At least one episode of a data set is held out, the one of the lowest hash, and at least one is trained on, the one
    of the highest; of a single one none is held out. A stage that can use none of the episodes to train on trains on
    one that is held out elsewhere.

    Args:
        episodes: numbers of all episodes of the data set, before any is left out; in any order, with repetitions.
        held_out: a fraction in [0, 1), or the numbers themselves.
        usable: the episodes that this stage can use; None for all. No other one is returned.
    """
    known = sorted(set(episodes))
    if isinstance(held_out, float | int):
        if not 0 <= held_out < 1:
            raise UserError(f"held_out must be a fraction in [0, 1) or a list of episodes, got {float(held_out)}")
        ordered = sorted((_hash(episode), episode) for episode in known)
        below = sum(value < held_out for value, _ in ordered)
        count = min(max(below, 1), len(known) - 1) if held_out and len(known) > 1 else 0
        chosen = {episode for _, episode in ordered[:count]}
    else:
        chosen = set(choose_episodes(held_out, known, "held_out")) if held_out else set()
    left = known if usable is None else sorted(set(known) & set(usable))
    if not left:
        raise UserError(f"none of {len(known)} episodes can be trained on")
    if isinstance(held_out, float | int) and chosen.issuperset(left):
        chosen = chosen - {max(left, key=_hash)}
    train = [episode for episode in left if episode not in chosen]
    if not train:
        raise UserError(
            f"holding out {len(chosen)} of {len(known)} episodes leaves none to train on; add episodes or hold out "
            "fewer"
        )
    return train, [episode for episode in left if episode in chosen]


def held_out_by_0_1(episodes: Iterable[int], fraction: float) -> list[int]:
    """The episodes that version 0.1 held out for a share: a permutation seeded by their count (docs/decisions/054)."""
    known = sorted(set(episodes))
    count = max(round(fraction * len(known)), 1) if fraction else 0
    order = np.random.default_rng((2606, len(known))).permutation(len(known))
    return sorted(known[place] for place in order[:count])


class LatentSpan(NamedTuple):
    """Latent frames first .. last - 1 of entry `number` of some latent shards."""

    number: int
    first: int
    last: int


def split_latents(
    shards: LatentShards, held_out: HeldOut, shortest: int = 2
) -> tuple[list[LatentSpan], list[LatentSpan]]:
    """(train, held out) parts of latent shards: whole episodes at all their offsets, in the shards' order.

    Augmented encodings of an episode are trained on, and left out where it is held out.

    Episodes are held out as `split_episodes` says. Of a single one that is long enough, the last latent frames are held
    out, at all offsets from the same raw frame on: no raw frame is seen from both sides. What is left out, and what is
    held out otherwise than asked for, is logged in one line.

    Args:
        shards: the latents.
        held_out: a fraction, or numbers of episodes.
        shortest: latent frames that a stage needs of an episode.
    """
    longest: dict[int, int] = {}
    for info in shards.infos:
        longest[info.episode_index] = max(info.frames, longest.get(info.episode_index, 0))
    usable = {episode for episode, frames in longest.items() if frames >= shortest}
    if not usable:
        raise UserError(
            f"{shards.root}: no episode has {shortest} latent frames, the longest {max(longest.values(), default=0)}: "
            "encode longer episodes, or with a smaller stride"
        )
    if short := [frames for frames in longest.values() if frames < shortest]:
        log.warning("%s: %s", shards.root, left_out(short, len(longest), f"{shortest} latent frames are needed"))
    train, kept = split_episodes(shards.recorded, held_out, usable)
    if held_out and not kept and len(usable) == 1:
        return _split_frames(shards, train[0], held_out, shortest)
    if held_out and not kept:
        log.warning("%s: nothing is held out: the episodes that would be are too short", shards.root)
    sides = {episode: side for side, episodes in enumerate((train, kept)) for episode in episodes}
    parts: tuple[list[LatentSpan], list[LatentSpan]] = ([], [])
    for number, info in enumerate(shards.infos):
        if info.frames < shortest:
            continue
        side = sides[info.episode_index]
        if not (side and info.augmentation):
            parts[side].append(LatentSpan(number, 0, info.frames))
    return parts


def _split_frames(
    shards: LatentShards, episode: int, held_out: HeldOut, shortest: int
) -> tuple[list[LatentSpan], list[LatentSpan]]:
    """The beginning and the end of an only episode, at all its offsets.

    With p raw frames per latent, latent k of an entry with offset o stands for raw frames o + p (k - 1) + 1 .. o + p k.
    """
    per_latent = shards.meta.frames_per_latent
    entries = [(n, i) for n, i in enumerate(shards.infos) if i.episode_index == episode and i.frames >= shortest]
    _, longest = max(entries, key=lambda entry: entry[1].frames)
    tail = held_out_tail(longest.frames, held_out, 2, shortest)
    if not tail:
        log.warning(
            "%s: nothing is held out: there is episode %d alone, of %d latent frames",
            *(shards.root, episode, longest.frames),
        )
        return [LatentSpan(number, 0, info.frames) for number, info in entries], []
    cut = longest.offset + per_latent * (longest.frames - tail - 1) + 1  # the first raw frame that is held out
    train, kept = [], []
    for number, info in entries:
        before = -(-(cut - info.offset) // per_latent)  # latents that end before the cut: o + p k < cut
        after = -(-(cut - 1 - info.offset) // per_latent) + 1  # the first that begins at it or later
        if before >= shortest:
            train.append(LatentSpan(number, 0, min(before, info.frames)))
        if info.frames - after >= 2 and not info.augmentation:
            kept.append(LatentSpan(number, after, info.frames))
    log.warning("%s: episode %d alone: held out from its frame %d on", shards.root, episode, cut)
    return train, kept


def held_out_tail(length: int, held_out: HeldOut, shortest: int, shortest_train: int) -> int:
    """How much of the end of an only episode is held out, of which no part overlaps what is trained on.

    max(fraction * length, shortest), or 0 where less than as much, or than `shortest_train`, would be left to train on:
    validation may not take more than half of the data.

    Args:
        length: of the episode, in raw or latent frames.
        held_out: the fraction; 0 for numbers of episodes, which name whole ones.
        shortest: the shortest tail that can be validated on.
        shortest_train: the shortest beginning that can be trained on.
    """
    if not isinstance(held_out, float | int) or not held_out:
        return 0
    tail = max(round(held_out * length), shortest)
    return tail if length - tail >= max(tail, shortest_train) else 0


def left_out(lengths: Sequence[int], total: int, needed: str, what: str = "episodes") -> str:
    """What is said of episodes that are too short for a stage: "left out 2 of 9 episodes, ...".

    Args:
        lengths: of the episodes left out, at least one.
        total: number of episodes.
        needed: what the stage needs, and in what: "a clip takes 17 frames".
        what: what they are called.
    """
    short, long = min(lengths), max(lengths)
    span = f"{short}" if short == long else f"{short} to {long}"
    return f"left out {len(lengths)} of {total} {what}, too short with a length of {span}: {needed}"


def _hash(episode: int) -> float:
    """A number in [0, 1) that is as good as random, and the same on every machine."""
    digest = hashlib.sha256(f"{_SALT}/{episode}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def choose_episodes(chosen: EpisodeNumbers | None, there: Iterable[int], where: str) -> list[int]:
    """The numbers asked for, each once, in ascending order; None for all there are.

    Args:
        chosen: numbers and ranges; both ends of a range belong to it.
        there: the episodes of the data set.
        where: what an error calls the data set.
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
