"""How a chunk is planned: the settings of inference, for validation and the policy, and their options. No torch."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import msgspec
from repvitok.runtime.documents import Above0, From0, check_fields
from repvitok.runtime.errors import UserError

MOST_STEPS = 10_000
Steps = Annotated[int, msgspec.Meta(ge=1, le=MOST_STEPS)]


@dataclass(frozen=True, kw_only=True)
class ChunkSpec:
    """The chunks that a model was trained on: a policy plans no others.

    Attributes:
        smallest, largest: latent frames of a chunk; every size between them was drawn, too.
        delay: most action vectors at the beginning of a chunk that were given as committed (`LossSettings.delay`).
    """

    smallest: Steps
    largest: Steps
    delay: Annotated[int, msgspec.Meta(ge=0, le=MOST_STEPS)] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.smallest > self.largest:
            raise UserError(f"chunk_sizes: expected 1 <= smallest <= largest, got {(self.smallest, self.largest)}")

    def to_dict(self) -> dict[str, int]:
        """As files have it: `delay` only where there is one."""
        values = {"smallest": self.smallest, "largest": self.largest}
        return {**values, "delay": self.delay} if self.delay else values

    def require(self, frames: int) -> None:
        """Raises UserError where chunks of so many latent frames were not trained."""
        if not self.smallest <= frames <= self.largest:
            raise UserError(
                f"plan.chunk_frames: the model is trained on chunks of {self.smallest} to {self.largest} latent frames "
                f"(model.chunk_sizes), got {frames}; plan such a chunk, or train on larger or smaller ones"
            )

    def require_borders(self, multiple: int) -> None:
        """Raises UserError where a cut after a multiple of so many transitions may fall inside a chunk."""
        if inside := [size for size in range(self.smallest, self.largest + 1) if multiple % size]:
            raise UserError(
                f"packing.chunk_multiple: expected a multiple of every chunk size from {self.smallest} to "
                f"{self.largest} (model.chunk_sizes), got {multiple}, which {inside} do not divide; "
                f"{math.lcm(*range(self.smallest, self.largest + 1))} would do"
            )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Settings of one planning step; the defaults are the paper's (Sec. 4.1).

    Attributes:
        chunk_frames: latent frames planned at a time; within the model's `ChunkSpec`.
        execute_frames: how many of them are carried out before planning again; None is all.
        video: "imagine" refines the video with the actions; "skip" leaves it at pure noise (`joint` coupling).
        video_steps, action_steps: Euler steps of each modality.
        hold_video: run the video only where it takes a step; in the passes between, actions see what it was then
            (`joint` coupling; an approximation, docs/decisions/067).
        video_shift, action_shift: bend their time grids, as in training's noise samplers.
        guidance: classifier-free guidance of the video; 1 is off.
        clip: keep actions inside the range that the data set recorded.
    """

    chunk_frames: Steps = 2
    execute_frames: Steps | None = None
    video: Literal["imagine", "skip"] = "imagine"
    video_steps: Steps = 5
    action_steps: Steps = 10
    video_shift: Above0 = 1.0
    action_shift: Above0 = 1.0
    hold_video: bool = False
    guidance: From0 = 1.0
    clip: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.execute_frames is not None and not 1 <= self.execute_frames <= self.chunk_frames:
            raise UserError(
                f"execute_frames: expected 1 to chunk_frames = {self.chunk_frames} latent frames, got "
                f"{self.execute_frames}"
            )

    @property
    def executed(self) -> int:
        """Latent frames carried out per plan."""
        return self.chunk_frames if self.execute_frames is None else self.execute_frames


def add_sampling_arguments(parser: argparse.ArgumentParser, otherwise: str = "as the policy folder says") -> None:
    """Declare the options of `SamplingConfig`; `otherwise` is what holds where one is not given."""
    plan = parser.add_argument_group("planning", f"how chunks are planned; {otherwise} unless given here")
    from repvitok.runtime.commands import MANY, number, whole_number  # of verbs alone; a policy loads without them

    steps, above_0, from_0 = whole_number(1, MOST_STEPS), number(0, MANY, above=True), number(0, MANY)
    plan.add_argument("--chunk-frames", type=steps, metavar="N", help="latent frames planned at a time")
    plan.add_argument("--execute-frames", type=steps, metavar="N", help="how many of them are carried out")
    plan.add_argument("--video", choices=["imagine", "skip"], help="refine the video with the actions, or leave it out")
    plan.add_argument("--video-steps", type=steps, metavar="N", help="Euler steps of the video")
    plan.add_argument("--action-steps", type=steps, metavar="N", help="Euler steps of the actions")
    plan.add_argument("--video-shift", type=above_0, metavar="X", help="bends the time grid of the video")
    plan.add_argument("--action-shift", type=above_0, metavar="X", help="bends the time grid of the actions")
    plan.add_argument(
        "--hold-video", action=argparse.BooleanOptionalAction, help="run the video only in passes in which it moves"
    )
    plan.add_argument("--guidance", type=from_0, metavar="X", help="classifier-free guidance of the video; 1 is off")
    plan.add_argument(
        "--clip", action=argparse.BooleanOptionalAction, help="keep actions inside the range that the data set recorded"
    )


def given_sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Those settings that the command line gave, by the names of `SamplingConfig`."""
    named = {field.name: getattr(options, field.name) for field in fields(SamplingConfig)}
    return {name: value for name, value in named.items() if value is not None}
