"""FlexAttention with a block mask made from a plan: which tiles of the attention matrix are empty, part or all visible.

Lengths are rounded up to a few sizes, so that the kernel is compiled for few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from repwam_core.model.blocked import BlockPlan
from repwam_core.model.masks import visible
from repwam_core.model.plans import block_plan
from repwam_core.model.sequence import PADDING, SequenceLayout, TokenFields

TILE = 128
"""Side of a tile of the attention matrix."""


def bucket(tokens: int) -> int:
    """The next of eight evenly spaced lengths per power of two, a multiple of `TILE`: at most an eighth is padding."""
    step = max(TILE, 2 ** (max(1, tokens - 1).bit_length() - 4))
    return -(-tokens // step) * step


def flex_mask_mod(layout: SequenceLayout, coupling: str, window: int) -> Callable[..., Tensor]:
    """`visible` in the form FlexAttention asks for: mask_mod(batch, head, query index, key index)."""
    return _mask_mod(layout.fields, coupling, window)


def _mask_mod(fields: TokenFields, coupling: str, window: int) -> Callable[..., Tensor]:
    document, chunk, frame, start, noisy, modality = fields

    def mask_mod(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at_query = TokenFields(document[query], chunk[query], frame[query], start[query], noisy[query], modality[query])
        at_key = TokenFields(document[key], chunk[key], frame[key], start[key], noisy[key], modality[key])
        return visible(at_query, at_key, coupling, window)

    return mask_mod


def visible_pairs(plan: BlockPlan, tiles: int) -> Int[np.ndarray, "tiles tiles"]:
    """How many visible pairs of tokens each tile holds, (query tile, key tile)."""
    starts = np.concatenate([[0], np.cumsum(plan.sizes)])
    counts = np.zeros((tiles, tiles), np.int32)
    for block in plan.blocks:
        of_query, of_key = _tokens_per_tile(block.queries, starts), _tokens_per_tile(block.keys, starts)
        for first_row, rows in of_query:
            for first_column, columns in of_key:
                area = counts[first_row : first_row + len(rows), first_column : first_column + len(columns)]
                area += rows[:, None] * columns[None, :]
    return counts


def _tokens_per_tile(segments: tuple[int, ...], starts: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """For each run of neighbouring segments: its first tile, and how many of its tokens lie in that tile and on."""
    return [(start // TILE, _overlaps(start, stop)) for start, stop in _token_runs(segments, starts)]


def _overlaps(start: int, stop: int) -> np.ndarray:
    edges = np.arange(start // TILE, -(-stop // TILE) + 1) * TILE
    return np.diff(edges.clip(start, stop)).astype(np.int32)


def _token_runs(segments: tuple[int, ...], starts: np.ndarray) -> Iterator[tuple[int, int]]:
    numbers = np.array(segments)
    borders = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    for a, b in pairwise(borders):
        yield int(starts[numbers[a]]), int(starts[numbers[b - 1] + 1])


def flex_block_mask(
    layout: SequenceLayout, coupling: str, window: int, device: torch.device | str = "cpu"
) -> BlockMask:
    """The block mask of a layout, padded to its `bucket`; made on the CPU from the plan, never from the matrix.

    Args:
        layout: on the CPU.
        coupling, window: see `masks.visible`.
        device: where the attention will run.
    """
    tokens = bucket(len(layout))
    counts = visible_pairs(block_plan(layout, coupling, window), tokens // TILE)
    full = counts == TILE * TILE
    partial = (counts > 0) & ~full
    fields = TokenFields(
        *(_padded(values, tokens, name).to(device) for name, values in layout.fields._asdict().items())
    )
    lists: dict[str, Any] = {}
    for name, tiles in (("kv", partial), ("full_kv", full), ("q", partial.T), ("full_q", full.T)):
        number, index = _tile_lists(tiles)
        lists |= {f"{name}_num_blocks": number.to(device), f"{name}_indices": index.to(device)}
    return BlockMask(
        seq_lengths=(tokens, tokens),
        **lists,
        BLOCK_SIZE=(TILE, TILE),
        mask_mod=_mask_mod(fields, coupling, window),
    )


def _padded(values: Int[Tensor, " n"] | Bool[Tensor, " n"], tokens: int, name: str) -> Tensor:
    """A field of the layout followed by that of slots without a token."""
    return pad(values, (0, tokens - len(values)), value=PADDING if name == "document" else 0)


def _tile_lists(tiles: Bool[np.ndarray, "rows columns"]) -> tuple[Tensor, Tensor]:
    """For each row of tiles how many are set, and which come first: (1, 1, rows) and (1, 1, rows, columns)."""
    rows, columns = np.nonzero(tiles)
    number = tiles.sum(axis=1)
    place = np.arange(len(rows)) - (np.cumsum(number) - number)[rows]
    index = np.zeros(tiles.shape, np.int32)
    index[rows, place] = columns
    return torch.from_numpy(number.astype(np.int32))[None, None], torch.from_numpy(index)[None, None]


@dataclass(frozen=True, eq=False)
class FlexAttend:
    """Self-attention by FlexAttention; queries, keys and values are padded to the mask's length.

    It has no backward pass on a CPU.
    """

    mask: BlockMask
    tokens: int

    @classmethod
    def of(cls, layout: SequenceLayout, coupling: str, window: int, device: torch.device | str = "cpu") -> FlexAttend:
        """The attention of a layout whose tokens are in the order of the model's streams."""
        return cls(flex_block_mask(layout, coupling, window, device), bucket(len(layout)))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002
        tokens = q.shape[-2]
        q, k, v = (pad(x.to(v.dtype), (0, 0, 0, self.tokens - tokens)) for x in (q, k, v))
        return compiled_flex()(q, k, v, block_mask=self.mask)[..., :tokens, :]


@lru_cache(maxsize=1)
def compiled_flex() -> Any:
    """FlexAttention, compiled once for each length that it meets."""
    return torch.compile(flex_attention, dynamic=False)
