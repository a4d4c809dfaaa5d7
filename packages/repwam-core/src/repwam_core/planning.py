"""How a chunk is planned: the settings of inference, shared by validation, the policy and its folder. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from repvitok.documents import Above0, From0, check_fields
from repvitok.errors import UserError

MOST_STEPS = 10_000
Steps = Annotated[int, msgspec.Meta(ge=1, le=MOST_STEPS)]


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

    chunk_frames: Steps = 2
    execute_frames: Steps | None = None
    video: Literal["imagine", "skip"] = "imagine"
    video_steps: Steps = 5
    action_steps: Steps = 10
    video_shift: Above0 = 1.0
    action_shift: Above0 = 1.0
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
