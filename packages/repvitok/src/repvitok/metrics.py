"""Reconstruction metrics: PSNR and SSIM of frames, averaged over a set of clips."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure


def to_unit(video: Float[Tensor, "b 3 T H W"]) -> Float[Tensor, "b 3 T H W"]:
    """Pixels in [-1, 1] -> [0, 1], clipped: what an image file would hold."""
    return ((video.float() + 1) / 2).clamp(0, 1)


def psnr(video_hat: Float[Tensor, "b 3 T H W"], video: Float[Tensor, "b 3 T H W"]) -> Float[Tensor, "b T"]:
    """Peak signal-to-noise ratio of every frame in dB: -10 log10 mean (o_hat - o)^2, with pixels in [0, 1].

    Identical frames give infinity in theory; the error is bounded below by 1e-10, that is 100 dB.
    """
    error = (to_unit(video_hat) - to_unit(video)).square()
    return -10 * torch.log10(error.mean(dim=(1, 3, 4)).clamp_min(1e-10))


def ssim(video_hat: Float[Tensor, "b 3 T H W"], video: Float[Tensor, "b 3 T H W"]) -> Float[Tensor, "b T"]:
    """Structural similarity of every frame (torchmetrics: 11 x 11 Gaussian window, sigma 1.5, reflected borders)."""
    frames_hat, frames = (rearrange(to_unit(v), "b c T H W -> (b T) c H W") for v in (video_hat, video))
    value = structural_similarity_index_measure(frames_hat, frames, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return rearrange(value, "(b T) -> b T", b=video.shape[0])


class ReconstructionMetrics(Metric):
    """Mean PSNR and SSIM over all frames seen, summed exactly over ranks.

    The mean is over frames (a PSNR per frame, then the mean), not the PSNR of the mean error.
    """

    psnr_sum: Tensor
    ssim_sum: Tensor
    frames: Tensor

    def __init__(self) -> None:
        """Starts with no frames."""
        super().__init__()
        for name in ("psnr_sum", "ssim_sum", "frames"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, video_hat: Float[Tensor, "b 3 T H W"], video: Float[Tensor, "b 3 T H W"]) -> None:
        """Adds a batch of clips; pixels in [-1, 1]."""
        values = psnr(video_hat, video)
        self.psnr_sum += values.double().sum()
        self.ssim_sum += ssim(video_hat, video).double().sum()
        self.frames += values.numel()

    def compute(self) -> dict[str, Tensor]:
        """{"psnr": dB, "ssim": in [-1, 1]}; raises ValueError when no frame was added."""
        if self.frames == 0:
            raise ValueError("no frames were added: the validation set is empty")
        return {"psnr": self.psnr_sum / self.frames, "ssim": self.ssim_sum / self.frames}
