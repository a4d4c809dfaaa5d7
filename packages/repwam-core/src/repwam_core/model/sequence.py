"""The token layout: which tokens a sequence holds, in which order, and what each one is.

A document (an episode, or a piece of one) has latent frames 0 .. F. Frame 0 is the clean prefix, chunk 0; the frames
1 .. F are grouped into chunks 1 .. N. Every frame appears once clean (history) and, from chunk 1 on, once noisy (what
is predicted), so that all chunks are trained in one pass (docs/decisions/000, entries 1 and 2):

    clean, frame by frame:  video tokens, [state token], [action tokens of the transition into the frame]
    noisy, chunk by chunk:  video tokens of its frames, action tokens of its frames

Worked example, `training_layout(3, (2,), grid=(1, 1, 1), vectors=1)`: V0 | V1 A1 V2 A2 | v1 v2 a1 a2, where capitals
are clean and the bars separate the prefix, clean chunk 1 and noisy chunk 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from repvitok.runtime.errors import UserError
from torch import Tensor


class Modality(IntEnum):
    """What a token carries."""

    VIDEO = 0
    ACTION = 1
    STATE = 2


class Spans(NamedTuple):
    """Frames of a document with their chunk and its first frame, (frames,) each."""

    frame: np.ndarray
    chunk: np.ndarray
    start: np.ndarray

    def after_prefix(self) -> Spans:
        """Without frame 0, which no transition leads into."""
        keep = self.frame > 0
        return Spans(*(values[keep] for values in self))


class TokenBlock(NamedTuple):
    """A block of tokens of one modality, frame by frame, and the key that sorts it among the others."""

    columns: dict[str, np.ndarray]
    order: np.ndarray


def one_chunk(first_frame: int, frames: int, chunk: int) -> Spans:
    """`frames` frames from `first_frame` on, all of one chunk."""
    if first_frame < 0 or chunk < 0:
        raise UserError(f"expected a frame and a chunk of at least 0, got {first_frame} and {chunk}.")
    frame = np.arange(first_frame, first_frame + frames)
    return Spans(frame, np.full(frames, chunk), np.full(frames, first_frame))


def clean_tokens(
    spans: Spans, video_level: np.ndarray, side_level: int, grid: tuple[int, int, int], vectors: int, state: bool,
    action_history: bool,
) -> list[TokenBlock]:  # fmt: skip
    """Clean video, state and action tokens, sorted frame by frame: a window then cuts one contiguous range."""
    blocks = [_block(spans, Modality.VIDEO, False, video_level, grid, 1, 3 * spans.frame)]
    side = np.full(len(spans.frame), side_level)
    if state:
        blocks.append(_block(spans, Modality.STATE, False, side, (1, 1, 1), 1, 3 * spans.frame + 1))
    later = spans.after_prefix()
    if action_history and len(later.frame):
        side = side[: len(later.frame)]
        blocks.append(_block(later, Modality.ACTION, False, side, (1, 1, 1), vectors, 3 * later.frame + 2))
    return blocks


def noisy_tokens(
    spans: Spans, video_level: np.ndarray, action_level: np.ndarray, grid: tuple[int, int, int], vectors: int
) -> list[TokenBlock]:
    """Noisy video and action tokens, sorted chunk by chunk, after every clean token."""
    after_clean = 3 * (int(spans.frame.max()) + 1)
    order = after_clean + 2 * spans.chunk
    return [
        _block(spans, Modality.VIDEO, True, video_level, grid, 1, order),
        _block(spans, Modality.ACTION, True, action_level, (1, 1, 1), vectors, order + 1),
    ]


def _block(
    spans: Spans, modality: Modality, noisy: bool, level: np.ndarray, grid: tuple[int, int, int], vectors: int,
    order: np.ndarray,
) -> TokenBlock:  # fmt: skip
    """All tokens of one modality: for each frame a grid of them, or for each frame its action vectors."""
    view, row, col, vector = (axis.ravel() for axis in np.indices((*grid, vectors)))
    count, frames = len(view), len(spans.frame)
    columns = {
        "frame": spans.frame.repeat(count),
        "chunk": spans.chunk.repeat(count),
        "chunk_start": spans.start.repeat(count),
        "noisy": np.full(frames * count, noisy),
        "modality": np.full(frames * count, int(modality)),
        "view": np.tile(view, frames),
        "row": np.tile(row, frames),
        "col": np.tile(col, frames),
        "vector": np.tile(vector, frames),
        "level": level.repeat(count),
    }
    # Vector j of a stands at f - 1 + (j + 1) / a; video and state tokens, with j = 0 and a = 1, stand at f.
    columns["time"] = columns["frame"] - 1 + (columns["vector"] + 1) / vectors
    return TokenBlock(columns, order.repeat(count))


PADDING = -1
"""The document of a slot that holds no token: visible to no document."""

KEPT_LAYOUTS = 64
"""Layouts of each kind that are kept for reuse; one of 200,000 tokens takes about 40 MB."""

Run = tuple[int, int]
"""A half-open range of positions."""


class TokenFields(NamedTuple):
    """The facts about tokens that decide who sees whom (`masks.visible`), one tensor each, of any one shape."""

    document: Tensor
    chunk: Tensor
    frame: Tensor
    chunk_start: Tensor
    noisy: Tensor
    modality: Tensor


@dataclass(frozen=True, eq=False)
class LevelTable:
    """The noise levels of a sequence: every token has exactly one, `SequenceLayout.level` points into this table.

    A document with chunks 0 .. N has a level for the clean video of each chunk (history noise augmentation), one for
    all its clean actions and states, one for the noisy video and one for the noisy actions of each chunk 1 .. N.

    Attributes:
        document, chunk, modality, noisy: what the level belongs to; clean actions and states share the entry with
            modality ACTION, noisy False and the document's first chunk.
    """

    document: Int[Tensor, " levels"]
    chunk: Int[Tensor, " levels"]
    modality: Int[Tensor, " levels"]
    noisy: Bool[Tensor, " levels"]

    def __len__(self) -> int:
        return len(self.document)

    @cached_property
    def noisy_video(self) -> Int[Tensor, " chunks"]:
        """Indices of the levels of noisy video, chunk by chunk."""
        return (self.noisy & (self.modality == Modality.VIDEO)).nonzero()[:, 0]

    @cached_property
    def noisy_actions(self) -> Int[Tensor, " chunks"]:
        """Indices of the levels of noisy actions, chunk by chunk."""
        return (self.noisy & (self.modality == Modality.ACTION)).nonzero()[:, 0]

    @cached_property
    def clean_video(self) -> Int[Tensor, " chunks"]:
        """Indices of the levels of clean video, chunk by chunk, the prefix first."""
        return (~self.noisy & (self.modality == Modality.VIDEO)).nonzero()[:, 0]

    @cached_property
    def clean_side(self) -> Int[Tensor, " documents"]:
        """Indices of the levels of clean actions and states, document by document."""
        return (~self.noisy & (self.modality == Modality.ACTION)).nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """What each of the n tokens of a sequence is; shared by the whole batch, never changed, on the CPU.

    Attributes:
        document: index of the packed document.
        frame: latent frame; an action token belongs to the frame its transition leads into.
        chunk: index of the chunk within the document, 0 for the prefix.
        chunk_start: first frame of the token's chunk.
        noisy: whether the token is predicted (True) or history (False).
        modality: a `Modality`.
        view, row, col: where a video token stands; 0 for the others.
        vector: which of the action vectors of its transition an action token is; 0 for the others.
        position: rotary coordinates (frame, row, col). Vector j of the a vectors of the transition into frame f
            stands at frame f - 1 + (j + 1) / a.
        level: index into `levels`.
        levels: the noise levels.
        group: a number of tokens such that the video tokens of any frame are a whole number of such groups.
    """

    document: Int[Tensor, " n"]
    frame: Int[Tensor, " n"]
    chunk: Int[Tensor, " n"]
    chunk_start: Int[Tensor, " n"]
    noisy: Bool[Tensor, " n"]
    modality: Int[Tensor, " n"]
    view: Int[Tensor, " n"]
    row: Int[Tensor, " n"]
    col: Int[Tensor, " n"]
    vector: Int[Tensor, " n"]
    position: Float[Tensor, "n 3"]
    level: Int[Tensor, " n"]
    levels: LevelTable
    group: int

    def __len__(self) -> int:
        return len(self.document)

    @property
    def fields(self) -> TokenFields:
        """What the mask needs to know."""
        return TokenFields(self.document, self.chunk, self.frame, self.chunk_start, self.noisy, self.modality)

    @cached_property
    def video(self) -> Int[Tensor, " n_video"]:
        """Positions of the video tokens, clean and noisy: the order of `WAMInputs.video`."""
        return (self.modality == Modality.VIDEO).nonzero()[:, 0]

    @cached_property
    def actions(self) -> Int[Tensor, " n_action"]:
        """Positions of the action tokens, clean and noisy: the order of `WAMInputs.actions`."""
        return (self.modality == Modality.ACTION).nonzero()[:, 0]

    @cached_property
    def states(self) -> Int[Tensor, " n_state"]:
        """Positions of the state tokens: the order of `WAMInputs.states`."""
        return (self.modality == Modality.STATE).nonzero()[:, 0]

    @cached_property
    def noisy_video(self) -> Int[Tensor, " n_noisy_video"]:
        """Positions of the noisy video tokens: the order of the predicted video velocities."""
        return self.video[self.noisy[self.video]]

    @cached_property
    def noisy_actions(self) -> Int[Tensor, " n_noisy_action"]:
        """Positions of the noisy action tokens: the order of the predicted action velocities."""
        return self.actions[self.noisy[self.actions]]

    @cached_property
    def noisy_video_runs(self) -> list[Run]:
        """Where the noisy tokens stand among the video tokens."""
        return runs(self.noisy[self.video].nonzero()[:, 0])

    @cached_property
    def noisy_action_runs(self) -> list[Run]:
        """Where the noisy tokens stand among the action tokens."""
        return runs(self.noisy[self.actions].nonzero()[:, 0])

    @cached_property
    def document_runs(self) -> list[tuple[Run, int]]:
        """The maximal ranges of tokens of one document, in order, and which document it is."""
        borders = [0, *(self.document.diff().nonzero()[:, 0] + 1).tolist(), len(self)]
        return [((a, b), int(self.document[a])) for a, b in pairwise(borders) if b > a]

    @cached_property
    def video_stream(self) -> SequenceLayout:
        """The video tokens: the stream of the video expert."""
        return self.take(self.video)

    @cached_property
    def side_stream(self) -> SequenceLayout:
        """The action tokens, then the state tokens: the stream of the action expert."""
        return self.take(torch.cat([self.actions, self.states]))

    @cached_property
    def views(self) -> int:
        """How many cameras a frame has."""
        return int(self.view.max()) + 1 if len(self) else 0

    @cached_property
    def documents(self) -> int:
        """How many documents are packed."""
        return int(self.document.max()) + 1 if len(self) else 0

    @cached_property
    def streams(self) -> SequenceLayout:
        """The same tokens in the order the model computes in: all video, then all actions, then all states."""
        return self.take(torch.cat([self.video, self.actions, self.states]))

    def take(self, index: Int[Tensor, " m"]) -> SequenceLayout:
        """The layout of the tokens at `index`, in that order, with the same noise levels."""
        return replace(self, **{name: getattr(self, name)[index] for name in _TOKEN_FIELDS})


_TOKEN_FIELDS = tuple(item.name for item in fields(SequenceLayout) if item.name not in ("levels", "group"))


@lru_cache(maxsize=KEPT_LAYOUTS)
def training_layout(
    frames: int,
    chunk_sizes: tuple[int, ...],
    grid: tuple[int, int, int],
    vectors: int,
    *,
    state: bool = False,
    action_history: bool = True,
) -> SequenceLayout:
    """One document, clean and noisy, for teacher forcing in one pass.

    Args:
        frames: latent frames F + 1, the prefix included.
        chunk_sizes: latent frames of chunk 1, 2, ..., N; they sum to F.
        grid: views, rows and columns of a latent frame; views * rows * columns tokens.
        vectors: action vectors a per transition; 0 where the video expert predicts the actions and they have no tokens.
        state: whether a state token stands with each clean frame.
        action_history: whether clean action tokens are part of the sequence.

    Raises:
        ValueError: a size is not positive, or the chunks do not cover the frames.
    """
    _check_sizes(grid, vectors, chunk_sizes)
    if frames < 2 or sum(chunk_sizes) != frames - 1:
        raise UserError(
            f"expected chunk sizes that sum to the {frames - 1} frames after the prefix (at least one), got "
            f"{chunk_sizes}, which sum to {sum(chunk_sizes)}."
        )
    chunks = len(chunk_sizes)
    sizes = np.array((1, *chunk_sizes))
    chunk = np.repeat(np.arange(chunks + 1), sizes)
    start = np.repeat(np.cumsum(sizes) - sizes, sizes)
    frame = np.arange(frames)
    noisy_levels = [(c, m, True) for m in (Modality.VIDEO, Modality.ACTION) for c in range(1, chunks + 1)]
    clean_levels = [(c, Modality.VIDEO, False) for c in range(chunks + 1)] + [(0, Modality.ACTION, False)]
    levels = _levels(clean_levels + noisy_levels)
    spans = Spans(frame, chunk, start)
    clean = clean_tokens(spans, chunk, chunks + 1, grid, vectors, state, action_history)
    later = spans.after_prefix()
    noisy = noisy_tokens(later, later.chunk + chunks + 1, later.chunk + 2 * chunks + 1, grid, vectors)
    return _layout([*clean, *noisy], levels, grid)


@lru_cache(maxsize=KEPT_LAYOUTS)
def history_layout(
    first_frame: int,
    frames: int,
    chunk: int,
    grid: tuple[int, int, int],
    vectors: int,
    *,
    state: bool = False,
    action_history: bool = True,
) -> SequenceLayout:
    """One clean chunk: `frames` observed frames from `first_frame` on. Frame 0 has no transition into it.

    Its levels are clean video (0) and clean actions and states (1).
    """
    _check_sizes(grid, vectors, (frames,))
    spans = one_chunk(first_frame, frames, chunk)
    tokens = clean_tokens(spans, np.zeros(frames, int), 1, grid, vectors, state, action_history)
    return _layout(tokens, _levels([(chunk, Modality.VIDEO, False), (chunk, Modality.ACTION, False)]), grid)


@lru_cache(maxsize=KEPT_LAYOUTS)
def chunk_layout(
    first_frame: int,
    frames: int,
    chunk: int,
    grid: tuple[int, int, int],
    vectors: int,
    *,
    video: bool = True,
    actions: bool = True,
) -> SequenceLayout:
    """One noisy chunk: what is to be predicted, `frames` frames from `first_frame` on, or one modality of it.

    Its levels are noisy video (0) and noisy actions (1).
    """
    _check_sizes(grid, vectors, (frames,))
    spans = one_chunk(first_frame, frames, chunk)
    zeros = np.zeros(frames, int)
    tokens = noisy_tokens(spans, zeros, zeros + 1, grid, vectors)[0 if video else 1 : 2 if actions else 1]
    return _layout(tokens, _levels([(chunk, Modality.VIDEO, True), (chunk, Modality.ACTION, True)]), grid)


def concat(layouts: Sequence[SequenceLayout]) -> SequenceLayout:
    """Pack documents one after the other; documents and levels are renumbered, nothing else changes.

    Raises:
        ValueError: no layout.
    """
    if not layouts:
        raise UserError("expected at least one layout to pack, got none.")
    documents = np.cumsum([0] + [layout.documents for layout in layouts])
    offsets = np.cumsum([0] + [len(layout.levels) for layout in layouts])
    moved = [
        replace(layout, document=layout.document + int(document), level=layout.level + int(offset))
        for layout, document, offset in zip(layouts, documents, offsets, strict=False)
    ]
    tables = [
        replace(layout.levels, document=layout.levels.document + int(document))
        for layout, document in zip(layouts, documents, strict=False)
    ]
    levels = LevelTable(*(torch.cat([getattr(table, item.name) for table in tables]) for item in fields(LevelTable)))
    tokens = {name: torch.cat([getattr(layout, name) for layout in moved]) for name in _TOKEN_FIELDS}
    return SequenceLayout(**tokens, levels=levels, group=math.gcd(*(layout.group for layout in layouts)))


def runs(index: Int[Tensor, " m"]) -> list[Run]:
    """The maximal ranges of consecutive numbers in an increasing index: [2, 3, 4, 8] -> [(2, 5), (8, 9)]."""
    if not len(index):
        return []
    values = index.cpu().numpy()
    breaks = np.flatnonzero(np.diff(values) != 1) + 1
    bounds = [0, *breaks.tolist(), len(values)]
    return [(int(values[a]), int(values[b - 1]) + 1) for a, b in pairwise(bounds)]


def _layout(blocks: Sequence[TokenBlock], levels: LevelTable, grid: tuple[int, int, int]) -> SequenceLayout:
    order = np.argsort(np.concatenate([block.order for block in blocks]), kind="stable")
    columns = {name: np.concatenate([block.columns[name] for block in blocks])[order] for name in blocks[0].columns}
    position = np.stack([columns.pop("time"), columns["row"], columns["col"]], axis=1).astype(np.float32)
    return SequenceLayout(
        document=torch.zeros(len(order), dtype=torch.long),
        position=torch.from_numpy(position),
        levels=levels,
        group=math.prod(grid),
        **{name: torch.from_numpy(values) for name, values in columns.items()},
    )


def _levels(entries: Sequence[tuple[int, Modality, bool]]) -> LevelTable:
    chunk, modality, noisy = zip(*entries, strict=True)
    return LevelTable(
        document=torch.zeros(len(entries), dtype=torch.long),
        chunk=torch.tensor(chunk),
        modality=torch.tensor([int(value) for value in modality]),
        noisy=torch.tensor(noisy),
    )


def _check_sizes(grid: tuple[int, int, int], vectors: int, chunk_sizes: tuple[int, ...]) -> None:
    if len(grid) != 3 or min(grid) < 1:
        raise UserError(f"grid: expected (views, rows, columns), each at least 1, got {grid}.")
    if vectors < 0:
        raise UserError(f"vectors: expected a number of action vectors per transition, got {vectors}.")
    if not chunk_sizes or min(chunk_sizes) < 1:
        raise UserError(f"expected chunks of at least one latent frame, got {chunk_sizes}.")
