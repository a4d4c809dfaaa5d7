"""A folder of data, whatever its format: training and held-out videos, or episodes to encode."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from repvitok.data.contents import require_recorded
from repvitok.data.lerobot.format import EpisodeInfo
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.sources import (
    VIDEO_SUFFIXES,
    ImageFolder,
    SelectedVideos,
    TarShards,
    VideoFolder,
    VideoPart,
    VideoSource,
    is_shards,
    lerobot_sources,
)
from repvitok.data.split import EpisodeNumbers, HeldOut, choose_episodes, held_out_tail, left_out, split_episodes
from repvitok.runtime.documents import DepthRange, checked_range
from repvitok.runtime.errors import UserError

_LEROBOT_FILES = (
    *(f"meta/{name}" for name in ("info.json", "episodes.jsonl", "tasks.jsonl", "tasks.parquet", "episodes/*")),
    *("meta/episodes_stats.jsonl", "meta/stats.json", "data/**/*.parquet"),
    *("videos/chunk-*/*/episode_*.mp4", "videos/*/chunk-*/file-*.mp4"),
)
"""What only a LeRobot data set has, of version 2 or 3."""

log = logging.getLogger(__name__)

FolderKind = Literal["auto", "lerobot", "videos", "images", "webdataset"]
CAMERA = "video"


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """The videos of one folder.

    Attributes:
        folder: its name, for messages.
        train, held_out: sources of the two parts; nothing may be held out.
        images: whether it holds images.
    """

    folder: str
    train: list[VideoSource]
    held_out: list[VideoSource]
    images: bool = False

    def serves(self, frames: int) -> bool:
        """Whether clips of that many frames may be cut from it: not several from an image."""
        return frames == 1 or not self.images


def split_folder(
    folder: str,
    kind: FolderKind = "auto",
    *,
    cameras: Sequence[str] | None = None,
    episodes: EpisodeNumbers | None = None,
    held_out: HeldOut = 0.0,
    needed: Sequence[Callable[[float | None], float]] = (),
    max_bad_fraction: float = 0.0,
    cache_folder: str | None = None,
    depth_range: DepthRange | None = None,
) -> FolderSplit:
    """Opens a folder and holds some of its episodes or videos out, or the last frames of an only one.

    Args:
        folder: a LeRobot data set, a folder of videos or of images, or WebDataset shards.
        kind: which of them; "auto" looks.
        cameras, episodes, max_bad_fraction, cache_folder, depth_range: as of `ClipDataModule`.
        held_out: fraction of its episodes or videos, or their numbers (`split_episodes`).
        needed: for each kind of clip, the first of them validated on, the raw frames it takes of a video of some rate.
            What is too short for all of them is left out, with a word.
    """
    found = folder_kind(folder) if kind == "auto" else kind
    if found == "lerobot":
        reader = LeRobotReader(folder, depth_range=depth_range)
        sources, numbers = lerobot_sources(reader, cameras=cameras), [info.index for info in reader.episodes]
        images, what = False, "episodes"
    else:
        source = open_videos(
            folder, found, max_bad_fraction=max_bad_fraction, cache_folder=cache_folder, depth_range=depth_range
        )
        sources, numbers = [source], list(range(len(source)))
        images = isinstance(source, ImageFolder) or (isinstance(source, TarShards) and source.media == "images")
        what = "images" if images else "videos"
    position = {number: place for place, number in enumerate(numbers)}
    known = choose_episodes(episodes, numbers, folder)
    if found == "lerobot":
        require_recorded(reader, cameras or reader.camera_keys, known)
    takes = {} if images else {n: [f(sources[0].frame_rate_hz(position[n])) for f in needed] for n in known}
    lengths = {number: sources[0].num_frames(position[number]) for number in known}
    short = [number for number in known if takes.get(number) and lengths[number] < min(takes[number])]
    if short:
        least = min(min(takes[number]) for number in short)
        told = left_out([lengths[number] for number in short], len(known), f"a clip takes {least:g} frames", what)
        log.warning("%s: %s", folder, told)
    usable = set(known) - set(short)
    if not usable:
        return FolderSplit(folder, [], [], images)
    train, kept = split_episodes(known, held_out, usable)
    if held_out and not kept:
        if len(usable) == 1:
            video = position[train[0]]
            name = f"episode {train[0]}" if found == "lerobot" else sources[0].describe(video)
            return _split_frames(folder, sources, video, name, held_out, takes.get(train[0]) or [1.0], images)
        log.warning("%s: nothing is held out: the %s that would be are too short", folder, what)
    parts = [[position[number] for number in side] for side in (train, kept)]
    train, kept = ([SelectedVideos(source, part) for source in sources] if part else [] for part in parts)
    return FolderSplit(folder, list(train), list(kept), images)


def _split_frames(
    folder: str,
    sources: Sequence[VideoSource],
    video: int,
    name: str,
    held_out: HeldOut,
    takes: Sequence[float],
    images: bool,
) -> FolderSplit:
    """The first frames of an only video to train on, the last ones held out; `takes` frames are a clip of each kind."""
    length = sources[0].num_frames(video)
    longest = max(frames for frames in takes if frames <= length)
    shortest = takes[0] if takes[0] <= length else longest
    tail = 0 if images else held_out_tail(length, held_out, math.ceil(shortest), math.ceil(longest))
    if not tail:
        log.warning("%s: nothing is held out: there is %s alone, of %d frames", folder, name, length)
        return FolderSplit(folder, [SelectedVideos(source, [video]) for source in sources], [], images)
    cut = length - tail
    log.warning("%s: %s alone: its frames 0-%d are trained on, %d-%d held out", folder, name, cut - 1, cut, length - 1)
    train, kept = ([VideoPart(source, video, *span) for source in sources] for span in ((0, cut), (cut, length)))
    return FolderSplit(folder, list(train), list(kept), images)


def open_videos(
    folder: str,
    kind: FolderKind,
    *,
    max_bad_fraction: float = 0.0,
    cache_folder: str | None = None,
    depth_range: DepthRange | None = None,
) -> VideoSource:
    """A folder of videos or images, or WebDataset shards, as one source."""
    if kind == "webdataset":
        return TarShards(folder, cache_folder=cache_folder, max_bad_fraction=max_bad_fraction, depth_range=depth_range)
    if kind == "videos":
        return VideoFolder(folder, max_bad_fraction=max_bad_fraction, depth_range=depth_range)
    return ImageFolder(folder, depth_range=depth_range)


def folder_kind(folder: str) -> FolderKind:
    """What a folder holds, by looking.

    A LeRobot data set whose info.json is missing stays one, and so is refused by its reader: as a folder of videos it
    would come without states, actions and instructions.
    """
    path = Path(folder)
    if any(next(path.glob(pattern), None) is not None for pattern in _LEROBOT_FILES):
        return "lerobot"
    if several := sorted(info.parent.parent.name for info in path.glob("*/meta/info.json")):
        raise UserError(
            f"{folder} is a folder of LeRobot data sets, {several[:5]}: give one of them, or several one by one"
        )
    if is_shards(folder):
        return "webdataset"
    if not path.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; expected a LeRobot data set, WebDataset shards, or a folder of videos or images"
        )
    has_video = any(file.suffix.lower() in VIDEO_SUFFIXES for file in path.rglob("*"))
    return "videos" if has_video else "images"


class VideoEpisodes:
    """A source of videos read as a data set: each video is an episode of one camera, called "video".

    Attributes:
        root: what the source was opened from.
        fps: frames per second of all videos; 1 for images.
        depth_range: what the source scales depth maps by (it was opened with it); None: it has none.
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
