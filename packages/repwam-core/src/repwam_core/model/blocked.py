"""Attention over the visible pairs only: blocks of queries that see the same keys, equal blocks computed together.

Small models spend their time on the number of operations, not on arithmetic. Blocks of one shape that follow each other
at regular distances (the chunks of a document do) are therefore gathered as strided views, attended in one call along
the batch, and put back, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

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
