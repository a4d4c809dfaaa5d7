"""Who may attend to whom, and the masked self-attention of a teacher-forced pass that follows it.

`visible` is the only definition: the dense mask, the blocks of visible pairs, FlexAttention's mask and the cached
rollout are all read off it, and tests hold them equal.

`block_plan` cuts a layout into blocks of queries that see the same keys, without ever holding the mask's matrix:
`visible` is asked for one token per run of equal tokens, and only against runs that are near enough in time to
matter, so that the work grows with tokens times window. On a CPU the blocks of one shape are attended together, however
many documents and chunks they come from. FlexAttention, for a GPU, takes a block mask made from the same plan: which
tiles of the attention matrix are empty, part or all visible. Its lengths are rounded up to a few sizes, so that the
kernel is compiled for few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, Protocol, no_type_check, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from repvitok.runtime.errors import UserError
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from repwam_core.model.sequence import PADDING, Buckets, Modality, TokenFields, TokenLayout

BACKENDS = ("auto", "flex", "blocked", "dense")
TILE = 128
"""Side of a tile of the attention matrix."""
ROWS_AT_A_TIME = 256
"""Runs whose visibility is worked out at once: bounds the memory of a plan."""


@runtime_checkable
class AttentionFn(Protocol):
    """Self-attention of one layer, given to the model as an argument: masked for training, cached for a rollout.

    One that takes another number of tokens than the layout has says so by `length`; zeros fill the rest.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention output (b, heads, n, c) for queries, keys and values of the layout's `streams` order."""
        ...


@no_type_check  # FlexAttention traces it, and checks of types at run time cannot be traced
def visible(query: TokenFields, key: TokenFields, coupling: str, window: int) -> Bool[Tensor, " *pairs"]:
    """Whether each query token may attend to each key token (docs/decisions/000, entries 2, 3 and 6).

    Only tokens of one document see each other, and nobody sees the future:

    - every token sees the clean tokens of earlier chunks, back to `window` frames before its chunk's first frame;
    - `joint`: a clean token also sees the clean tokens of its chunk, a noisy token the noisy ones of its chunk;
    - `sequential`: a noisy token sees the noisy tokens of its chunk and modality; a noisy action also the clean video
      of its chunk. So that this video tells an action nothing about itself, a clean video token sees of its own chunk
      only the clean video; clean actions and states see all clean tokens of their chunk.

    Args:
        query, key: fields that broadcast against each other, e.g. (n, 1) against (1, m).
        coupling: "joint" or "sequential".
        window: frames of history.
    """
    video = Modality.VIDEO
    same = (query.document == key.document) & (query.document != PADDING)
    history = ~key.noisy & (key.chunk < query.chunk) & (key.frame >= query.chunk_start - window)
    own_clean, own_noisy = ~query.noisy & ~key.noisy, query.noisy & key.noisy
    if coupling == "sequential":
        to_video = key.modality == video
        own_noisy = own_noisy & (query.modality == key.modality)
        inverse_dynamics = query.noisy & (query.modality == Modality.ACTION) & ~key.noisy & to_video
        own_clean = (own_clean & ((query.modality != video) | to_video)) | inverse_dynamics
    own = (key.chunk == query.chunk) & (own_clean | own_noisy)
    return same & (history | own)


def pairs(query: TokenFields, key: TokenFields, coupling: str, window: int) -> Bool[Tensor, "n m"]:
    """`visible` as a matrix: n query tokens against m key tokens."""
    rows = TokenFields(*(values[:, None] for values in query))
    columns = TokenFields(*(values[None, :] for values in key))
    return visible(rows, columns, coupling, window)


def alike(query: TokenFields, coupling: str) -> bool:
    """Whether `visible` lets all query tokens see the same: what it reads of them is the same."""
    read = [query.document, query.chunk, query.chunk_start, query.noisy]
    read += [query.modality] if coupling == "sequential" else []
    return all(bool((values == values[0]).all()) for values in read)


def dense_mask(layout: TokenLayout, coupling: str, window: int) -> Bool[Tensor, "n n"]:
    """Every token of a layout against every other: the oracle, and the mask of short sequences on a GPU."""
    return pairs(layout.fields, layout.fields, coupling, window)


def make_attention(
    layout: TokenLayout, coupling: str, window: int, backend: str = "auto", device: torch.device | str = "cpu"
) -> AttentionFn:
    """The attention of a teacher-forced pass over `layout`, whose tokens are in `streams` order.

    Args:
        layout: on the CPU, where the attention is planned.
        coupling, window: see `visible`.
        backend: "flex" (FlexAttention, for a GPU), "blocked", "dense", or "auto": "flex" on a GPU, else "blocked". All
            are the same function. On a CPU blocked is faster at every length measured.
        device: where the attention will run.
    """
    if backend == "auto":
        backend = "flex" if torch.device(device).type == "cuda" else "blocked"
    if backend == "blocked":
        return BlockAttention(Buckets.of(token_blocks(block_plan(layout.streams, coupling, window)), device))
    if backend == "dense":
        return DenseAttention(dense_mask(layout.streams, coupling, window).to(device))
    if backend == "flex":
        return FlexAttention(flex_block_mask(layout.streams, coupling, window, device))
    raise UserError(f"attention backend: expected one of {BACKENDS}, got {backend!r}.")


@dataclass(frozen=True, eq=False)
class DenseAttention:
    """Masked attention that computes every pair of tokens."""

    mask: Bool[Tensor, "n m"]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002
        return scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


@dataclass(frozen=True, eq=False)
class BlockAttention:
    """Attention that computes the visible pairs only; each token is a query of one block."""

    buckets: Buckets

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002
        return self.buckets.attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


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


def block_plan(layout: TokenLayout, coupling: str, window: int) -> BlockPlan:
    """Cut a layout so that attention needs no mask and computes no hidden pair."""
    fields = TokenFields(*(values.cpu() for values in layout.fields))
    changes = torch.stack([values[1:] != values[:-1] for values in fields]).any(0)
    # A run: consecutive tokens that are alike in everything that decides who sees whom. `first` is where each begins.
    first = np.concatenate([[0], np.flatnonzero(changes.numpy()) + 1]) if len(layout) else np.zeros(0, np.int64)
    runs = TokenFields(*(values[first] for values in fields))  # (runs,) each: a run's first token stands for all
    keys = list(_groups(runs, coupling, window))
    group = np.full(len(first), -1)  # number of the block whose query a run is; padding stays -1
    for number, (queries, _) in enumerate(keys):
        group[queries] = number
    # A run is joined with the one before it unless some query tells them apart, or they see different keys.
    border = np.concatenate([[True], np.diff(group) != 0, [True]])  # before run 0, 1, ..., and behind the last
    for _, seen in keys:
        ends = np.flatnonzero(np.diff(seen) != 1)  # the runs seen, as stretches without a gap: borders at both ends
        border[seen[np.concatenate([[0], ends + 1])]] = True
        border[seen[np.concatenate([ends, [len(seen) - 1]])] + 1] = True
    segment = np.cumsum(border[:-1]) - 1  # of each run: how many borders lie before or at it, from 0
    starts = np.append(first[border[:-1]], len(layout))  # first token of each segment, and the end
    blocks = [Block(_distinct(segment[queries]), _distinct(segment[seen])) for queries, seen in keys]
    blocks.sort(key=lambda block: tuple(-number for number in block.keys))
    return BlockPlan(tuple(np.diff(starts).tolist()), tuple(blocks))


def _groups(runs: TokenFields, coupling: str, window: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Runs that see the same runs, and these: (queries, keys), both increasing."""
    for queries, candidates in _neighbourhoods(runs, window):
        rows = TokenFields(*(values[queries] for values in runs))
        columns = TokenFields(*(values[candidates] for values in runs))
        seen = pairs(rows, columns, coupling, window).numpy()  # (queries, candidates), runs not tokens
        # Queries whose rows of `seen` are equal are one block; as bits, eight to a byte, rows are quick to compare.
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
        together = max(1, ROWS_AT_A_TIME * len(chunks) // len(inside))  # chunks of about ROWS_AT_A_TIME runs
        for first in range(0, len(chunks), together):
            queries = inside[(of_run >= first) & (of_run < first + together)]
            # the earliest frame that the earliest of these chunks sees; nobody sees later frames than its own chunk's
            low, high = start[queries].min() - window, frame[queries].max()
            yield queries, inside[(frame[inside] >= low) & (frame[inside] <= high)]


def _distinct(numbers: np.ndarray) -> tuple[int, ...]:
    """An increasing sequence without its repetitions."""
    return tuple(numbers[np.concatenate([[True], np.diff(numbers) != 0])].tolist())


def token_blocks(plan: BlockPlan) -> list[tuple[np.ndarray, np.ndarray]]:
    """The tokens that are queries, and those that are keys, of each block."""
    tokens = np.split(np.arange(sum(plan.sizes)), np.cumsum(plan.sizes)[:-1])  # the tokens of each segment
    parts = ([np.concatenate([tokens[n] for n in part]) for part in (b.queries, b.keys)] for b in plan.blocks)
    return [(queries, keys) for queries, keys in parts]


def bucket(tokens: int) -> int:
    """The next of eight evenly spaced lengths per power of two, a multiple of `TILE`: at most an eighth is padding."""
    # For 2^(k-1) < tokens <= 2^k a step of 2^(k-4), an eighth of the lower power: 1,100 tokens become 1,152.
    step = max(TILE, 2 ** (max(1, tokens - 1).bit_length() - 4))
    return -(-tokens // step) * step  # rounded up to a multiple of it


@no_type_check  # as `visible`
def flex_mask_mod(fields: TokenFields, coupling: str, window: int) -> Callable[..., Tensor]:
    """`visible` in the form FlexAttention asks for: mask_mod(batch, head, query index, key index)."""
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
    # Every row of a block meets every column of the same block: columns stand block by block, so that those of block
    # b are numbers first .. first + in_column[b] - 1, with first the sum of the blocks' before it.
    in_column = np.bincount(columns.block, minlength=len(plan.blocks))
    many = in_column[rows.block]  # how many columns each row meets
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
    # All blocks' segments in one row, and whose each is. A run begins where the number before it, or its block, is not
    # the neighbour; where the next one begins (np.roll) the number before is its last.
    block, number = np.repeat(np.arange(len(sizes)), sizes), np.fromiter(chain.from_iterable(segments), np.int64)
    begins = np.concatenate([[True], (np.diff(number) != 1) | (np.diff(block) != 0)])
    start, stop, block = starts[number[begins]], starts[number[np.roll(begins, -1)] + 1], block[begins]
    # A run of tokens 100 .. 299 lies in tiles 0, 1 and 2: 28, 128 and 44 of them.
    tiles = (stop - 1) // TILE - start // TILE + 1
    run = np.repeat(np.arange(len(start)), tiles)
    tile = start[run] // TILE + _counted(tiles)
    tokens = np.minimum(stop[run], (tile + 1) * TILE) - np.maximum(start[run], tile * TILE)
    return _Overlaps(block[run], tile, tokens)


def _counted(sizes: Int[np.ndarray, " n"]) -> Int[np.ndarray, " total"]:
    """0 .. size - 1 for each size, one after the other."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def flex_block_mask(layout: TokenLayout, coupling: str, window: int, device: torch.device | str = "cpu") -> BlockMask:
    """The block mask of a layout, padded to its `bucket`; made on the CPU from the plan, never from the matrix."""
    tokens = bucket(max(len(layout), layout.room))
    counts = visible_pairs(block_plan(layout, coupling, window), tokens // TILE)
    full = counts == TILE * TILE  # FlexAttention asks for no mask there; in partial tiles it does, pair by pair
    partial = (counts > 0) & ~full
    slots = {}  # the tokens' fields, then those of slots without a token
    for name, values in layout.fields._asdict().items():
        padding = PADDING if name == "document" else 0
        slots[name] = pad(values, (0, tokens - len(layout)), value=padding).to(device)
    fields = TokenFields(**slots)
    lists: dict[str, Any] = {}
    # The forward pass goes over the keys of a row of tiles; gradients of keys, over the queries of a column.
    for name, tiles in (("kv", partial), ("full_kv", full), ("q", partial.T), ("full_q", full.T)):
        number, index = _tile_lists(tiles)
        lists |= {f"{name}_num_blocks": number.to(device), f"{name}_indices": index.to(device)}
    return BlockMask(
        seq_lengths=(tokens, tokens),
        **lists,
        BLOCK_SIZE=(TILE, TILE),
        mask_mod=flex_mask_mod(fields, coupling, window),
    )


def _tile_lists(tiles: Bool[np.ndarray, "rows columns"]) -> tuple[Tensor, Tensor]:
    """For each row of tiles how many are set, and which come first: (1, 1, rows) and (1, 1, rows, columns)."""
    rows, columns = np.nonzero(tiles)
    number = tiles.sum(axis=1)
    index = np.zeros(tiles.shape, np.int32)
    index[rows, _counted(number)] = columns  # np.nonzero goes row by row: the k-th of a row comes k-th
    return torch.from_numpy(number.astype(np.int32))[None, None], torch.from_numpy(index)[None, None]


@dataclass(frozen=True, eq=False)
class FlexAttention:
    """Self-attention by FlexAttention, of as many queries, keys and values as its mask has.

    It has no backward pass on a CPU.
    """

    mask: BlockMask

    @property
    def length(self) -> int:
        """Tokens of the mask, padding included."""
        return self.mask.seq_lengths[0]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002
        return compiled_flex()(q, k, v, block_mask=self.mask)


@lru_cache(maxsize=1)
def compiled_flex() -> Any:
    """FlexAttention, compiled once for each length that it meets; never in the form that computes every pair."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
