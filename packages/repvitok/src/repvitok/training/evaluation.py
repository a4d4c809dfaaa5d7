"""What `repvitok test` measures: PSNR, SSIM, LPIPS and Frechet distances, each with what is needed to compare it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from repvitok.runtime.errors import UserError
from repvitok.runtime.files import write_json_atomic
from repvitok.training.features import FeatureNetwork
from repvitok.training.losses import PerceptualLoss
from repvitok.training.metrics import FrechetReconstruction, LPIPSMetric, MetricRow, ReconstructionMetrics, metric_table

REPORT = "test_metrics.json"


class Evaluation:
    """Metrics of reconstructions over a set of clips: PSNR and SSIM always, others where their network is given."""

    def __init__(self, perceptual: PerceptualLoss | None = None, features: Sequence[FeatureNetwork] = ()) -> None:
        """Starts empty.

        Args:
            perceptual: the network of LPIPS.
            features: one Frechet distance each.
        """
        names = [network.metric for network in features]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise UserError(f"two feature networks give {sorted(doubled)[0]!r}: measure one variant per run")
        self._frames = ReconstructionMetrics()
        self._lpips = None if perceptual is None else LPIPSMetric(perceptual)
        self._frechet = [FrechetReconstruction(network) for network in features]
        self._perceptual = perceptual

    def to(self, device: torch.device) -> Evaluation:
        """Moves the sums and networks to a device."""
        for metric in (self._frames, self._lpips, *self._frechet):
            if metric is not None:
                metric.to(device)
        return self

    def update(self, video_hat: Float[Tensor, "b 3 T H W"], video: Float[Tensor, "b 3 T H W"]) -> None:
        """Adds a batch of clips; pixels in [-1, 1]."""
        for metric in (self._frames, self._lpips, *self._frechet):
            if metric is not None:
                metric.update(video_hat, video)

    def rows(self, stride: str) -> list[MetricRow]:
        """Every metric over all ranks' clips, and starts anew.

        Args:
            stride: raw frames from one frame of a clip to the next, as the data module says it.
        """
        found = self._frames.compute()
        frames = f"{found.frames} frames"
        length = "-".join(str(n) for n in sorted(set(found.clip_frames)))
        rows = [
            MetricRow("psnr", found.psnr.item(), "dB", frames, length, stride, ""),
            MetricRow("ssim", found.ssim.item(), "", frames, length, stride, ""),
        ]
        if self._lpips is not None and self._perceptual is not None:
            value = self._lpips.compute().item()
            rows.append(MetricRow("lpips", value, "", frames, length, stride, self._perceptual.backbone))
        for metric in self._frechet:
            distance, count = metric.compute()
            samples = f"{count} {metric.network.unit}"
            backbone = metric.network.backbone
            rows.append(MetricRow(metric.network.metric, distance.item(), "", samples, length, stride, backbone))
        for metric in (self._frames, self._lpips, *self._frechet):
            if metric is not None:
                metric.reset()
        return rows


def report(rows: Sequence[MetricRow], folder: str | Path) -> Path:
    """Prints the rows and writes them to `folder` / test_metrics.json; returns that path."""
    print(metric_table(rows))
    path = Path(folder) / REPORT
    write_json_atomic(path, [asdict(row) for row in rows])
    return path
