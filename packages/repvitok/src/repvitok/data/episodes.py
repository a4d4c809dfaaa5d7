"""Data sets as episodes to encode: LeRobot's, or videos without states and actions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from repvitok.data.folders import folder_kind, open_videos
from repvitok.data.lerobot import LeRobotReader
from repvitok.data.lerobot_format import EpisodeInfo
from repvitok.data.sources import VideoSource
from repvitok.documents import DepthRange, checked_range
from repvitok.errors import UserError

CAMERA = "video"


class VideoEpisodes:
    """A source of videos read as a data set: each video is an episode of one camera, called "video".

    Attributes:
        root: what the source was opened from.
        fps: frames per second of all videos; 1 for images.
        depth_range: what the source scales depth maps by (it was opened with it); None: it has none.

    Raises:
        ValueError: the videos have different frame rates.
    """

    def __init__(self, root: str | Path, source: VideoSource, depth_range: DepthRange | None = None) -> None:
        self.root, self._source, self.depth_range = Path(root), source, depth_range
        rates = {source.frame_rate_hz(video) or 1.0: source.describe(video) for video in range(len(source))}
        if len(rates) > 1:
            (one, first), (two, second) = list(rates.items())[:2]
            raise UserError(
                f"{first} has {one:g} frames per second, {second} {two:g}; latents of one folder have one rate: encode "
                "them apart"
            )
        self.fps = float(next(iter(rates)))
        self.camera_keys = [CAMERA]
        self.features: dict[str, dict[str, Any]] = {}
        self.episodes = [EpisodeInfo(video, source.num_frames(video), "") for video in range(len(source))]

    def episode(self, index: int, keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:  # noqa: ARG002 - none
        """No columns of numbers."""
        return {}

    def frames(self, episode: int, camera: str, frames: Sequence[int] | None = None) -> UInt8[np.ndarray, "n h w 3"]:
        """Frames of one video."""
        self.require_camera(camera)
        return self._source.read(episode, frames)

    def require_camera(self, camera: str) -> None:
        """Raises UserError where it is not "video"."""
        if camera != CAMERA:
            raise UserError(f"{self.root}: no camera {camera!r}; there is {CAMERA!r}")

    def channel_names(self, key: str) -> tuple[str, ...]:
        """There are no channels."""
        raise UserError(f"{self.root}: no feature {key!r}; these are videos without states and actions")


def open_episodes(
    data: str, cache_folder: str | None = None, depth_range: Sequence[float | int] | None = None
) -> LeRobotReader | VideoEpisodes:
    """The episodes of a LeRobot data set, a folder of videos or images, or WebDataset shards, whichever it is.

    With a `depth_range`, depth maps are read, too: (MIN, MAX) in the numbers they store become black and white.
    """
    kind, depth_range = folder_kind(data), checked_range(depth_range)
    if kind == "lerobot":
        return LeRobotReader(data, depth_range=depth_range)
    source = open_videos(data, kind, cache_folder=cache_folder, depth_range=depth_range)
    return VideoEpisodes(data, source, depth_range)
