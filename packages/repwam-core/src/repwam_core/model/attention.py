"""Masked self-attention of a teacher-forced pass: the visible pairs only, every pair under a mask, or FlexAttention.

FlexAttention takes a block mask made from a plan: which tiles of the attention matrix are empty, part or all visible.
Its lengths are rounded up to a few sizes, so that the kernel is compiled for few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import Bool, Int
from repvitok.errors import UserError
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from repwam_core.model.blocked import BlockedAttend, BlockPlan, block_plan
from repwam_core.model.masks import Attend, dense_mask, visible
from repwam_core.model.sequence import KEPT_LAYOUTS, PADDING, SequenceLayout, TokenFields

TILE = 128
"""Side of a tile of the attention matrix."""


def bucket(tokens: int) -> int:
    """The next of eight evenly spaced lengths per power of two, a multiple of `TILE`: at most an eighth is padding."""
    step = max(TILE, 2 ** (max(1, tokens - 1).bit_length() - 4))
    return -(-tokens // step) * step


def flex_mask_mod(layout: SequenceLayout, coupling: str, window: int) -> Callable[..., Tensor]:
    """`visible` in the form FlexAttention asks for: mask_mod(batch, head, query index, key index)."""
    return _mask_mod(layout.fields, coupling, window)


@no_type_check  # as `visible`
def _mask_mod(fields: TokenFields, coupling: str, window: int) -> Callable[..., Tensor]:
    document, chunk, frame, start, noisy, modality = fields

    def mask_mod(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at_query = TokenFields(document[query], chunk[query], frame[query], start[query], noisy[query], modality[query])
        at_key = TokenFields(document[key], chunk[key], frame[key], start[key], noisy[key], modality[key])
        return visible(at_query, at_key, coupling, window)

    return mask_mod


def visible_pairs(plan: BlockPlan, tiles: int) -> Int[np.ndarray, "tiles tiles"]:
    """How many visible pairs of tokens each tile holds, (query tile, key tile).

    A block's queries that lie in tile i see its keys in tile j: of each block every such product is added up.
    """
    starts = np.concatenate([[0], np.cumsum(plan.sizes)])
    rows = _overlaps([block.queries for block in plan.blocks], starts)
    columns = _overlaps([block.keys for block in plan.blocks], starts)
    in_column = np.bincount(columns.block, minlength=len(plan.blocks))
    many = in_column[rows.block]
    row = np.repeat(np.arange(len(many)), many)
    column = (np.cumsum(in_column) - in_column)[rows.block[row]] + _counted(many)
    tile, area = rows.tile[row] * tiles + columns.tile[column], rows.tokens[row] * columns.tokens[column]
    return np.bincount(tile, area, tiles * tiles).astype(np.int32).reshape(tiles, tiles)


class _Overlaps(NamedTuple):
    """Runs of neighbouring tokens of some blocks, cut at the tiles' borders, block by block.

    Attributes:
        block, tile: numbers of the block and of the tile.
        tokens: how many of the run's tokens lie in the tile.
    """

    block: Int[np.ndarray, " n"]
    tile: Int[np.ndarray, " n"]
    tokens: Int[np.ndarray, " n"]


def _overlaps(segments: Sequence[tuple[int, ...]], starts: Int[np.ndarray, " borders"]) -> _Overlaps:
    """The segments of each block as runs of tokens, cut at the tiles' borders."""
    sizes = np.array([len(numbers) for numbers in segments], np.int64)
    block, number = np.repeat(np.arange(len(sizes)), sizes), np.fromiter(chain.from_iterable(segments), np.int64)
    begins = np.concatenate([[True], (np.diff(number) != 1) | (np.diff(block) != 0)])
    start, stop, block = starts[number[begins]], starts[number[np.roll(begins, -1)] + 1], block[begins]
    tiles = (stop - 1) // TILE - start // TILE + 1
    run = np.repeat(np.arange(len(start)), tiles)
    tile = start[run] // TILE + _counted(tiles)
    tokens = np.minimum(stop[run], (tile + 1) * TILE) - np.maximum(start[run], tile * TILE)
    return _Overlaps(block[run], tile, tokens)


def _counted(sizes: Int[np.ndarray, " n"]) -> Int[np.ndarray, " total"]:
    """0 .. size - 1 for each size, one after the other."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


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
    index = np.zeros(tiles.shape, np.int32)
    index[rows, _counted(number)] = columns
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
    """FlexAttention, compiled once for each length that it meets; never in the form that computes every pair."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


BACKENDS = ("auto", "flex", "blocked", "dense")


@dataclass(frozen=True, eq=False)
class DenseAttend:
    """Masked attention that computes every pair of tokens."""

    mask: Bool[Tensor, "n m"]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002
        return scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


@lru_cache(maxsize=KEPT_LAYOUTS)
def masked_attend(
    layout: SequenceLayout,
    coupling: str,
    window: int,
    backend: str = "blocked",
    device: torch.device | str = "cpu",
) -> Attend:
    """The attention of a teacher-forced pass over `layout`, whose tokens are in `streams` order.

    Args:
        layout: compared by identity; the builders in `sequence` return the same object for the same arguments.
        coupling, window: see `visible`.
        backend: see `make_attend`; all are the same function. On a CPU blocked is faster at every length measured,
            forward and backward: 1.2x at 345 tokens, 2.1x at 673, 2.5x at 1,329.
        device: where the attention will run.

    Raises:
        ValueError: unknown backend.
    """
    return make_attend(layout, coupling, window, backend, device)


def make_attend(
    layout: SequenceLayout, coupling: str, window: int, backend: str = "blocked", device: torch.device | str = "cpu"
) -> Attend:
    """`masked_attend` for a layout that will not come again, such as a packed one; nothing is kept.

    Args:
        layout: on the CPU, where the attention is planned.
        coupling, window: see `visible`.
        backend: "flex" (FlexAttention, for a GPU), "blocked", "dense", or "auto": "flex" on a GPU, else "blocked".
        device: where the attention will run.

    Raises:
        ValueError: unknown backend.
    """
    if backend == "auto":
        backend = "flex" if torch.device(device).type == "cuda" else "blocked"
    if backend == "blocked":
        return BlockedAttend(block_plan(layout.streams, coupling, window))
    if backend == "dense":
        return DenseAttend(dense_mask(layout.streams, coupling, window).to(device))
    if backend == "flex":
        return FlexAttend.of(layout.streams, coupling, window, device)
    raise UserError(f"attention backend: expected one of {BACKENDS}, got {backend!r}.")
