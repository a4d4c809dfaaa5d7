"""Clip and VideoLatents: what is handed from one stage to the next, with its shapes checked once, at the hand-off."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from repvitok.errors import UserError


@dataclass(frozen=True)
class Clip:
    """Consecutive frames of one video.

    Attributes:
        video: (3, T, H, W) floats, pixels in [-1, 1].
        rate_hz: frames per second of `video` (after any stride), or None for an image.
        source: where it came from, for messages: a file, an episode and camera.
    """

    video: Tensor
    rate_hz: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        """Reject what is no clip.

        Raises:
            ValueError: wrong dimensions, number type, range or rate.
        """
        where = f" ({self.source})" if self.source else ""
        if self.video.ndim != 4 or self.video.shape[0] != 3 or 0 in self.video.shape:
            raise UserError(f"expected a clip (3, frames, height, width), got {tuple(self.video.shape)}{where}")
        if not self.video.is_floating_point():
            raise UserError(f"expected pixels as floats in [-1, 1], got {self.video.dtype}{where}")
        low, high = (float(bound) for bound in self.video.aminmax())
        if not (low >= -1 and high <= 1):
            raise UserError(f"expected pixels in [-1, 1], got {low:.3g} to {high:.3g}{where}")
        if self.rate_hz is not None and not self.rate_hz > 0:
            raise UserError(f"rate_hz must be positive, got {self.rate_hz}{where}")

    @property
    def frames(self) -> int:
        """Raw frames T."""
        return self.video.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.video.shape[2], self.video.shape[3]


@dataclass(frozen=True)
class VideoLatents:
    """Latents of one clip or episode, and which tokenizer speaks them.

    Attributes:
        latents: (frames, tokens, d) floats; tokens are views * rows * columns, camera by camera.
        grid: (views, rows, columns).
        tokenizer_digest: `RepViTok.digest()` of the tokenizer that made them.
    """

    latents: Tensor
    grid: tuple[int, int, int]
    tokenizer_digest: str

    def __post_init__(self) -> None:
        """Reject what does not fit together.

        Raises:
            ValueError: wrong dimensions or number type, a grid of another size, no finite numbers, or no
                digest.
        """
        if self.latents.ndim != 3 or 0 in self.latents.shape:
            raise UserError(f"expected latents (frames, tokens, d), got shape {tuple(self.latents.shape)}")
        if not self.latents.is_floating_point():
            raise UserError(f"expected latents as floats, got {self.latents.dtype}")
        views, rows, columns = self.grid
        if views * rows * columns != self.latents.shape[1]:
            raise UserError(
                f"a grid of {views} views x {rows} x {columns} has {views * rows * columns} tokens, the latents have "
                f"{self.latents.shape[1]} per frame"
            )
        if not bool(self.latents.isfinite().all()):
            raise UserError("expected finite latents, some are infinite or not a number: the tokenizer diverged")
        if not self.tokenizer_digest:
            raise UserError("latents need the digest of the tokenizer that made them: RepViTok.digest()")

    @property
    def frames(self) -> int:
        """Latent frames T'."""
        return self.latents.shape[0]
