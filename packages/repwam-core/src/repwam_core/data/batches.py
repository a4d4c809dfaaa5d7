"""What one training step of the world action model is given: segments of one shape, or episodes packed in one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class SegmentBatch:
    """Segments as the world action model trains on them.

    Attributes:
        latents: standardised latents, (b, frames, tokens, d).
        actions: scaled actions of each transition, (b, frames - 1, a, c).
        state: standardised robot state at each latent frame, (b, frames, S), or None.
        text: hidden states of the instruction, (b, s, D).
        text_mask: which of them are real tokens, (b, s).
        valid: which transitions are real; padding of a short episode is False and costs nothing, (b, frames - 1).
        channel_mask: which action channels the embodiment has, (b, c).
        episode: the row of the store that each segment is from, (b,).
        start: first latent frame of each segment in its episode, (b,).
        data_set: which of the run's data sets the segments are from.
        reference: what each transition's actions are measured from, in their scale, (b, frames - 1, c): the state at
            its first frame. None where actions are learned as recorded, or measured from their chunks' first frames.
    """

    latents: Float[Tensor, "b frames tokens d"]
    actions: Float[Tensor, "b transitions a c"]
    state: Float[Tensor, "b frames S"] | None
    text: Float[Tensor, "b s D"]
    text_mask: Bool[Tensor, "b s"]
    valid: Bool[Tensor, "b transitions"]
    channel_mask: Bool[Tensor, "b c"]
    episode: Int[Tensor, " b"]
    start: Int[Tensor, " b"]
    data_set: int = 0
    reference: Float[Tensor, "b transitions c"] | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SegmentBatch:
        """Return the batch on `device`."""

        def moved(value: Any) -> Any:
            return value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value

        return SegmentBatch(**{name: moved(value) for name, value in vars(self).items()})


class Piece(NamedTuple):
    """A document to be: consecutive transitions of an episode, most often all of them.

    `visit` counts how often the data set has been gone through, so that draws that depend on a piece differ each time.
    """

    data_set: int
    episode: int
    start: int
    transitions: int
    visit: int


@dataclass(frozen=True, eq=False)
class Document:
    """One episode, or piece of one, of a packed sequence.

    Attributes:
        segment: its tensors, batch size one.
        grid: (views, h, w) of its latent frames.
        piece: what it is; draws that depend on it alone are the same wherever it is packed.
    """

    segment: SegmentBatch
    grid: tuple[int, int, int]
    piece: Piece


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One sequence of a training step.

    Attributes:
        index: number of the sequence in the stream of all ranks.
        documents: what is packed.
        tokens: how many tokens they have.
        token_budget: how many there could be.
    """

    index: int
    documents: tuple[Document, ...]
    tokens: int
    token_budget: int

    def __len__(self) -> int:
        return 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch on `device`."""
        moved = [replace(item, segment=item.segment.to(device, non_blocking)) for item in self.documents]
        return replace(self, documents=tuple(moved))
