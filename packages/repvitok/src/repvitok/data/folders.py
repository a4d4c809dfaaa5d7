"""A folder of data, whatever its format, as training and held-out videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from repvitok.data.lerobot import LeRobotReader
from repvitok.data.pictures import DepthRange
from repvitok.data.sources import (
    VIDEO_SUFFIXES,
    ImageFolder,
    SelectedVideos,
    VideoFolder,
    VideoSource,
    lerobot_sources,
)
from repvitok.data.split import split_episodes
from repvitok.data.tars import TarShards, is_shards
from repvitok.errors import UserError

_LEROBOT_FILES = (
    *(f"meta/{name}" for name in ("info.json", "episodes.jsonl", "tasks.jsonl", "tasks.parquet", "episodes/*")),
    *("meta/episodes_stats.jsonl", "meta/stats.json", "data/**/*.parquet"),
    *("videos/chunk-*/*/episode_*.mp4", "videos/*/chunk-*/file-*.mp4"),
)
"""What only a LeRobot data set has, of version 2 or 3."""

FolderKind = Literal["auto", "lerobot", "videos", "images", "webdataset"]


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """The videos of one folder.

    Attributes:
        folder: its name, for messages.
        train, held_out: sources of the two parts; nothing may be held out.
        still: whether it holds images.
    """

    folder: str
    train: list[VideoSource]
    held_out: list[VideoSource]
    still: bool = False

    def serves(self, frames: int) -> bool:
        """Whether clips of that many frames may be cut from it: not several from an image."""
        return frames == 1 or not self.still


def split_folder(
    folder: str,
    kind: FolderKind = "auto",
    *,
    cameras: Sequence[str] | None = None,
    held_out: float = 0.0,
    max_bad_fraction: float = 0.0,
    cache_folder: str | None = None,
    depth_range: DepthRange | None = None,
) -> FolderSplit:
    """Opens a folder and holds some of its episodes or videos out.

    Args:
        folder: a LeRobot data set, a folder of videos or of images, or WebDataset shards.
        kind: which of them; "auto" looks.
        cameras: LeRobot cameras to use; all when None.
        held_out: fraction of its episodes or videos (`split_episodes`).
        max_bad_fraction: how many of a folder's or shards' files may be unreadable.
        cache_folder: for `TarShards`.
        depth_range: reads depth maps, too: (MIN, MAX) in the numbers they store become black and white.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds nothing of the kind, or too much that cannot be read.
    """
    found = folder_kind(folder) if kind == "auto" else kind
    if found == "lerobot":
        reader = LeRobotReader(folder, depth_range=depth_range)
        train, kept = split_episodes([info.index for info in reader.episodes], held_out)
        held = lerobot_sources(reader, cameras=cameras, episodes=kept) if kept else []
        return FolderSplit(folder, lerobot_sources(reader, cameras=cameras, episodes=train), held)
    source = open_videos(
        folder, found, max_bad_fraction=max_bad_fraction, cache_folder=cache_folder, depth_range=depth_range
    )
    train, kept = split_episodes(range(len(source)), held_out)
    held = [SelectedVideos(source, kept)] if kept else []
    still = isinstance(source, ImageFolder) or (isinstance(source, TarShards) and source.media == "images")
    return FolderSplit(folder, [SelectedVideos(source, train)], list(held), still)


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

    Raises:
        FileNotFoundError: there is no such folder.
        UserError: it holds several LeRobot data sets.
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
