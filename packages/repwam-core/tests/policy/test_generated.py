"""Scores of imagined video are those of its frames and clips, and say what they are of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from repvitok.training.metrics import FrechetStatistics
from repwam_core.policy.openloop import CLIP_FRAMES, ClipFeatures, score_video
from torch import Tensor


class MeanColour:
    """Three numbers a clip."""

    metric, backbone, dim = "rfvd", "mean colour", 3

    def features(self, video: Tensor) -> Tensor:
        return video.mean(dim=(2, 3, 4))


def episode(frames: int, seed: int, views: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    imagined, real = rng.integers(0, 256, (2, views, frames, 16, 16, 3), np.uint8)
    return imagined, real


def psnr_db(frames: np.ndarray, reference: np.ndarray) -> float:
    """Of one frame, by hand."""
    return 10 * np.log10(255.0**2 / np.mean((frames.astype(np.float64) - reference) ** 2))


def test_means_run_over_frames_not_over_episodes() -> None:
    pairs = [episode(1, 0), episode(3, 1)]
    scores = score_video(pairs)
    each = [
        psnr_db(imagined[view, n], real[view, n])
        for imagined, real in pairs
        for view in range(2)
        for n in range(imagined.shape[1])
    ]
    assert scores.frames == len(each) == 8
    assert scores.psnr_db == pytest.approx(np.mean(each), rel=1e-4)
    assert -1 <= scores.ssim <= 1
    assert "gfvd" not in scores.to_dict()


def test_equal_video_is_equal() -> None:
    _, real = episode(CLIP_FRAMES, 0)
    scores = score_video([(real, real)], MeanColour())
    assert scores.ssim == pytest.approx(1)
    assert scores.psnr_db == pytest.approx(100)
    assert scores.frechet == pytest.approx(0, abs=1e-9)


def test_frechet_is_of_whole_clips_of_every_camera() -> None:
    pairs = [episode(2 * CLIP_FRAMES + 3, 0), episode(CLIP_FRAMES - 1, 1)]
    network = MeanColour()
    assert isinstance(network, ClipFeatures)
    scores = score_video(pairs, network)
    assert (scores.frechet_name, scores.backbone, scores.clips) == ("gfvd", "mean colour", 4)
    sides = []
    for video in pairs[0]:
        cut = video[:, : 2 * CLIP_FRAMES].astype(np.float64).reshape(4, -1, 3) / 127.5 - 1
        sides.append(FrechetStatistics(3).update(torch.from_numpy(cut.mean(axis=1))))
    assert scores.frechet == pytest.approx(sides[0].distance(sides[1]), rel=1e-3, abs=1e-6)
    assert scores.to_dict()["gfvd"] == scores.frechet


def test_a_stand_in_keeps_its_name() -> None:
    network = MeanColour()
    network.metric = "frechet_mean_colour"
    assert score_video([episode(CLIP_FRAMES, 0)], network).frechet_name == "frechet_mean_colour"


def test_nothing_imagined_is_refused() -> None:
    with pytest.raises(ValueError, match="no imagined frames"):
        score_video([])
