"""How a chunk is planned: the settings of inference, shared by validation, the policy and its folder, and their
options, shared by all verbs that drive a policy. No torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Any, Literal

from repvitok.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Settings of one planning step; the defaults are the paper's (Sec. 4.1).

    Attributes:
        chunk_frames: latent frames planned at a time.
        execute_frames: how many of them are carried out before planning again; None is all.
        video: "imagine" refines the video with the actions; "skip" leaves it at pure noise (`joint` coupling).
        video_steps, action_steps: Euler steps of each modality.
        video_shift, action_shift: bend their time grids, as in training's noise samplers.
        guidance: classifier-free guidance of the video; 1 is off.
        clip: keep actions inside the range that the data set recorded.
    """

    chunk_frames: int = 2
    execute_frames: int | None = None
    video: Literal["imagine", "skip"] = "imagine"
    video_steps: int = 5
    action_steps: int = 10
    video_shift: float = 1.0
    action_shift: float = 1.0
    guidance: float = 1.0
    clip: bool = True

    def __post_init__(self) -> None:
        for name in ("chunk_frames", "video_steps", "action_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.execute_frames is not None and not 1 <= self.execute_frames <= self.chunk_frames:
            raise UserError(
                f"execute_frames: expected 1 to chunk_frames = {self.chunk_frames} latent frames, got "
                f"{self.execute_frames}"
            )
        if self.video not in ("imagine", "skip"):
            raise UserError(f"video: expected 'imagine' or 'skip', got {self.video!r}")

    @property
    def executed(self) -> int:
        """Latent frames carried out per plan."""
        return self.chunk_frames if self.execute_frames is None else self.execute_frames


def add_plan_arguments(parser: argparse.ArgumentParser, otherwise: str = "as the policy folder says") -> None:
    """Declare the options of `PlanSettings`; `otherwise` is what holds where one is not given."""
    plan = parser.add_argument_group("planning", f"how chunks are planned; {otherwise} unless given here")
    plan.add_argument("--chunk-frames", type=int, metavar="N", help="latent frames planned at a time")
    plan.add_argument("--execute-frames", type=int, metavar="N", help="how many of them are carried out")
    plan.add_argument("--video", choices=["imagine", "skip"], help="refine the video with the actions, or leave it out")
    plan.add_argument("--video-steps", type=int, metavar="N", help="Euler steps of the video")
    plan.add_argument("--action-steps", type=int, metavar="N", help="Euler steps of the actions")
    plan.add_argument("--video-shift", type=float, metavar="X", help="bends the time grid of the video")
    plan.add_argument("--action-shift", type=float, metavar="X", help="bends the time grid of the actions")
    plan.add_argument("--guidance", type=float, metavar="X", help="classifier-free guidance of the video; 1 is off")
    plan.add_argument(
        "--clip", action=argparse.BooleanOptionalAction, help="keep actions inside the range that the data set recorded"
    )


def given_plan(options: argparse.Namespace) -> dict[str, Any]:
    """Those settings that the command line gave, by the names of `PlanSettings`."""
    named = {field.name: getattr(options, field.name) for field in fields(PlanSettings)}
    return {name: value for name, value in named.items() if value is not None}
