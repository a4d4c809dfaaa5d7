"""What one training step of the world action model is given: segments of one shape, or episodes packed in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from repvitok.runtime.errors import UserError
from torch import Tensor
from torch.nn.functional import pad


def moved(batch: Any, device: torch.device | str, non_blocking: bool) -> Any:
    """A dataclass with its tensors on `device`."""
    kept = {item.name: getattr(batch, item.name) for item in fields(batch)}
    tensors = {name: value for name, value in kept.items() if isinstance(value, Tensor)}
    return replace(batch, **{name: value.to(device, non_blocking=non_blocking) for name, value in tensors.items()})


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
        history: what stands in the history in place of `latents`, where the tokenizer is tuned; these stay what is
            predicted.
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
    history: Float[Tensor, "b frames tokens d"] | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SegmentBatch:
        """Return the batch on `device`."""
        return moved(self, device, non_blocking)


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
class Documents:
    """Episodes, or pieces of them, one after the other in one tensor of each kind; b such sequences of equal shapes.

    Attributes:
        grids: (views, h, w) of a latent frame of each document.
        transitions: of each document.
        latents: standardised latents of all frames of all documents, token by token.
        actions: scaled actions of each transition.
        state: standardised robot state at each frame, or None.
        text: hidden states of each document's instruction.
        text_mask: which of them are real tokens.
        valid: which transitions are real.
        channel_mask: which action channels the embodiment has.
        reference: what each transition's actions are measured from, see `SegmentBatch.reference`.
        history: see `SegmentBatch.history`; of segments alone.
    """

    grids: tuple[tuple[int, int, int], ...]
    transitions: tuple[int, ...]
    latents: Float[Tensor, "b tokens d"]
    actions: Float[Tensor, "b transitions a c"]
    state: Float[Tensor, "b frames S"] | None
    text: Float[Tensor, "b documents s D"]
    text_mask: Bool[Tensor, "b documents s"]
    valid: Bool[Tensor, "b transitions"]
    channel_mask: Bool[Tensor, "b documents c"]
    reference: Float[Tensor, "b transitions c"] | None = None
    history: Float[Tensor, "b tokens d"] | None = None

    @classmethod
    def of_segments(cls, batch: SegmentBatch, grid: tuple[int, int, int]) -> Documents:
        """Segments: b sequences of one document each."""
        return cls(
            grids=(grid,),
            transitions=(batch.valid.shape[1],),
            latents=batch.latents.flatten(1, 2),
            actions=batch.actions,
            state=batch.state,
            text=batch.text[:, None],
            text_mask=batch.text_mask[:, None],
            valid=batch.valid,
            channel_mask=batch.channel_mask[:, None],
            reference=batch.reference,
            history=None if batch.history is None else batch.history.flatten(1, 2),
        )

    @classmethod
    def packed(cls, documents: Sequence[Documents]) -> Documents:
        """All of them in one sequence; shorter instructions are padded and masked."""
        longest = max(item.text.shape[2] for item in documents)

        states = [item.state for item in documents if item.state is not None]
        if states and len(states) != len(documents):
            raise UserError(f"expected states in all {len(documents)} documents or in none, got {len(states)}.")
        # Actions that are measured from nothing stay what they are when zero is what they are measured from.
        references = [item.actions.new_zeros(item.actions[:, :, 0].shape) for item in documents]
        if measured := any(item.reference is not None for item in documents):
            pairs = zip(documents, references, strict=True)
            references = [zeros if item.reference is None else item.reference for item, zeros in pairs]
        texts = [pad(item.text, (0, 0, 0, longest - item.text.shape[2])) for item in documents]
        masks = [pad(item.text_mask, (0, longest - item.text_mask.shape[2])) for item in documents]
        return cls(
            grids=tuple(grid for item in documents for grid in item.grids),
            transitions=tuple(count for item in documents for count in item.transitions),
            latents=torch.cat([item.latents for item in documents], dim=1),
            actions=torch.cat([item.actions for item in documents], dim=1),
            state=torch.cat(states, dim=1) if states else None,
            text=torch.cat(texts, dim=1),
            text_mask=torch.cat(masks, dim=1),
            valid=torch.cat([item.valid for item in documents], dim=1),
            channel_mask=torch.cat([item.channel_mask for item in documents], dim=1),
            reference=torch.cat(references, dim=1) if measured else None,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Documents:
        """The documents on `device`."""
        return moved(self, device, non_blocking)

    # Index arrays, on the CPU. Frames are numbered over all documents, and so are transitions: document i of F_i
    # transitions has F_i + 1 frames, so that frame f of it stands i places further than its transition f -> f + 1.

    @cached_property
    def frame_tokens(self) -> Int[Tensor, " documents"]:
        """Tokens of a latent frame of each document."""
        return torch.tensor(self.grids).prod(1)

    @cached_property
    def document_of_transition(self) -> Int[Tensor, " transitions"]:
        """Which document each transition is of."""
        return torch.arange(len(self.transitions)).repeat_interleave(torch.tensor(self.transitions))

    @cached_property
    def document_of_frame(self) -> Int[Tensor, " frames"]:
        """Which document each frame is of."""
        return torch.arange(len(self.transitions)).repeat_interleave(torch.tensor(self.transitions) + 1)

    @cached_property
    def last_transitions(self) -> Int[Tensor, " documents"]:
        """The last transition of each document."""
        return torch.tensor(self.transitions).cumsum(0) - 1

    @cached_property
    def last_frames(self) -> Int[Tensor, " documents"]:
        """The last frame of each document."""
        return (torch.tensor(self.transitions) + 1).cumsum(0) - 1

    @cached_property
    def predicted(self) -> Int[Tensor, " noisy_tokens"]:
        """The tokens of all frames but each document's frame 0: what is predicted, in that order."""
        later = torch.ones(len(self.document_of_frame), dtype=torch.bool)
        later[self.last_frames - torch.tensor(self.transitions)] = False
        return later.repeat_interleave(self.frame_tokens[self.document_of_frame]).nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class Noise:
    """Every random draw of one step, of one document after the other as in `Documents`.

    Attributes:
        video, actions: standard normal noise of the frames 1 .. F, and of their actions.
        history: standard normal noise for the clean video of the frames 0 .. F.
        video_t, action_t: noise time of each chunk 1 .. N, drawn independently; with `known`, actions' of each vector.
        history_t: noise time of the clean video of each chunk 0 .. N; 1 without history noise.
        video_off: documents whose video is pure noise and not learned.
        text_off: documents whose instruction is withheld.
        committed: how many action vectors at the beginning of each chunk 1 .. N are given as committed; None for none.
        known: which of all action vectors these are, where their layout has told (`losses.with_committed`).
    """

    video: Float[Tensor, "b noisy_tokens d"]
    actions: Float[Tensor, "b transitions a c"]
    history: Float[Tensor, "b tokens d"]
    video_t: Float[Tensor, "b chunks"]
    action_t: Float[Tensor, "b _"]
    history_t: Float[Tensor, "b chunks_with_prefix"]
    video_off: Bool[Tensor, "b documents"]
    text_off: Bool[Tensor, "b documents"]
    committed: Int[Tensor, "b chunks"] | None = None
    known: Bool[Tensor, "b vectors"] | None = None

    @classmethod
    def packed(cls, draws: Sequence[Noise]) -> Noise:
        """The draws of documents that are packed one after the other."""
        names = [item.name for item in fields(cls) if getattr(draws[0], item.name) is not None]
        return cls(**{name: torch.cat([getattr(draw, name) for draw in draws], dim=1) for name in names})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Noise:
        """The draws on `device`."""
        return moved(self, device, non_blocking)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One sequence of a training step.

    Attributes:
        index: number of the sequence in the stream of all ranks.
        pieces: what is packed; draws that depend on a piece alone are the same wherever it is packed.
        documents: their tensors, in one sequence.
        tokens: how many tokens they have.
        token_budget: how many there could be.
        noise: every draw of the step, where it was drawn ahead.
    """

    index: int
    pieces: tuple[Piece, ...]
    documents: Documents
    tokens: int
    token_budget: int
    noise: Noise | None = None

    def __len__(self) -> int:
        return 1

    def segment(self, number: int) -> SegmentBatch:
        """One of the documents by itself."""
        whole, piece = self.documents, self.pieces[number]
        last_frame, tokens = int(whole.last_frames[number]), int(whole.frame_tokens[number])
        frames = slice(last_frame - piece.transitions, last_frame + 1)
        transitions = slice(frames.start - number, frames.stop - number - 1)
        end = int(whole.frame_tokens[whole.document_of_frame[: last_frame + 1]].sum())
        latents = whole.latents[:, end - (piece.transitions + 1) * tokens : end]
        return SegmentBatch(
            latents=latents.unflatten(1, (-1, tokens)),
            actions=whole.actions[:, transitions],
            state=None if whole.state is None else whole.state[:, frames],
            text=whole.text[:, number],
            text_mask=whole.text_mask[:, number],
            valid=whole.valid[:, transitions],
            channel_mask=whole.channel_mask[:, number],
            episode=torch.tensor([piece.episode]),
            start=torch.tensor([piece.start]),
            data_set=piece.data_set,
            reference=None if whole.reference is None else whole.reference[:, transitions],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch on `device`."""
        noise = None if self.noise is None else self.noise.to(device, non_blocking)
        return replace(self, documents=self.documents.to(device, non_blocking), noise=noise)
