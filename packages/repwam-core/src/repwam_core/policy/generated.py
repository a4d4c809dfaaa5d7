"""Imagined video against what the cameras saw: PSNR, SSIM, and a Frechet distance where a network is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from repvitok.runtime.errors import UserError
from repvitok.training.features import HOGClipFeatures, I3DFeatures
from repvitok.training.metrics import FrechetStatistics, psnr, ssim
from torch import Tensor

CLIP_FRAMES = 16
"""Frames of a clip whose features are compared; the paper does not say how long its gFVD's are."""

Frames = UInt8[np.ndarray, "_ _ _ _ 3"]


@runtime_checkable
class ClipFeatures(Protocol):
    """A frozen network that turns clips into vectors; `repvitok.training.features` has some.

    Attributes:
        metric: what its distance is called for reconstructions: "rfvd" for I3D, another name for a stand-in.
        backbone: the network and where its weights came from.
        dim: numbers in a vector.
    """

    metric: str
    backbone: str
    dim: int

    def features(self, video: Float[Tensor, "b 3 T H W"]) -> Float[Tensor, "n d"]:
        """Vectors of clips with pixels in [-1, 1]."""
        ...


def named_clip_features(named: Sequence[str] | None) -> ClipFeatures | None:
    """The network of `repwam openloop --clip-features`: its name and, for I3D, the file of its weights.

    Raises:
        ValueError: there is no such network.
    """
    match list(named or ()):
        case []:
            return None
        case ["hog"]:
            return HOGClipFeatures()
        case [("tfhub-kinetics400" | "pytorch-i3d") as name, file]:
            return I3DFeatures(name, file)
        case other:
            told = " ".join(other)
            raise UserError(f"clip features: expected hog, tfhub-kinetics400 FILE or pytorch-i3d FILE, got {told}")


@dataclass(frozen=True)
class GeneratedScores:
    """What `score_video` found.

    Attributes:
        psnr_db, ssim: means over frames.
        frames: how many.
        frechet: distance between the features of imagined and of real clips; None without a network or two clips.
        frechet_name: "gfvd" where the network is FVD's, else the network's own name.
        backbone: the network.
        clips: clips on either side.
    """

    psnr_db: float
    ssim: float
    frames: int
    frechet: float | None = None
    frechet_name: str = ""
    backbone: str = ""
    clips: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the distance stands under its own name."""
        values: dict[str, Any] = {"psnr_db": self.psnr_db, "ssim": self.ssim, "frames": self.frames}
        if self.frechet is not None:
            values |= {self.frechet_name: self.frechet, "backbone": self.backbone, "clips": self.clips}
        return values


def frames_psnr(video_hat: Frames, video: Frames) -> Float[np.ndarray, "views n"]:
    """PSNR of every frame in dB, by the one definition that all stages share (`repvitok.training.metrics.psnr`)."""
    return psnr(_as_clips(video_hat), _as_clips(video)).numpy()


@torch.no_grad()
def score_video(pairs: Iterable[tuple[Frames, Frames]], network: ClipFeatures | None = None) -> GeneratedScores:
    """Compare (imagined, real) videos of the same episodes and frames.

    Clips are `CLIP_FRAMES` consecutive frames of one camera, cut one after the other; what is left at the end of an
    episode is in no clip.

    Raises:
        ValueError: nothing to compare.
    """
    sums, frames = np.zeros(2), 0
    sides = None if network is None else (FrechetStatistics(network.dim), FrechetStatistics(network.dim))
    for imagined, real in pairs:
        video_hat, video = _as_clips(imagined), _as_clips(real)
        sums += [float(psnr(video_hat, video).sum()), float(ssim(video_hat, video).sum())]
        frames += video.shape[0] * video.shape[2]
        if network is not None and sides is not None:
            for statistics, whole in zip(sides, (video_hat, video), strict=True):
                _add_clips(statistics, whole, network)
    if not frames:
        raise UserError("no imagined frames to compare: plan with video='imagine' on episodes of several chunks")
    mean_psnr, mean_ssim = (sums / frames).tolist()
    if network is None or sides is None or sides[0].count < 2:
        return GeneratedScores(mean_psnr, mean_ssim, frames)
    distance, clips = sides[0].distance(sides[1]), sides[0].count
    name = {"rfvd": "gfvd"}.get(network.metric, network.metric)
    return GeneratedScores(mean_psnr, mean_ssim, frames, distance, name, network.backbone, clips)


def _as_clips(frames: Frames) -> Float[Tensor, "views 3 n H W"]:
    """Bytes to pixels in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).float() / 127.5 - 1
    return rearrange(pixels, "views n h w c -> views c n h w")


def _add_clips(statistics: FrechetStatistics, video: Float[Tensor, "views 3 n H W"], network: ClipFeatures) -> None:
    whole = video.shape[2] // CLIP_FRAMES * CLIP_FRAMES
    if whole:
        clips = rearrange(video[:, :, :whole], "views c (clips n) h w -> (views clips) c n h w", n=CLIP_FRAMES)
        statistics.update(network.features(clips).float())
