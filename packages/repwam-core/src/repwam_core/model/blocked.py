"""Attention over the visible pairs only: blocks of queries that see the same keys, equal blocks computed together.

`block_plan` cuts a layout into blocks without ever holding the mask's matrix: `masks.visible` is asked for one token
per run of equal tokens, and only against runs that are near enough in time to matter, so that the work grows with
tokens times window.

Small models spend their time on the number of operations, not on arithmetic. Blocks of one shape that follow each other
at regular distances (the chunks of a document do) are therefore gathered as strided views, attended in one call along
the batch, and put back, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from repwam_core.model.masks import pairs
from repwam_core.model.sequence import PADDING, SequenceLayout, TokenFields

Heads = Float[Tensor, "b heads n c"]

KEYS_TOGETHER = 16_384
"""Keys in one call of equal blocks at most: beyond that a call's work hides its overhead, and copies cost memory."""


@dataclass(frozen=True)
class Block:
    """Queries that see exactly the same keys: numbers of segments, in order."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]


class Column(NamedTuple):
    """`size` consecutive tokens of each of `count` blocks, the first block's at `start`, the next `step` further on."""

    start: int
    size: int
    step: int
    count: int


class Group(NamedTuple):
    """Blocks that are computed in one call: their queries and keys, run by run."""

    queries: tuple[Column, ...]
    keys: tuple[Column, ...]


@dataclass(frozen=True)
class BlockPlan:
    """A layout cut into segments of consecutive tokens, and blocks of segments inside which everything is visible.

    Attributes:
        sizes: tokens of each segment; they cover the layout in order.
        blocks: every segment is among the queries of exactly one block, or of none if it is padding.
    """

    sizes: tuple[int, ...]
    blocks: tuple[Block, ...]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The blocks in as few calls as their places allow."""
        starts = (0, *accumulate(self.sizes))
        runs = sorted(
            (_runs(block.queries, starts), _runs(block.keys, starts)) for block in self.blocks if block.queries
        )
        groups: list[list[tuple[list[Run], list[Run]]]] = []
        for block in runs:
            if groups and _continues(groups[-1], block):
                groups[-1].append(block)
            else:
                groups.append([block])
        return tuple(
            Group(_columns([queries for queries, _ in group]), _columns([keys for _, keys in group]))
            for group in groups
        )


@dataclass(frozen=True, eq=False)
class BlockedAttend:
    """Attention that computes the visible pairs only."""

    plan: BlockPlan

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002
        return blocked_attention(q, k, v, self.plan)


def blocked_attention(q: Heads, k: Heads, v: Heads, plan: BlockPlan) -> Heads:
    """Softmax attention where each query sees the keys of its block; equal to attention under the dense mask.

    Queries of no block (padding) come back as zeros.
    """
    queries, keys = [group.queries for group in plan.groups], [group.keys for group in plan.groups]
    parts = (_Gather.apply(x.transpose(1, 2), columns) for x, columns in ((q, queries), (k, keys), (v, keys)))
    outputs = [
        scaled_dot_product_attention(*(part.transpose(1, 2) for part in group)).transpose(1, 2)
        for group in zip(*parts, strict=True)
    ]
    return _Scatter.apply(queries, q.shape[2], *outputs).transpose(1, 2)


Run = tuple[int, int]
"""Start and size of consecutive tokens."""


def _runs(segments: Sequence[int], starts: Sequence[int]) -> list[Run]:
    """The tokens of some segments, neighbours joined."""
    runs: list[Run] = []
    for number in segments:
        start, size = starts[number], starts[number + 1] - starts[number]
        if runs and sum(runs[-1]) == start:
            runs[-1] = (runs[-1][0], runs[-1][1] + size)
        else:
            runs.append((start, size))
    return runs


def _continues(group: Sequence[tuple[list[Run], list[Run]]], block: tuple[list[Run], list[Run]]) -> bool:
    """Whether a block has the shape of a group's blocks and stands where the next of them would."""
    if (len(group) + 1) * sum(size for _, size in block[1]) > KEYS_TOGETHER:
        return False
    last = group[-1]
    for now, before, earlier in zip(block, last, group[-2] if len(group) > 1 else last, strict=True):
        if [size for _, size in now] != [size for _, size in before]:
            return False
        steps = [(a - b, b - c) for (a, _), (b, _), (c, _) in zip(now, before, earlier, strict=True)]
        if any(step < 0 or (len(group) > 1 and step != before_it) for step, before_it in steps):
            return False
    return True


def _columns(blocks: Sequence[list[Run]]) -> tuple[Column, ...]:
    """The runs of regularly placed blocks, the i-th of every block together."""
    second = blocks[1] if len(blocks) > 1 else blocks[0]
    return tuple(
        Column(start, size, following - start, len(blocks))
        for (start, size), (following, _) in zip(blocks[0], second, strict=True)
    )


class _Gather(torch.autograd.Function):
    """(b, n, heads, c) -> for each group (b * blocks, m, heads, c): the tokens of its columns, block by block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Sequence[tuple[Column, ...]]) -> tuple[Tensor, ...]:
        ctx.groups, ctx.shape = groups, x.shape
        return tuple(_read(x, columns) for columns in groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].new_zeros(ctx.shape)
        for columns, grad in zip(ctx.groups, grads, strict=True):
            for column, part in _parts(columns, grad):
                for into, values in _disjoint(_strided(total, column), part, column):
                    into += values
        return total, None


class _Scatter(torch.autograd.Function):
    """The inverse of `_Gather` for columns without overlap: (b, n, heads, c) with zeros where no column reaches."""

    @staticmethod
    def forward(ctx: Any, groups: Sequence[tuple[Column, ...]], n: int, *parts: Tensor) -> Tensor:
        ctx.groups = groups
        covered = sum(column.size * column.count for columns in groups for column in columns)
        shape = (parts[0].shape[0] // groups[0][0].count, n, *parts[0].shape[2:])
        whole = parts[0].new_empty(shape) if covered == n else parts[0].new_zeros(shape)
        for columns, values in zip(groups, parts, strict=True):
            for column, part in _parts(columns, values):
                _strided(whole, column).copy_(part)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(_read(grads[0], columns) for columns in ctx.groups)


def _read(x: Float[Tensor, "b n heads c"], columns: Sequence[Column]) -> Float[Tensor, "bg m heads c"]:
    return torch.cat([_strided(x, column) for column in columns], dim=2).flatten(0, 1)


def _parts(columns: Sequence[Column], values: Float[Tensor, "bg m heads c"]) -> list[tuple[Column, Tensor]]:
    """What of a group's values belongs to each column, (b, blocks, size, heads, c)."""
    parts = values.unflatten(0, (-1, columns[0].count)).split([column.size for column in columns], dim=2)
    return list(zip(columns, parts, strict=True))


def _strided(x: Float[Tensor, "b n heads c"], column: Column) -> Float[Tensor, "b blocks size heads c"]:
    """A view of a column's tokens; of overlapping blocks tokens stand in it several times."""
    b, n, heads, c = x.stride()
    size = (x.shape[0], column.count, column.size, *x.shape[2:])
    return x.as_strided(size, (b, column.step * n, n, heads, c), x.storage_offset() + column.start * n)


def _disjoint(view: Tensor, values: Tensor, column: Column) -> list[tuple[Tensor, Tensor]]:
    """Pieces of a view of a column, and of its values, inside which no token stands twice."""
    if column.count == 1 or column.step >= column.size:
        return [(view, values)]
    return list(zip(view.unbind(1), values.unbind(1), strict=True))


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
