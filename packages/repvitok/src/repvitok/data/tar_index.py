"""What one tar of clips or images holds, and where: found once, kept in a cache folder."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from repvitok.data.sources import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from repvitok.data.video import VideoFile
from repvitok.documents import Above0, read_json, refuse_lfs_pointer
from repvitok.errors import UserError
from repvitok.files import write_text_atomic

INDEX_VERSION = 1
Natural = Annotated[int, msgspec.Meta(ge=0)]


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

    Raises:
        FileNotFoundError: there is no such tar.
        ValueError: it is no tar, compressed, or truncated.
    """
    if not tar.is_file():
        raise FileNotFoundError(f"{tar}: no such file; expected a WebDataset shard")
    if cache_folder is None:
        return scan(tar)
    stored = cache_folder / f"{tar.stem}-{hashlib.sha256(str(tar.resolve()).encode()).hexdigest()[:16]}.index.json"
    identity = {"version": INDEX_VERSION, "bytes": tar.stat().st_size, "modified_ns": tar.stat().st_mtime_ns}
    if stored.is_file():
        known = _read_index(stored, identity)
        if known is not None:
            return known
    members = scan(tar)
    rows = [astuple(member) for member in members]
    write_text_atomic(stored, json.dumps(identity | {"members": rows}))
    return members


def _read_index(stored: Path, identity: Mapping[str, int]) -> list[TarMember] | None:
    """The members in a cached index; None where it is of another state of the tar, or damaged: it is made again."""
    try:
        index = read_json(stored, _Index)
    except UserError:
        return None
    if {key: getattr(index, key) for key in identity} != identity:
        return None
    members = [TarMember(*row) for row in index.members]
    return members if all(m.start + m.length <= identity["bytes"] for m in members) else None


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
    return [_describe(tar, member.name, member.offset_data, member.size) for member in visible]


def _describe(tar: Path, name: str, start: int, length: int) -> TarMember:
    if Path(name).suffix.lower() in IMAGE_SUFFIXES:
        return TarMember(name, start, length, 1, None)
    try:
        video = VideoFile(tar, (start, length), f"{tar}, {name}")
    except ValueError as error:
        return TarMember(name, start, length, 0, None, str(error))
    return TarMember(name, start, length, len(video), video.fps)
