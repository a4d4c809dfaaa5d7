"""Which runs of tokens see which: a layout cut into blocks without ever holding the mask's matrix.

The mask is read off `masks.visible` for one token per run of equal tokens, and only against runs that are near enough
in time to matter, so that the work grows with tokens times window.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from repwam_core.model.blocked import Block, BlockPlan
from repwam_core.model.masks import pairs
from repwam_core.model.sequence import PADDING, SequenceLayout, TokenFields

ROWS_AT_A_TIME = 256
"""Runs whose visibility is worked out at once: bounds the memory of a plan."""


def block_plan(layout: SequenceLayout, coupling: str, window: int) -> BlockPlan:
    """Cut a layout so that attention needs no mask and computes no hidden pair."""
    fields = TokenFields(*(values.cpu() for values in layout.fields))
    first = _run_starts(fields)
    runs = TokenFields(*(values[first] for values in fields))
    keys = list(_groups(runs, coupling, window))
    group = np.full(len(first), -1)
    for number, (queries, _) in enumerate(keys):
        group[queries] = number
    # A run is joined with the one before it unless some query tells them apart, or they see different keys.
    border = np.concatenate([[True], np.diff(group) != 0, [True]])
    for _, seen in keys:
        ends = np.flatnonzero(np.diff(seen) != 1)
        border[seen[np.concatenate([[0], ends + 1])]] = True
        border[seen[np.concatenate([ends, [len(seen) - 1]])] + 1] = True
    segment = np.cumsum(border[:-1]) - 1
    starts = np.append(first[border[:-1]], len(layout))
    blocks = [Block(_distinct(segment[queries]), _distinct(segment[seen])) for queries, seen in keys]
    blocks.sort(key=lambda block: tuple(-number for number in block.keys))
    return BlockPlan(tuple(np.diff(starts).tolist()), tuple(blocks))


def _run_starts(fields: TokenFields) -> np.ndarray:
    """Where a token differs from the one before it in anything that decides who sees whom."""
    if not len(fields.document):
        return np.zeros(0, np.int64)
    changes = torch.stack([values[1:] != values[:-1] for values in fields]).any(0)
    return np.concatenate([[0], np.flatnonzero(changes.numpy()) + 1])


def _groups(runs: TokenFields, coupling: str, window: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Runs that see the same runs, and these: (queries, keys), both increasing."""
    for queries, candidates in _neighbourhoods(runs, window):
        rows = TokenFields(*(values[queries] for values in runs))
        columns = TokenFields(*(values[candidates] for values in runs))
        seen = pairs(rows, columns, coupling, window).numpy()
        distinct, of_row = np.unique(np.packbits(seen, axis=1), axis=0, return_inverse=True)
        of_row = of_row.reshape(-1)
        for number, row in enumerate(np.unpackbits(distinct, axis=1, count=len(candidates)).astype(bool)):
            yield queries[of_row == number], candidates[row]


def _neighbourhoods(runs: TokenFields, window: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some consecutive chunks' runs of one document, and all runs that their tokens could see.

    `visible` lets a token see its own chunk and clean frames back to `window` before it: nothing outside of the frames
    between the first chunk's start minus `window` and the last frame of these chunks.
    """
    document, chunk, frame, start = (x.numpy() for x in (runs.document, runs.chunk, runs.frame, runs.chunk_start))
    for number in np.unique(document[document != PADDING]):
        inside = np.flatnonzero(document == number)
        chunks, of_run = np.unique(chunk[inside], return_inverse=True)
        together = max(1, ROWS_AT_A_TIME * len(chunks) // len(inside))
        for first in range(0, len(chunks), together):
            queries = inside[(of_run >= first) & (of_run < first + together)]
            low, high = start[queries].min() - window, frame[queries].max()
            yield queries, inside[(frame[inside] >= low) & (frame[inside] <= high)]


def _distinct(numbers: np.ndarray) -> tuple[int, ...]:
    """An increasing sequence without its repetitions."""
    return tuple(numbers[np.concatenate([[True], np.diff(numbers) != 0])].tolist())
