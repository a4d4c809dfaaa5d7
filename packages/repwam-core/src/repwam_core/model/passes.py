"""What follows from a layout alone, worked out once and used in every pass over it.

A pass is then a function of tensors whose shapes do not change from chunk to chunk, which is what compilation and CUDA
graphs ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from repvitok.nn.rope import Rotary, axis_pairs
from torch import Tensor

from repwam_core.model.blocks import Kept, StreamContext, take
from repwam_core.model.heads import Turn
from repwam_core.model.sequence import Run, SequenceLayout


@dataclass(frozen=True, eq=False)
class StreamPlan:
    """One stream of a pass.

    Attributes:
        level: noise level of each group of tokens.
        documents: the ranges of tokens of one document, and which it is.
        kept: ranges of the noisy tokens, which leave the last layer.
        kept_groups: the same in groups.
        kept_documents: `documents` of the noisy tokens alone.
    """

    level: Int[Tensor, " groups"]
    documents: Sequence[tuple[Run, int]]
    kept: list[Run]
    kept_groups: list[Run]
    kept_documents: Sequence[tuple[Run, int]]

    def to(self, device: torch.device) -> StreamPlan:
        """The same plan for passes on a device."""
        return replace(self, level=self.level.to(device))

    def narrowed(self, context: StreamContext) -> StreamContext:
        """The context of the noisy tokens."""
        modulation = take(context.modulation.flatten(2), self.kept_groups).unflatten(2, (6, -1))
        return StreamContext(modulation, context.text, self.kept_documents)


@dataclass(frozen=True, eq=False)
class PassPlan:
    """Both streams of a pass.

    Attributes:
        view: camera of each video token.
        vector: which of its transition's action vectors each action token is.
        turn: where the tokens stand, video first.
        video, side: the streams.
        kept: ranges of the noisy tokens of both, video first.
    """

    view: Int[Tensor, " n_video"]
    vector: Int[Tensor, " n_action"]
    turn: Turn
    video: StreamPlan
    side: StreamPlan
    kept: list[Run]

    def to(self, device: torch.device) -> PassPlan:
        """The same plan for passes on a device."""
        return replace(
            self,
            view=self.view.to(device),
            vector=self.vector.to(device),
            turn=Turn(*(factor.to(device) for factor in self.turn)),
            video=self.video.to(device),
            side=self.side.to(device),
        )

    def kept_tokens(self, video: StreamContext, side: StreamContext) -> Kept:
        """What leaves the last layer: the tokens whose velocities are asked for."""
        return Kept(self.kept, self.video.kept, self.side.kept, self.video.narrowed(video), self.side.narrowed(side))


def plan_pass(layout: SequenceLayout, head_dim: int, rope_base: float) -> PassPlan:
    """Everything the model needs to know of a layout, on the CPU; `PassPlan.to` moves it."""
    video = _stream_plan(layout.video_stream, layout.noisy_video_runs, layout.group)
    side = _stream_plan(layout.side_stream, layout.noisy_action_runs, 1)
    videos = len(layout.video)
    return PassPlan(
        view=layout.video_stream.view,
        vector=layout.vector[layout.actions],
        turn=Turn.of(rotary_of(layout.streams.position, head_dim, rope_base)),
        video=video,
        side=side,
        kept=[*video.kept, *((start + videos, stop + videos) for start, stop in side.kept)],
    )


def rotary_of(position: Float[Tensor, "n 3"], head_dim: int, base: float) -> Rotary:
    """Rotary tables of arbitrary, also fractional, coordinates; angles in float64 so that frames may grow."""
    angles = [
        torch.outer(
            position[:, axis].double(),
            base ** -(torch.arange(pairs, device=position.device, dtype=torch.float64) / pairs),
        )
        for axis, pairs in enumerate(axis_pairs(head_dim))
    ]
    table = torch.cat(angles, dim=-1)
    return Rotary(table.cos().float(), table.sin().float())


def _stream_plan(stream: SequenceLayout, kept: list[Run], group: int) -> StreamPlan:
    groups = [(start // group, stop // group) for start, stop in kept]
    return StreamPlan(stream.level[::group], stream.document_runs, kept, groups, _narrowed(stream.document_runs, kept))


def _narrowed(documents: Sequence[tuple[Run, int]], tokens: list[Run]) -> list[tuple[Run, int]]:
    """The ranges of documents among some of the tokens of a stream."""
    narrowed, position = [], 0
    for start, stop in tokens:
        for (first, last), document in documents:
            if (length := min(stop, last) - max(start, first)) > 0:
                narrowed.append(((position, position + length), document))
                position += length
    return narrowed
