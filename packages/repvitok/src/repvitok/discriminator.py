"""Adversaries of the tokenizer's training: patch discriminators of images and of videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from repvitok.documents import Above0, Count, Decay, From0, check_fields


@dataclass(frozen=True)
class AdversarySettings:
    """The adversary of L_gan: when it enters, its size, its LeCam weight and its AdamW.

    The paper gives only the weight of L_gan. `start_step` lets the tokenizer learn coarse frames first.
    """

    start_step: Count = 10_000
    width: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64
    layers: Annotated[int, msgspec.Meta(ge=1, le=16)] = 3
    lecam: From0 = 1e-3
    lr: Above0 = 1e-4
    betas: tuple[Decay, Decay] = (0.5, 0.9)
    warmup_steps: Count = 1000

    def __post_init__(self) -> None:
        check_fields(self)


class VideoPatchDiscriminator(nn.Module):
    """3-D PatchGAN: one score per patch of space and time; higher means real.

    Strided 3-D convolutions with spectral normalisation (bounded slope without batch statistics, so that a clip's
    score does not depend on its batch). Time is halved in the first two layers only, so clips from 5 frames work.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        """Builds `layers` strided stages that double `width` up to eightfold."""
        super().__init__()
        channels = [3] + [width * min(2**i, 8) for i in range(layers)]
        stages: list[nn.Module] = []
        for i in range(layers):
            stride = (2 if i < 2 else 1, 2, 2)
            conv = nn.Conv3d(channels[i], channels[i + 1], (3, 4, 4), stride, padding=1)
            stages += [spectral_norm(conv), nn.LeakyReLU(0.2)]
        self.stages = nn.Sequential(*stages)
        self.score = spectral_norm(nn.Conv3d(channels[-1], 1, 3, padding=1))

    def forward(self, video: Float[Tensor, "b 3 T H W"]) -> Float[Tensor, "b patches"]:
        """Scores of all patches; pixels in [-1, 1]."""
        return rearrange(self.score(self.stages(video)), "b 1 t h w -> b (t h w)")


class ImagePatchDiscriminator(nn.Module):
    """2-D PatchGAN on every frame by itself: sharpness, whatever the motion."""

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        """Builds `layers` strided stages that double `width` up to eightfold."""
        super().__init__()
        channels = [3] + [width * min(2**i, 8) for i in range(layers)]
        stages: list[nn.Module] = []
        for i in range(layers):
            conv = nn.Conv2d(channels[i], channels[i + 1], 4, 2, padding=1)
            stages += [spectral_norm(conv), nn.LeakyReLU(0.2)]
        self.stages = nn.Sequential(*stages)
        self.score = spectral_norm(nn.Conv2d(channels[-1], 1, 3, padding=1))

    def forward(self, video: Float[Tensor, "b 3 T H W"]) -> Float[Tensor, "b patches"]:
        """Scores of all patches of all frames; pixels in [-1, 1]."""
        frames = rearrange(video, "b c T H W -> (b T) c H W")
        scores = self.score(self.stages(frames))
        return rearrange(scores, "(b T) 1 h w -> b (T h w)", b=video.shape[0])


class Discriminator(nn.Module):
    """The image and the video adversary together; images (T = 1) meet the first one only."""

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        """Builds both at the same size."""
        super().__init__()
        self.image = ImagePatchDiscriminator(width, layers)
        self.video = VideoPatchDiscriminator(width, layers)

    def forward(self, video: Float[Tensor, "b 3 T H W"]) -> list[Float[Tensor, "b patches"]]:
        """Scores of each adversary that applies; pixels in [-1, 1]."""
        scores = [self.image(video)]
        return [*scores, self.video(video)] if video.shape[2] > 1 else scores
