"""Where clips come from: the cameras of LeRobot data sets, folders of videos or images, WebDataset shards.

Shards are tars on disk, or by URL with a local copy.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import logging
import os
import shutil
import tarfile
import urllib.request
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, Protocol, runtime_checkable

import msgspec
import numpy as np
from braceexpand import braceexpand
from jaxtyping import UInt8

from repvitok.data.images import read_image
from repvitok.data.lerobot.format import number_ranges
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.video import VideoFile
from repvitok.runtime.documents import Above0, DepthRange, checked_range, read_json, refuse_lfs_pointer
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import LastUsed, atomic_file, write_text_atomic

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
Episodes = str | Sequence[int]  # "all", or their numbers
INDEX_VERSION = 1
Natural = Annotated[int, msgspec.Meta(ge=0)]
_URL = ("http://", "https://")
_TIMEOUT_S = 60
MAX_SHARDS = 10**6
"""Tars that a pattern may name."""
Media = Literal["auto", "videos", "images"]


@runtime_checkable
class VideoSource(Protocol):
    """Some videos, readable at any frame."""

    def __len__(self) -> int:
        """Number of videos."""
        ...

    def num_frames(self, video: int) -> int:
        """Frames of one video."""
        ...

    def frame_rate_hz(self, video: int) -> float | None:
        """Frames per second of one video; None for an image."""
        ...

    def read(self, video: int, frames: Sequence[int] | None = None) -> UInt8[np.ndarray, "n h w 3"]:
        """Frames of one video as uint8 RGB, None for all."""
        ...

    def describe(self, video: int) -> str:
        """What an error should call this video: its file, or its data set, episode and camera."""
        ...


class LeRobotSource:
    """One camera of a LeRobot data set; video i is `reader.episodes[i]`."""

    def __init__(self, reader: LeRobotReader, camera: str) -> None:
        reader.require_camera(camera)
        self.reader, self.camera = reader, camera

    def __len__(self) -> int:
        return self.reader.num_episodes

    def num_frames(self, video: int) -> int:
        return self.reader.episodes[video].length

    def frame_rate_hz(self, video: int) -> float | None:  # noqa: ARG002 - one rate for all
        return self.reader.fps

    def read(self, video: int, frames: Sequence[int] | None = None) -> UInt8[np.ndarray, "n h w 3"]:
        return self.reader.frames(self.reader.episodes[video].index, self.camera, frames)

    def describe(self, video: int) -> str:
        return f"{self.reader.root}, episode {self.reader.episodes[video].index}, {self.camera}"


class VideoFolder:
    """Every video file in a folder and its subfolders, in the order of their paths.

    Args:
        root: the folder.
        max_bad_fraction: how many of the files may be unreadable; they are left out and logged. 0: none.
        depth_range: for videos whose pixels are deep grey (`VideoFile.read`).
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        max_bad_fraction: float | int = 0.0,
        depth_range: DepthRange | None = None,
    ) -> None:
        paths = _files(Path(root), VIDEO_SUFFIXES, "videos")
        bad = BadFiles(max_bad_fraction, len(paths))
        self._videos: list[VideoFile] = []
        self._depth_range = checked_range(depth_range)
        for path in paths:
            try:
                self._videos.append(VideoFile(path))
            except ValueError as error:
                bad.count(str(path), error)
        if not self._videos:
            raise UserError(f"{root}: none of its {len(paths)} video files can be read")

    def __len__(self) -> int:
        return len(self._videos)

    def num_frames(self, video: int) -> int:
        return len(self._videos[video])

    def frame_rate_hz(self, video: int) -> float | None:
        return self._videos[video].fps or None

    def read(self, video: int, frames: Sequence[int] | None = None) -> UInt8[np.ndarray, "n h w 3"]:
        return self._videos[video].read(frames, depth_range=self._depth_range)

    def describe(self, video: int) -> str:
        return str(self._videos[video].path)


class ImageFolder:
    """Every image in a folder and its subfolders, each a video of one frame (the tokenizer's T = 1)."""

    def __init__(self, root: str | os.PathLike[str], *, depth_range: DepthRange | None = None) -> None:
        self._paths = _files(Path(root), IMAGE_SUFFIXES, "images")
        self._depth_range = checked_range(depth_range)

    def __len__(self) -> int:
        return len(self._paths)

    def num_frames(self, video: int) -> int:  # noqa: ARG002 - every image is one frame
        return 1

    def frame_rate_hz(self, video: int) -> float | None:  # noqa: ARG002 - no image has one
        return None

    def read(self, video: int, frames: Sequence[int] | None = None) -> UInt8[np.ndarray, "n h w 3"]:
        return read_image(self._paths[video], frames, str(self._paths[video]), self._depth_range)

    def describe(self, video: int) -> str:
        return str(self._paths[video])


class SelectedVideos:
    """Some of another source's videos: video i is `source`'s `videos[i]`, by position. Episodes have numbers, which are
    other ones where some are missing: `lerobot_sources` takes those."""

    def __init__(self, source: VideoSource, videos: Sequence[int]) -> None:
        outside = [video for video in videos if not 0 <= video < len(source)]
        if outside or not len(videos):
            raise UserError(f"select at least one of videos 0..{len(source) - 1}, got {list(videos)}")
        self._source, self._videos = source, [int(video) for video in videos]

    def __len__(self) -> int:
        return len(self._videos)

    def num_frames(self, video: int) -> int:
        return self._source.num_frames(self._videos[video])

    def frame_rate_hz(self, video: int) -> float | None:
        return self._source.frame_rate_hz(self._videos[video])

    def read(self, video: int, frames: Sequence[int] | None = None) -> UInt8[np.ndarray, "n h w 3"]:
        return self._source.read(self._videos[video], frames)

    def describe(self, video: int) -> str:
        return self._source.describe(self._videos[video])


class VideoPart:
    """Frames first .. last - 1 of one of another source's videos, as a source of one video."""

    def __init__(self, source: VideoSource, video: int, first: int, last: int) -> None:
        if not 0 <= first < last <= source.num_frames(video):
            raise UserError(
                f"{source.describe(video)} has {source.num_frames(video)} frames, asked for {first}..{last - 1}"
            )
        self._source, self._video, self._first, self._last = source, video, first, last

    def __len__(self) -> int:
        return 1

    def num_frames(self, video: int) -> int:  # noqa: ARG002 - the only one
        return self._last - self._first

    def frame_rate_hz(self, video: int) -> float | None:  # noqa: ARG002 - the only one
        return self._source.frame_rate_hz(self._video)

    def read(self, video: int, frames: Sequence[int] | None = None) -> UInt8[np.ndarray, "n h w 3"]:
        length = self.num_frames(video)
        wanted = range(length) if frames is None else frames
        if len(wanted) and not 0 <= min(wanted) <= max(wanted) < length:
            raise UserError(f"{self.describe(video)}: frames 0..{length - 1} of these, asked for {list(wanted)}")
        return self._source.read(self._video, [self._first + frame for frame in wanted])

    def describe(self, video: int) -> str:  # noqa: ARG002 - the only one
        return f"{self._source.describe(self._video)}, frames {self._first}-{self._last - 1}"


class BadFiles:
    """Counts files that cannot be read, and stops once they are more than allowed."""

    def __init__(self, max_fraction: float | int, total: int) -> None:
        if not 0 <= max_fraction < 1:
            raise UserError(f"max_bad_fraction must be in [0, 1), got {max_fraction}")
        self._allowed, self._total = int(max_fraction * total), total
        self._names: set[str] = set()

    def count(self, name: str, error: ValueError) -> None:
        """Notes one bad file; raises `error`, with the count, once the bound is passed."""
        self._names.add(name)
        if len(self._names) > self._allowed:
            bound = f"{len(self._names)} of {self._total} files cannot be read, {self._allowed} may"
            raise UserError(f"{error} ({bound}: see max_bad_fraction)") from error
        log.warning("left out: %s", error)


def lerobot_sources(
    root: str | os.PathLike[str] | LeRobotReader,
    *,
    cameras: Sequence[str] | None = None,
    episodes: Episodes = "all",
) -> list[VideoSource]:
    """One source per camera (None: every camera) of a LeRobot data set, over all episodes or those of some numbers."""
    reader = root if isinstance(root, LeRobotReader) else LeRobotReader(root)
    if not reader.camera_keys:
        raise UserError(f"{reader.root}: the data set has no camera")
    sources: list[VideoSource] = [LeRobotSource(reader, camera) for camera in cameras or reader.camera_keys]
    if isinstance(episodes, str):
        if episodes != "all":
            raise UserError(f'episodes must be "all" or a list of numbers, got {episodes!r}')
        return sources
    place = {info.index: number for number, info in enumerate(reader.episodes)}
    if unknown := sorted(set(episodes) - set(place)):
        raise UserError(f"{reader.root}: no episodes {unknown}; there are {number_ranges(place)}")
    return [SelectedVideos(source, [place[episode] for episode in episodes]) for source in sources]


def _files(root: Path, suffixes: frozenset[str], what: str) -> list[Path]:
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected a folder of {what}")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    visible = [path for path in paths if not path.name.startswith(".")]
    if not visible:
        raise UserError(f"{root}: no {what} in this folder; looked for {', '.join(sorted(suffixes))}")
    return visible


@dataclass(frozen=True)
class TarMember:
    """One clip or image inside a tar.

    Attributes:
        name: its name in the tar.
        start: its first byte in the file.
        length: its bytes.
        frames: its frames, 1 for an image; 0 for a video that cannot be read, `problem` says why.
        rate_hz: frames per second, None for an image.
        problem: empty, or the error that reading it gave.
    """

    name: str
    start: int
    length: int
    frames: int
    rate_hz: float | None
    problem: str = ""

    @property
    def is_video(self) -> bool:
        """Whether it is a video, by its suffix."""
        return Path(self.name).suffix.lower() in VIDEO_SUFFIXES


def read_index(tar: Path, cache_folder: Path | None) -> list[TarMember]:
    """The clips and images of a tar, in its order; from the cache folder, if they were found before.

    The index of a tar is a JSON file named by the tar's path; one of another size or time of change is made again.
    """
    if not tar.is_file():
        raise FileNotFoundError(f"{tar}: no such file; expected a WebDataset shard")
    if cache_folder is None:
        return scan(tar)
    stored = cache_folder / f"{tar.stem}-{hashlib.sha256(str(tar.resolve()).encode()).hexdigest()[:16]}.index.json"
    identity = {"version": INDEX_VERSION, "bytes": tar.stat().st_size, "modified_ns": tar.stat().st_mtime_ns}
    if stored.is_file():
        try:
            index = read_json(stored, _Index)
        except UserError:
            index = None  # damaged: it is made again
        if index is not None and {key: getattr(index, key) for key in identity} == identity:
            members = [TarMember(*row) for row in index.members]
            if all(member.start + member.length <= identity["bytes"] for member in members):
                return members
    members = scan(tar)
    rows = [astuple(member) for member in members]
    write_text_atomic(stored, json.dumps(identity | {"members": rows}))
    return members


@dataclass(frozen=True)
class _Index:
    """A cached index as JSON has it: a row per member, its fields in order."""

    version: int
    bytes: int
    modified_ns: int
    members: list[tuple[str, Natural, Natural, Natural, Above0 | None, str]]


def scan(tar: Path) -> list[TarMember]:
    """The clips and images of a tar, in its order, found by going through it; opens every video once."""
    suffixes = VIDEO_SUFFIXES | IMAGE_SUFFIXES
    try:
        with tarfile.open(tar, "r:") as file:
            found = [member for member in file if member.isfile()]
    except tarfile.ReadError as error:
        refuse_lfs_pointer(tar)
        raise UserError(
            f"{tar}: not a readable, uncompressed tar ({error}); is it truncated, or a .tar.gz to be unpacked?"
        ) from error
    visible = [m for m in found if Path(m.name).suffix.lower() in suffixes and not Path(m.name).name.startswith(".")]
    members = []
    for member in visible:
        place = member.name, member.offset_data, member.size
        if Path(member.name).suffix.lower() in IMAGE_SUFFIXES:
            members.append(TarMember(*place, 1, None))
            continue
        try:
            video = VideoFile(tar, place[1:], f"{tar}, {member.name}")
        except ValueError as error:
            members.append(TarMember(*place, 0, None, str(error)))
        else:
            members.append(TarMember(*place, len(video), video.fps))
    return members


class TarShards:
    """The clips or the images of WebDataset shards, readable at random: each member of that kind is a video.

    The tars are gone through once for where their members lie and how long they are (`cache_folder` keeps the answer);
    a clip then costs one seek. Other members (captions, json) are left alone.

    Args:
        shards: a folder of .tar files, one tar, a URL, or either of the last two with braces: `clips-{000..099}.tar`.
        media: "videos", "images", or "auto": videos, unless there are none.
        cache_folder: where copies of remote tars and the indices of all are kept; needed for URLs.
        max_bad_fraction: how many of the videos may be unreadable; they are left out and logged. 0: none.
        depth_range: for images that are no 8-bit colour and videos of deep grey (`picture_to_rgb`).

    Attributes:
        media: "videos" or "images".
    """

    def __init__(
        self,
        shards: str | os.PathLike[str],
        *,
        media: Media = "auto",
        cache_folder: str | os.PathLike[str] | None = None,
        max_bad_fraction: float | int = 0.0,
        depth_range: DepthRange | None = None,
    ) -> None:
        cache = None if cache_folder is None else Path(cache_folder)
        self._depth_range = checked_range(depth_range)
        self._paths = [_local(shard, cache) for shard in expand_shards(shards)]
        found = [(shard, member) for shard, path in enumerate(self._paths) for member in read_index(path, cache)]
        any_video = any(member.is_video for _, member in found)
        self.media: Media = ("videos" if any_video else "images") if media == "auto" else media
        wanted = [(shard, member) for shard, member in found if member.is_video == (self.media == "videos")]
        bad = BadFiles(max_bad_fraction, len(wanted))
        for shard, member in wanted:
            if member.problem:
                bad.count(f"{shard} {member.name}", ValueError(member.problem))
        self._members: list[tuple[int, TarMember]] = [(shard, m) for shard, m in wanted if not m.problem]
        if not self._members:
            raise UserError(f"{shards}: no readable {self.media} in {len(self._paths)} tars")
        self._open: LastUsed[int, VideoFile] = LastUsed(64)

    def __len__(self) -> int:
        return len(self._members)

    def num_frames(self, video: int) -> int:
        return self._members[video][1].frames

    def frame_rate_hz(self, video: int) -> float | None:
        return self._members[video][1].rate_hz

    def read(self, video: int, frames: Sequence[int] | None = None) -> UInt8[np.ndarray, "n h w 3"]:
        shard, member = self._members[video]
        path, span = self._paths[shard], (member.start, member.length)
        if member.is_video:
            opened = self._open.get_or_make(video, lambda: VideoFile(path, span, self.describe(video)))
            return opened.read(frames, depth_range=self._depth_range)
        with open(path, "rb") as file:
            file.seek(member.start)
            return read_image(io.BytesIO(file.read(member.length)), frames, self.describe(video), self._depth_range)

    def describe(self, video: int) -> str:
        shard, member = self._members[video]
        return f"{self._paths[shard]}, {member.name}"


def is_shards(data: str | os.PathLike[str]) -> bool:
    """Whether `data` names WebDataset shards: a URL, a tar, a pattern of tars, or a folder with tars in it."""
    text = os.fspath(data)
    return text.startswith(_URL) or text.endswith(".tar") or any(Path(text).glob("*.tar"))


def expand_shards(shards: str | os.PathLike[str]) -> list[str]:
    """The tars that a folder, a path, a URL or a pattern with braces names, in order."""
    text = os.fspath(shards)
    if not text.startswith(_URL) and Path(text).is_dir():
        paths = sorted(str(path) for path in Path(text).glob("*.tar") if not path.name.startswith("."))
        if not paths:
            raise UserError(f"{text}: no .tar files in this folder; expected WebDataset shards")
        return paths
    try:
        named = list(islice(braceexpand(text), MAX_SHARDS + 1))
    except ValueError as error:
        raise UserError(f"{text}: expected braces such as clips-{{000..099}}.tar ({error})") from error
    if len(named) > MAX_SHARDS:
        raise UserError(f"{text}: more than {MAX_SHARDS} tars")
    return named


def _local(shard: str, cache: Path | None) -> Path:
    """A tar's path; a remote one is copied to the cache folder first, whole or not at all."""
    if not shard.startswith(_URL):
        return Path(shard)
    if cache is None:
        raise UserError(f"{shard}: shards by URL need a cache_folder for their local copies")
    digest = hashlib.sha256(shard.encode()).hexdigest()[:16]
    path = cache / f"{digest}-{shard.split('?')[0].rsplit('/', 1)[-1]}"
    if path.is_file():
        return path
    with atomic_file(path) as partial:
        try:
            with urllib.request.urlopen(shard, timeout=_TIMEOUT_S) as answer, open(partial, "wb") as file:
                promised = answer.headers.get("Content-Length")
                shutil.copyfileobj(answer, file, 2**20)
                received = file.tell()
        except (OSError, ValueError, http.client.HTTPException) as error:
            told = f"could not be fetched ({error}); check the address and the network"
            raise FileNotFoundError(f"{shard}: {told}") from error
        if promised is not None and promised.isdecimal() and int(promised) != received:
            raise UserError(f"{shard}: the connection ended after {received} of {promised} bytes; try again")
    return path
