"""The token layout: what each token of a sequence is, its tensors on a device, and the inputs that it explains.

A document (an episode, or a piece of one) has latent frames 0 .. F. Frame 0 is the clean prefix, chunk 0; the frames
1 .. F are grouped into chunks 1 .. N. Every frame appears once clean (history) and, from chunk 1 on, once noisy (what
is predicted), so that all chunks are trained in one pass (docs/decisions/000, entries 1 and 2):

    clean, frame by frame:  video tokens, [state token], [action tokens of the transition into the frame]
    noisy, chunk by chunk:  video tokens of its frames, action tokens of its frames

Worked example, `training_layout(3, (2,), grid=(1, 1, 1), vectors=1)`: V0 | V1 A1 V2 A2 | v1 v2 a1 a2, where capitals
are clean and the bars separate the prefix, clean chunk 1 and noisy chunk 1.

`TokenLayout` is index arrays on the CPU, for one document or for many in one sequence; `LayoutTensors` is what a pass
of the model needs of it, on a device. Nothing in either is a list of documents: a document is a number of each token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from repvitok.nn.attention import axis_pairs
from repvitok.runtime.errors import UserError
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from repwam_core.model.config import LATENT_SPACE, WAMConfig

PADDING = -1
"""The document of a slot that holds no token: visible to no document."""
KEPT_LAYOUTS = 64
"""Layouts of each kind that are kept for reuse; one of 200,000 tokens takes about 40 MB."""
PIECE = 2048
"""Tokens of a document that attend to its instruction by themselves: the backward pass has little else to divide."""
Made = TypeVar("Made")
Heads = Float[Tensor, "b n heads c"]


class Modality(IntEnum):
    """What a token carries."""

    VIDEO = 0
    ACTION = 1
    STATE = 2


class TokenFields(NamedTuple):
    """The facts about tokens that decide who sees whom (`attention.visible`), one tensor each, of any one shape."""

    document: Tensor
    chunk: Tensor
    frame: Tensor
    chunk_start: Tensor
    noisy: Tensor
    modality: Tensor


@dataclass(frozen=True, eq=False)
class NoiseLevels:
    """The noise levels of a sequence: every token has exactly one, `TokenLayout.level` points into this table.

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
    def clean_video(self) -> Int[Tensor, " chunks"]:
        """Indices of the levels of clean video, chunk by chunk, the prefix first."""
        return (~self.noisy & (self.modality == Modality.VIDEO)).nonzero()[:, 0]

    @cached_property
    def noisy_video(self) -> Int[Tensor, " chunks"]:
        """Indices of the levels of noisy video, chunk by chunk."""
        return (self.noisy & (self.modality == Modality.VIDEO)).nonzero()[:, 0]

    @cached_property
    def noisy_actions(self) -> Int[Tensor, " chunks"]:
        """Indices of the levels of noisy actions, chunk by chunk."""
        return (self.noisy & (self.modality == Modality.ACTION)).nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class TokenLayout:
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
        room: tokens that attention makes room for at least: layouts of many lengths then need one compiled kernel.
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
    levels: NoiseLevels
    group: int
    room: int = 0

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
    def side_order(self) -> Int[Tensor, " n_side"]:
        """The action expert's tokens document by document, as places among all actions, then all states."""
        # stable: inside of a document actions keep their order and stand before its states, as they did in the cat
        return self.document[torch.cat([self.actions, self.states])].argsort(stable=True)

    @cached_property
    def noisy_video(self) -> Int[Tensor, " n_noisy_video"]:
        """Positions of the noisy video tokens: the order of the predicted video velocities."""
        return self.video[self.noisy[self.video]]  # of the places of video tokens, those that are noisy

    @cached_property
    def noisy_actions(self) -> Int[Tensor, " n_noisy_action"]:
        """Positions of the noisy action tokens: the order of the predicted action velocities."""
        return self.actions[self.noisy[self.actions]]

    @cached_property
    def views(self) -> int:
        """How many cameras a frame has."""
        return int(self.view.max()) + 1 if len(self) else 0

    @cached_property
    def documents(self) -> int:
        """How many documents are packed, also where only some of their tokens were taken."""
        return int(self.levels.document.max()) + 1 if len(self.levels) else 0

    @cached_property
    def streams(self) -> TokenLayout:
        """The same tokens in the order the model computes in: all video, then actions and states of each document."""
        return self.take(torch.cat([self.video, torch.cat([self.actions, self.states])[self.side_order]]))

    def take(self, index: Int[Tensor, " m"]) -> TokenLayout:
        """The layout of the tokens at `index`, in that order, with the same noise levels."""
        return replace(self, **{name: getattr(self, name)[index] for name in _TOKEN_FIELDS})

    def once(self, make: Callable[..., Made], *arguments: Any) -> Made:
        """`make(self, *arguments)`, made once and kept as long as this layout is.

        Layouts of segments are kept (`training_layout`), and so is what they need in every step; a packed sequence's
        goes with it.
        """
        if (make, arguments) not in self._made:
            self._made[make, arguments] = make(self, *arguments)
        return self._made[make, arguments]

    @cached_property
    def _made(self) -> dict[tuple[Callable[..., Any], tuple[Any, ...]], Any]:
        return {}


_TOKEN_FIELDS = tuple(item.name for item in fields(TokenLayout) if item.name not in ("levels", "group", "room"))

Columns = dict[str, np.ndarray]
"""The fields of some tokens, and `order`, which sorts them among others."""


def _tokens(
    frames: Int[np.ndarray, "3 frames"], modality: Modality, noisy: bool, level: np.ndarray, order: np.ndarray,
    grid: tuple[int, int, int] = (1, 1, 1), vectors: int = 1,
) -> Columns:  # fmt: skip
    """All tokens of one modality: for each frame a grid of them, or for each frame its action vectors.

    `frames` holds each frame, its chunk and its chunk's first frame; `level` and `order` are of frames too.
    """
    frame, chunk, start = frames
    # (tokens of a frame,) each: the last axis runs fastest, so tokens come by view, row, column, vector.
    view, row, col, vector = (axis.ravel() for axis in np.indices((*grid, vectors)))
    of_frame = {"frame": frame, "chunk": chunk, "chunk_start": start, "level": level, "order": order}
    in_frame = {"view": view, "row": row, "col": col, "vector": vector}
    # Frames x tokens as one axis: what is of a frame is repeated token by token, what is of a token frame by frame.
    columns = {name: values.repeat(len(view)) for name, values in of_frame.items()}
    columns |= {name: np.tile(values, len(frame)) for name, values in in_frame.items()}
    columns["noisy"] = np.full(len(columns["frame"]), noisy)
    columns["modality"] = np.full(len(columns["frame"]), int(modality))
    # Vector j of a stands at f - 1 + (j + 1) / a; video and state tokens, with j = 0 and a = 1, stand at f.
    columns["time"] = columns["frame"] - 1 + (columns["vector"] + 1) / vectors
    return columns


def _clean(
    frames: Int[np.ndarray, "3 frames"], video_level: np.ndarray, side_level: int, grid: tuple[int, int, int],
    vectors: int, state: bool, action_history: bool,
) -> list[Columns]:  # fmt: skip
    """Clean video, state and action tokens, sorted frame by frame: a window then cuts one contiguous range."""
    later = frames[:, frames[0] > 0]  # no transition leads into frame 0
    # Three places for each frame: 3 f video, 3 f + 1 state, 3 f + 2 the actions of the transition into it.
    tokens = [_tokens(frames, Modality.VIDEO, False, video_level, 3 * frames[0], grid)]
    if state:
        level = np.full(frames.shape[1], side_level)
        tokens.append(_tokens(frames, Modality.STATE, False, level, 3 * frames[0] + 1))
    if action_history:
        level = np.full(later.shape[1], side_level)
        tokens.append(_tokens(later, Modality.ACTION, False, level, 3 * later[0] + 2, vectors=vectors))
    return tokens


def _noisy(
    frames: Int[np.ndarray, "3 frames"], video_level: np.ndarray, action_level: np.ndarray,
    grid: tuple[int, int, int], vectors: int,
) -> list[Columns]:  # fmt: skip
    """Noisy video and action tokens, sorted chunk by chunk, after every clean token."""
    frame, chunk, _ = frames
    order = 3 * (int(frame.max()) + 1) + 2 * chunk  # behind the last clean frame's places; video, then actions
    return [
        _tokens(frames, Modality.VIDEO, True, video_level, order, grid),
        _tokens(frames, Modality.ACTION, True, action_level, order + 1, vectors=vectors),
    ]


def _layout(
    tokens: Sequence[Columns], levels: Sequence[tuple[int, Modality, bool]], grid: tuple[int, int, int]
) -> TokenLayout:
    """One document of these tokens, whose noise levels are of these chunks and modalities, noisy or not."""
    columns = {name: np.concatenate([part[name] for part in tokens]) for name in tokens[0]}
    order = np.argsort(columns.pop("order"), kind="stable")  # tokens of one place stay as `_tokens` made them
    columns = {name: values[order] for name, values in columns.items()}
    position = np.stack([columns.pop("time"), columns["row"], columns["col"]], axis=1).astype(np.float32)
    chunk, modality, is_noisy = torch.tensor(levels, dtype=torch.long).unbind(1)
    return TokenLayout(
        document=torch.zeros(len(order), dtype=torch.long),
        position=torch.from_numpy(position),
        levels=NoiseLevels(torch.zeros_like(chunk), chunk, modality, is_noisy.bool()),
        group=math.prod(grid),
        room=0,
        **{name: torch.from_numpy(values) for name, values in columns.items()},
    )


@lru_cache(maxsize=KEPT_LAYOUTS)
def training_layout(
    frames: int,
    chunk_sizes: tuple[int, ...],
    grid: tuple[int, int, int],
    vectors: int,
    *,
    state: bool = False,
    action_history: bool = True,
    vector_levels: bool = False,
) -> TokenLayout:
    """One document, clean and noisy, for teacher forcing in one pass.

    Args:
        frames: latent frames F + 1, the prefix included.
        chunk_sizes: latent frames of chunk 1, 2, ..., N; they sum to F.
        grid: views, rows and columns of a latent frame; views * rows * columns tokens.
        vectors: action vectors a per transition; 0 where the video expert predicts the actions and they have no tokens.
        state: whether a state token stands with each clean frame.
        action_history: whether clean action tokens are part of the sequence.
        vector_levels: whether every noisy action vector has a noise level of its own, in place of one for each chunk.
    """
    _check_sizes(grid, vectors, chunk_sizes)
    if frames < 2 or sum(chunk_sizes) != frames - 1:
        raise UserError(
            f"expected chunk sizes that sum to the {frames - 1} frames after the prefix (at least one), got "
            f"{chunk_sizes}, which sum to {sum(chunk_sizes)}."
        )
    chunks, sizes = len(chunk_sizes), np.array((1, *chunk_sizes))
    chunk = np.repeat(np.arange(chunks + 1), sizes)
    # (3, frames): number, chunk and first frame of the chunk, which is the sum of the sizes before it
    every = np.stack([np.arange(frames), chunk, np.repeat(np.cumsum(sizes) - sizes, sizes)])
    # Levels: clean video of chunks 0 .. N, clean actions and states, noisy video and noisy actions of chunks 1 .. N.
    levels = [(c, Modality.VIDEO, False) for c in range(chunks + 1)] + [(0, Modality.ACTION, False)]
    levels += [(c, Modality.VIDEO, True) for c in range(1, chunks + 1)]
    of_actions = chunk[1:].repeat(vectors) if vector_levels else range(1, chunks + 1)
    levels += [(int(c), Modality.ACTION, True) for c in of_actions]
    # With N chunks: clean video of chunk c is level c, the clean side N + 1, noisy video N + 1 + c, noisy actions
    # 2 N + 1 + c, or from 2 N + 2 on one vector after the other.
    clean = _clean(every, chunk, chunks + 1, grid, vectors, state, action_history)
    noisy = _noisy(every[:, 1:], chunk[1:] + chunks + 1, chunk[1:] + 2 * chunks + 1, grid, vectors)
    if vector_levels:
        noisy[1]["level"] = 2 * chunks + 2 + np.arange((frames - 1) * vectors)
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
) -> TokenLayout:
    """One clean chunk: `frames` observed frames from `first_frame` on. Frame 0 has no transition into it.

    Its levels are clean video (0) and clean actions and states (1).
    """
    every = _one_chunk(first_frame, frames, chunk, grid, vectors)
    tokens = _clean(every, np.zeros(frames, int), 1, grid, vectors, state, action_history)
    return _layout(tokens, [(chunk, Modality.VIDEO, False), (chunk, Modality.ACTION, False)], grid)


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
    committed: int = 0,
) -> TokenLayout:
    """One noisy chunk: what is to be predicted, `frames` frames from `first_frame` on, or one modality of it.

    Its levels are noisy video (0), noisy actions (1) and, where so many first vectors are `committed`, these (2).
    """
    every = _one_chunk(first_frame, frames, chunk, grid, vectors)
    of_video, of_actions = _noisy(every, np.zeros(frames, int), np.ones(frames, int), grid, vectors)
    of_actions["level"][:committed] = 2
    tokens = [of_video] * video + [of_actions] * actions
    levels = [(chunk, Modality.VIDEO, True), (chunk, Modality.ACTION, True), (chunk, Modality.ACTION, True)]
    return _layout(tokens, levels if committed else levels[:2], grid)


def _one_chunk(
    first_frame: int, frames: int, chunk: int, grid: tuple[int, int, int], vectors: int
) -> Int[np.ndarray, "3 frames"]:
    """`frames` frames from `first_frame` on, all of one chunk, as `_tokens` takes them."""
    _check_sizes(grid, vectors, (frames,))
    if first_frame < 0 or chunk < 0:
        raise UserError(f"expected a frame and a chunk of at least 0, got {first_frame} and {chunk}.")
    return np.stack([first_frame + np.arange(frames), np.full(frames, chunk), np.full(frames, first_frame)])


def concat(layouts: Sequence[TokenLayout]) -> TokenLayout:
    """Pack documents one after the other; documents and levels are renumbered, nothing else changes."""
    if not layouts:
        raise UserError("expected at least one layout to pack, got none.")
    if len(layouts) == 1:
        return layouts[0]
    # What comes before each document: its first token, level and document in the whole, added to its own numbers.
    counts = torch.tensor([(len(layout), len(layout.levels), layout.documents) for layout in layouts])
    tokens, levels, _ = counts.unbind(1)
    _, first_level, first_document = (counts.cumsum(0) - counts).unbind(1)
    whole = {name: torch.cat([getattr(layout, name) for layout in layouts]) for name in _TOKEN_FIELDS}
    whole["document"] += first_document.repeat_interleave(tokens)
    whole["level"] += first_level.repeat_interleave(tokens)
    names = [item.name for item in fields(NoiseLevels)]
    table = {name: torch.cat([getattr(layout.levels, name) for layout in layouts]) for name in names}
    table["document"] += first_document.repeat_interleave(levels)
    group = math.gcd(*(layout.group for layout in layouts))
    return TokenLayout(**whole, levels=NoiseLevels(**table), group=group, room=0)


@dataclass(frozen=True, eq=False)
class AheadTokens:
    """What one look-ahead layer predicts: noisy tokens that have a token at their place in the chunk before.

    Attributes:
        layout: these tokens, in `streams` order.
        video, actions: which of the noisy video and action tokens of the whole layout they are.
        video_before, actions_before: for each of them the token at its place in the chunk before, counted among the
            tokens of the layer before: the first layer's are all noisy tokens.
        asked: whether anything is to be learned. A layer that has nothing to predict gets some frame with itself
            before it, so that all ranks run all layers.
    """

    layout: TokenLayout
    video: Int[Tensor, " m_video"]
    actions: Int[Tensor, " m_action"]
    video_before: Int[Tensor, " m_video"]
    actions_before: Int[Tensor, " m_action"]
    asked: bool


def look_ahead_tokens(layout: TokenLayout, layers: int) -> tuple[AheadTokens, ...]:
    """The tokens of look-ahead layers 1, 2, ...: layer k predicts chunk c + k from what was made of chunk c.

    With chunks 1 2 3 of one document layer 1 has the tokens of 2 3, layer 2 those of 3. Nothing is asked beyond the
    last chunk of a document, nor at places that one of the chunks before does not have.
    """
    streams, videos = layout.streams, len(layout.noisy_video)
    here = streams.take(streams.noisy.nonzero()[:, 0])  # what the layer before has: all video, then all actions
    here = replace(here, room=len(here))
    number = torch.arange(len(here))  # of each of its tokens, among all noisy ones
    steps = []
    for _ in range(layers):
        place, before = _chunk_before(here)
        if not (asked := len(place) > 0):
            place = before = ((here.document == here.document[0]) & (here.frame == here.frame[0])).nonzero()[:, 0]
        is_video, videos_before = here.modality[place] == Modality.VIDEO, len(here.video)
        here, number = here.take(place), number[place]
        steps.append(
            AheadTokens(
                layout=here,
                video=number[is_video],
                actions=number[~is_video] - videos,
                video_before=before[is_video],
                actions_before=before[~is_video] - videos_before,
                asked=asked,
            )
        )
    return tuple(steps)


def _chunk_before(noisy: TokenLayout) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Those of some noisy tokens that have one at their place in the chunk before, and these."""
    names = ("modality", "document", "chunk", "offset", "view", "row", "col", "vector")
    fields_of = {name: getattr(noisy, name) for name in names if name != "offset"}
    fields_of["offset"] = noisy.frame - noisy.chunk_start
    columns = np.stack([fields_of[name].numpy() for name in names])
    sizes = columns.max(1, initial=0) + 1
    key = np.asarray(np.ravel_multi_index(tuple(columns), tuple(sizes)))  # one number for each token's place
    wanted = key - math.prod(sizes[3:].tolist())  # the same place with the number of its chunk one less
    order = key.argsort()
    found = np.searchsorted(key, wanted, sorter=order).clip(max=max(len(key) - 1, 0))
    matches = np.flatnonzero(key[order[found]] == wanted)
    return torch.from_numpy(matches), torch.from_numpy(order[found[matches]])


def _check_sizes(grid: tuple[int, int, int], vectors: int, chunk_sizes: tuple[int, ...]) -> None:
    if len(grid) != 3 or min(grid) < 1:
        raise UserError(f"grid: expected (views, rows, columns), each at least 1, got {grid}.")
    if vectors < 0:
        raise UserError(f"vectors: expected a number of action vectors per transition, got {vectors}.")
    if not chunk_sizes or min(chunk_sizes) < 1:
        raise UserError(f"expected chunks of at least one latent frame, got {chunk_sizes}.")


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The values on a device; a GPU fetches them when it comes to it, and nobody waits for that."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values).to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Buckets:
    """Blocks of queries that see the same keys, those of one shape together: what attention computes without a mask.

    Attributes:
        queries, keys: for each shape the tokens of its g blocks, (g, m) and (g, k).
        place: where each of the n tokens stands among all queries, bucket after bucket.
    """

    queries: list[Int[Tensor, "_ _"]]
    keys: list[Int[Tensor, "_ _"]]
    place: Int[Tensor, " n"]

    @classmethod
    def of(cls, blocks: Sequence[tuple[np.ndarray, np.ndarray]], device: torch.device | str) -> Buckets:
        """Sort blocks by shape; each of n tokens is a query of one block."""
        by_shape: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {}
        for queries, keys in blocks:
            by_shape.setdefault((len(queries), len(keys)), []).append((queries, keys))
        queries = [torch.from_numpy(np.stack([block[0] for block in same])) for same in by_shape.values()]
        keys = [torch.from_numpy(np.stack([block[1] for block in same])) for same in by_shape.values()]
        # Outputs come bucket after bucket; a permutation's argsort is its inverse, which puts them in token order.
        place = torch.cat([index.flatten() for index in queries]).argsort()
        return cls([index.to(device) for index in queries], [index.to(device) for index in keys], place.to(device))

    def attend(
        self, q: Heads, k: Float[Tensor, "b m *s heads c"], v: Float[Tensor, "b m *s heads c"],
        mask: Bool[Tensor, "b m s"] | None = None,
    ) -> Heads:  # fmt: skip
        """Softmax attention of each block's queries to its keys: one call for each shape, however many blocks.

        Args:
            q: queries of n tokens.
            k, v: keys and values of m tokens, or of s tokens of each of m instructions.
            mask: which of an instruction's tokens are real.
        """
        outputs = []
        for queries, keys in zip(self.queries, self.keys, strict=True):
            parts = []
            for x, index in ((q, queries), (k, keys), (v, keys)):
                # (b, n, heads, c) -> (b, g, m, heads, c) -> (b g, heads, m, c): each block is an entry of the batch;
                # of instructions (b, m, s, heads, c) all s tokens of the block's are its keys.
                picked = x.index_select(1, index.flatten()).unflatten(1, index.shape).flatten(0, 1)
                parts.append(picked.flatten(1, -3).transpose(1, 2))
            seen = None if mask is None else mask.index_select(1, keys.flatten()).flatten(0, 1)[:, None, None]
            output = scaled_dot_product_attention(*parts, attn_mask=seen).transpose(1, 2)
            outputs.append(output.unflatten(0, (-1, len(queries))).flatten(1, 2))
        return torch.cat(outputs, dim=1).index_select(1, self.place)


@dataclass(frozen=True, eq=False)
class StreamTensors:
    """One expert's tokens in a pass.

    Attributes:
        level: noise level of each group of consecutive tokens.
        noisy: which of the tokens are predicted.
        noisy_level: noise level of each group of these.
        borders: first token of each piece of a document, and the number of all; see `PIECE`.
        document: whose piece each is.
        longest: tokens of the longest piece.
        documents: the tokens of each document (queries) and the places of its instruction (keys), by the number of
            tokens; None where all documents have as many, one after the other.
    """

    level: Int[Tensor, " groups"]
    noisy: Int[Tensor, " n_noisy"]
    noisy_level: Int[Tensor, " noisy_groups"]
    borders: Int[Tensor, " borders"]
    document: Int[Tensor, " pieces"]
    longest: int
    documents: Buckets | None


@dataclass(frozen=True, eq=False)
class LayoutTensors:
    """What a pass of the model needs of a layout, on a device; video tokens stand before the action expert's.

    Attributes:
        view: camera of each video token.
        vector: which of its transition's action vectors each action token is.
        cos, sin: rotary table of the turn (a, b) -> (a cos - b sin, b cos + a sin) of the channel halves a and b:
            x cos + swap(x) sin, where swap exchanges the halves and `sin` is negative for the first.
        side_order: see `TokenLayout.side_order`; None where it changes nothing.
        video, side: the streams of the experts.
    """

    view: Int[Tensor, " n_video"]
    vector: Int[Tensor, " n_action"]
    cos: Float[Tensor, "n 1 c"]
    sin: Float[Tensor, "n 1 c"]
    side_order: Int[Tensor, " n_side"] | None
    video: StreamTensors
    side: StreamTensors


def layout_tensors(layout: TokenLayout, head_dim: int, rope_base: float, device: torch.device | str) -> LayoutTensors:
    """The tensors of a layout; `layout.once(layout_tensors, ...)` where many passes share it."""
    streams, videos, order = layout.streams, len(layout.video), layout.side_order
    angles = [  # in float64, so that frames may grow
        torch.outer(streams.position[:, axis].double(), rope_base ** -(torch.arange(pairs).double() / pairs))
        for axis, pairs in enumerate(axis_pairs(head_dim))
    ]
    table = torch.cat(angles, dim=-1)[:, None]  # (n, 1, c / 2): one angle for each pair of channels, for all heads
    cos, sin = table.cos().float(), table.sin().float()

    def stream(start: int, stop: int, group: int) -> StreamTensors:
        """The tensors of the tokens start .. stop, of which each `group` consecutive ones share a noise level."""
        level, document = streams.level[start:stop], streams.document[start:stop]
        noisy = streams.noisy[start:stop].nonzero()[:, 0]
        tokens = torch.bincount(document, minlength=layout.documents)  # how many each document has here
        # Pieces of PIECE tokens, the last with the rest; a document without tokens in this stream has one of none.
        counts = (tokens + PIECE - 1).clamp(min=PIECE) // PIECE
        pieces = torch.full((int(counts.sum()),), PIECE)
        pieces[counts.cumsum(0) - 1] = tokens - PIECE * (counts - 1)  # counts.cumsum - 1: each document's last piece
        parts = torch.arange(stop - start).split(tokens.tolist())
        blocks = [(part.numpy(), np.array([number])) for number, part in enumerate(parts) if len(part)]
        return StreamTensors(
            level=level[::group].to(device),  # all tokens of a group have one level: its first one's
            noisy=noisy.to(device),
            noisy_level=level[noisy][::group].to(device),
            borders=pad(pieces.cumsum(0), (1, 0)).int().to(device),
            document=torch.arange(len(tokens)).repeat_interleave(counts).to(device),
            longest=int(pieces.max()) if len(pieces) else 0,
            documents=None if bool((tokens == tokens[:1]).all()) else Buckets.of(blocks, device),
        )

    return LayoutTensors(
        view=layout.view[layout.video].to(device),
        vector=layout.vector[layout.actions].to(device),
        cos=torch.cat([cos, cos], dim=-1).to(device),
        sin=torch.cat([-sin, sin], dim=-1).to(device),
        side_order=None if torch.equal(order, torch.arange(len(order))) else order.to(device),
        video=stream(0, videos, layout.group),
        side=stream(videos, len(layout), 1),
    )


@dataclass(frozen=True, eq=False)
class WAMInputs:
    """A batch of sequences of one layout.

    Attributes:
        layout: what each token is.
        video: standardised latents of the video tokens, clean and noisy, in the layout's order; the noisy ones already
            stand on the path of `flow.interpolate`.
        actions: normalised action vectors of the action tokens, clean and noisy alike, in the layout's order.
        states: normalised robot states of the state tokens; None where the layout holds none.
        times: noise time t of each entry of `layout.levels`, in [0, 1]; 1 for clean tokens, or less where the history
            is lightly noised.
        text: token-level hidden states of each document's instruction.
        text_mask: which of them are real; a document without any is unconditional.
        space: name of the action space.
    """

    layout: TokenLayout
    video: Float[Tensor, "b n_video d"]
    actions: Float[Tensor, "b n_action c"]
    states: Float[Tensor, "b n_state state"] | None
    times: Float[Tensor, "b levels"]
    text: Float[Tensor, "b documents s width"]
    text_mask: Bool[Tensor, "b documents s"]
    space: str = LATENT_SPACE

    def check(self, config: WAMConfig) -> None:
        """Hold the tensors against the layout and the model."""
        layout, space = self.layout, config.space(self.space)
        b = self.video.shape[0]
        _require_shape("video", self.video, (b, len(layout.video), config.latent_dim + config.joint_actions))
        _require_shape("actions", self.actions, (b, len(layout.actions), space.channels))
        _require_shape("times", self.times, (b, len(layout.levels)))
        _require_shape("text", self.text, (b, layout.documents, self.text_mask.shape[-1], config.text_dim))
        _require_shape("text_mask", self.text_mask, (b, layout.documents, self.text.shape[-2]))
        if self.states is not None:
            _require_shape("states", self.states, (b, len(layout.states), space.state_channels))
        elif len(layout.states):
            raise UserError(f"states: the layout holds {len(layout.states)} state tokens, but no states were given.")


@dataclass(frozen=True, eq=False)
class Velocities:
    """Predicted velocities (data - noise) of the noisy tokens.

    Attributes:
        video: in the order of `layout.noisy_video`.
        actions: in the order of `layout.noisy_actions`.
        ahead: of the tokens of each look-ahead layer that ran, in the order of its `AheadTokens`.
    """

    video: Float[Tensor, "b n_noisy_video d"]
    actions: Float[Tensor, "b n_noisy_action c"]
    ahead: tuple[Velocities, ...] = ()


def document_inputs(
    layout: TokenLayout,
    *,
    latents: Float[Tensor, "b *frames_tokens d"],
    noisy_latents: Float[Tensor, "b *transitions_tokens d"],
    actions: Float[Tensor, "b transitions a c"],
    noisy_actions: Float[Tensor, "b transitions a c"],
    states: Float[Tensor, "b frames state"] | None,
    times: Float[Tensor, "b levels"],
    text: Float[Tensor, "b *documents s width"],
    text_mask: Bool[Tensor, "b *documents s"],
    space: str = LATENT_SPACE,
) -> WAMInputs:
    """Lay tensors out as `training_layout`, or `concat` of several, orders its tokens.

    What is of frames, of transitions or of their tokens runs over one document after the other. For one document an
    axis of documents may be left out, and latents may have one axis of frames and one of tokens.

    Args:
        layout: what the tokens are.
        latents: clean latents of frames 0 .. F.
        noisy_latents: latents of frames 1 .. F on the path.
        actions: clean actions of the transitions into frames 1 .. F; unused where the layout has no action history.
        noisy_actions: the same on the path.
        states: robot state at each frame; unused where the layout holds no state tokens.
        times: one noise time per level of the layout.
        text, text_mask: the instructions.
        space: name of the action space.
    """
    has_history = len(layout.actions) > len(layout.noisy_actions)
    of_video = [latents.flatten(1, -2), noisy_latents.flatten(1, -2)]
    of_actions = [actions.flatten(1, 2)] * has_history + [noisy_actions.flatten(1, 2)]
    b, documents = len(times), layout.documents
    return WAMInputs(
        layout=layout,
        video=_in_order(torch.cat(of_video, dim=1), layout.noisy[layout.video]),
        actions=_in_order(torch.cat(of_actions, dim=1), layout.noisy[layout.actions]),
        states=states if len(layout.states) else None,
        times=times,
        text=text.reshape(b, documents, *text.shape[-2:]),
        text_mask=text_mask.reshape(b, documents, text_mask.shape[-1]),
        space=space,
    )


def _in_order(values: Float[Tensor, "b n d"], noisy: Bool[Tensor, " n"]) -> Float[Tensor, "b n d"]:
    """Values of all clean tokens, then of all noisy ones, in the order in which these alternate in `noisy`.

    The one document's own order is that already: [clean 0, noisy 0]; of two it is [clean 0, noisy 0, clean 1, noisy 1].
    """
    order = noisy.long().argsort(stable=True)  # where each value goes
    if torch.equal(order, torch.arange(len(order))):
        return values
    return values.index_select(1, order.argsort().to(values.device))


def _require_shape(name: str, values: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(values.shape) != expected:
        raise UserError(f"{name}: the layout and the model expect shape {expected}, got {tuple(values.shape)}.")
