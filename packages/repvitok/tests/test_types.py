"""The hand-offs between stages accept what fits and name what does not."""

from __future__ import annotations

import pytest
import torch
from repvitok import Clip, VideoLatents


def test_a_clip_knows_its_frames_and_size() -> None:
    clip = Clip(torch.zeros(3, 5, 8, 12), rate_hz=10.0, source="a.mp4")
    assert (clip.frames, clip.size) == (5, (8, 12))


@pytest.mark.parametrize(
    ("video", "rate_hz", "message"),
    [
        (torch.zeros(1, 3, 5, 8, 8), 10.0, r"got \(1, 3, 5, 8, 8\) \(a.mp4\)"),
        (torch.zeros(3, 0, 8, 8), 10.0, r"got \(3, 0, 8, 8\)"),
        (torch.zeros(3, 5, 8, 8, dtype=torch.uint8), 10.0, "got torch.uint8"),
        (torch.full((3, 5, 8, 8), 255.0), 10.0, r"in \[-1, 1\], got 255 to 255"),
        (torch.full((3, 5, 8, 8), float("nan")), 10.0, "got nan to nan"),
        (torch.zeros(3, 5, 8, 8), 0.0, "rate_hz must be positive, got 0.0"),
    ],
)
def test_a_bad_clip_is_refused(video: torch.Tensor, rate_hz: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Clip(video, rate_hz, "a.mp4")


def test_latents_know_their_frames() -> None:
    assert VideoLatents(torch.zeros(5, 12, 6), (2, 2, 3), "abc").frames == 5


@pytest.mark.parametrize(
    ("latents", "digest", "message"),
    [
        (torch.zeros(1, 5, 12, 6), "abc", r"got shape \(1, 5, 12, 6\)"),
        (torch.zeros(5, 12, 6, dtype=torch.int64), "abc", "got torch.int64"),
        (torch.zeros(5, 6, 6), "abc", "2 views x 2 x 3 has 12 tokens, the latents have 6"),
        (torch.full((5, 12, 6), float("inf")), "abc", "expected finite latents"),
        (torch.zeros(5, 12, 6), "", "need the digest"),
    ],
)
def test_bad_latents_are_refused(latents: torch.Tensor, digest: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoLatents(latents, (2, 2, 3), digest)
