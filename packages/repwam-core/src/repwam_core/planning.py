"""How a chunk is planned: the settings of inference, shared by validation, the policy and its folder. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
