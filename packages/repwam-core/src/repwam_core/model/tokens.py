"""Blocks of tokens of one modality, as columns of numbers: what the layouts in `sequence` are assembled from."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from repvitok.errors import UserError


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
