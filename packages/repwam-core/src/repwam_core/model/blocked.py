"""Attention over the visible pairs only: blocks of queries that see the same keys, equal blocks computed together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Heads = Float[Tensor, "b heads n c"]
Tokens = Float[Tensor, "b n heads c"]

KEYS_TOGETHER = 16_384
"""Keys in one call of equal blocks at most: beyond that a call's work hides its overhead, and copies cost memory."""


@dataclass(frozen=True)
class Block:
    """Queries that see exactly the same keys: numbers of segments, in order."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]


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
    def groups(self) -> tuple[tuple[Block, ...], ...]:
        """Blocks with as many queries and as many keys as each other, computed in one call."""
        of_shape: dict[tuple[int, int], list[Block]] = {}
        for block in self.blocks:
            of_shape.setdefault((self._tokens(block.queries), self._tokens(block.keys)), []).append(block)
        together = {shape: max(1, KEYS_TOGETHER // shape[1]) for shape in of_shape}
        return tuple(
            tuple(blocks[first : first + together[shape]])
            for shape, blocks in of_shape.items()
            for first in range(0, len(blocks), together[shape])
        )

    def _tokens(self, segments: Iterable[int]) -> int:
        return sum(self.sizes[number] for number in segments)


@dataclass(frozen=True, eq=False)
class BlockedAttend:
    """Attention that computes the visible pairs only."""

    plan: BlockPlan

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002
        return blocked_attention(q, k, v, self.plan)


def blocked_attention(q: Heads, k: Heads, v: Heads, plan: BlockPlan) -> Heads:
    """Softmax attention where each query sees the keys of its block; equal to attention under the dense mask."""
    q_parts, k_parts, v_parts = (x.transpose(1, 2).split(plan.sizes, dim=1) for x in (q, k, v))
    outputs: list[Tensor] = list(q_parts)
    for blocks in plan.groups:
        output = scaled_dot_product_attention(
            _stack(q_parts, (block.queries for block in blocks), len(blocks)),
            _stack(k_parts, (block.keys for block in blocks), len(blocks)),
            _stack(v_parts, (block.keys for block in blocks), len(blocks)),
        )
        _unstack(output, blocks, plan.sizes, outputs)
    return torch.cat(outputs, dim=1).transpose(1, 2)


def _stack(parts: tuple[Tensor, ...], blocks: Iterator[tuple[int, ...]], count: int) -> Float[Tensor, "bg heads m c"]:
    """The segments of each block one after the other; the blocks side by side along the batch."""
    chosen = [parts[number] for numbers in blocks for number in numbers]
    joined = chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=1)
    return joined.unflatten(1, (count, -1)).flatten(0, 1).transpose(1, 2)


def _unstack(
    output: Float[Tensor, "bg heads m c"], blocks: tuple[Block, ...], sizes: tuple[int, ...], outputs: list[Tensor]
) -> None:
    """Put each block's output back at its segments' numbers."""
    numbers = [number for block in blocks for number in block.queries]
    tokens = output.transpose(1, 2).unflatten(0, (-1, len(blocks))).flatten(1, 2)
    for number, piece in zip(numbers, tokens.split([sizes[number] for number in numbers], dim=1), strict=True):
        outputs[number] = piece
