"""Pixels between their two forms: uint8 frames as cameras give them, floats in [-1, 1] as models take them.

Training, encoding and the policy at work all go through `prepare_frames`, so that they see the same numbers.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from repvitok.runtime.documents import Count, Positive, Share, check_fields
from repvitok.runtime.errors import UserError

GREY = (0.299, 0.587, 0.114)
"""How bright red, green and blue are (ITU-R BT.601)."""


def resize_frames(frames: UInt8[np.ndarray, "n H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "n h w 3"]:
    """Resizes to size = (h, w) with an antialiased bilinear filter, rounded to uint8; each frame on its own.

    The aspect ratio follows `size`: choose one with the camera's ratio to keep it. torch's uint8 kernel does 7 to 10
    times as many frames a second as Pillow's, equal to it within 1 of 255.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise UserError(f"expected frames (n, H, W, 3) uint8, got {frames.shape} {frames.dtype}")
    if min(size) < 1:
        raise UserError(f"size must be (height, width), both positive, got {size}")
    if frames.shape[1:3] == tuple(size) or not len(frames):
        return frames if len(frames) else np.empty((0, *size, 3), dtype=np.uint8)
    pixels = rearrange(_as_tensor(frames), "n h w rgb -> n rgb h w")
    resized = F.interpolate(pixels, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
    return rearrange(resized, "n rgb h w -> n h w rgb").numpy()


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Further encodings of each episode, of pictures cut and coloured otherwise; never mirrored.

    What is drawn depends on (seed, episode, copy, camera) alone: it is one for all frames of an episode. The strengths
    are openpi's (its `preprocess_observation`), whose rotation is left out.

    Attributes:
        copies: further encodings of each episode.
        crop: share of height and of width that is kept, at a place that is drawn.
        brightness, contrast, saturation: each is multiplied by a number within 1 +- this.
        seed: of all draws.
    """

    copies: Positive
    crop: Share = 0.95
    brightness: Share = 0.3
    contrast: Share = 0.4
    saturation: Share = 0.5
    seed: Count = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def resize(
        self,
        frames: UInt8[np.ndarray, "n H W 3"],
        size: tuple[int, int],
        key: tuple[int, int, str],
        colour: bool = True,
    ) -> UInt8[np.ndarray, "n h w 3"]:
        """`resize_frames` of what a copy shows of its frames.

        Args:
            frames: of one camera.
            size: (h, w).
            key: the episode, the copy from 1, the camera.
            colour: change the colours, too; depth maps have none.
        """
        random = np.random.default_rng((self.seed, *key[:2], zlib.crc32(key[2].encode())))
        full = frames.shape[1:3]
        height, width = (max(1, round(self.crop * side)) for side in full)
        top, left = (int(random.integers(room + 1)) for room in (full[0] - height, full[1] - width))
        resized = resize_frames(frames[:, top : top + height, left : left + width], size)
        if not colour:
            return resized
        strengths = self.brightness, self.contrast, self.saturation
        brightness, contrast, saturation = (1 + random.uniform(-most, most) for most in strengths)
        mix = saturation * np.eye(3) + (1 - saturation) * np.array([GREY] * 3)  # each channel, out of (r, g, b)
        rgb = resized.astype(np.float32) @ mix.T.astype(np.float32)
        rgb = brightness * (127.5 + contrast * (rgb - 127.5))
        return np.rint(rgb).clip(0, 255).astype(np.uint8)


def to_unit(frames: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """uint8 0..255 to float32 -1..1: x / 127.5 - 1."""
    return frames.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(video: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Floats -1..1 (values outside are clamped) to uint8 0..255; the inverse of `to_unit`."""
    return video.detach().float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round().to(torch.uint8)


def prepare_frames(frames: UInt8[np.ndarray, "n H W 3"], size: tuple[int, int]) -> Float[Tensor, "3 n h w"]:
    """What a model sees of camera frames: resized to size = (h, w), channels first, float32 in [-1, 1]."""
    return to_unit(rearrange(_as_tensor(resize_frames(frames, size)), "n h w rgb -> rgb n h w").contiguous())


def to_frames(video: Float[Tensor, "3 n h w"]) -> UInt8[np.ndarray, "n h w 3"]:
    """A model's video as camera frames; the inverse of `prepare_frames` at the same size."""
    return rearrange(to_uint8(video), "rgb n h w -> n h w rgb").cpu().contiguous().numpy()


def _as_tensor(frames: np.ndarray) -> Tensor:
    """Shares memory where torch can: it takes neither reversed axes nor read-only arrays."""
    shareable = frames.flags.writeable and min(frames.strides) >= 0
    return torch.from_numpy(frames if shareable else frames.copy())
