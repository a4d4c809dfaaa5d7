"""Latent episodes on disk: WebDataset tar shards of npy and json members, described by one meta.json.

    latents-000000.tar   episodes: latents, states, actions, instruction
    labels-000000.tar    latent actions of the same episodes, once they are labelled
    meta.json            what the latents are, and of every tar its size and SHA-256; written last

A tar is never changed once it is written, so folders may share one by hard links.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from jaxtyping import Float

from repvitok.data.latents import ChannelStatistics, EpisodeInfo, InstructionSource, LatentEpisode, LatentMeta
from repvitok.runtime.documents import Count, Digest, load_json, parse, parse_episodes, require_format
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import (
    LastUsed,
    VerifiedFiles,
    atomic_file,
    link_or_copy,
    refuse_foreign,
    sha256_of,
    sole_writer,
    write_json_atomic,
)

FORMAT = "repvitok-latents"
FORMAT_VERSION = 1
OPEN_SHARDS = 256
"""Tars whose members are remembered and which stay mapped; a map costs address space, no memory."""
NPY_HEADER_BYTES = 1024
_ARRAYS = ("latents", "state", "actions", "latent_actions")
TARS = "latents-[0-9][0-9][0-9][0-9][0-9][0-9].tar"
_LABEL_TARS = TARS.replace("latents", "labels", 1)
_BEGUN = ".unfinished"
_WORK = (_BEGUN, ".work", ".parts")
"""What a folder holds beside its tars while they are being made."""
LABEL_WORK = ".labels"
"""What it holds while they are being labelled."""


class LatentShardWriter:
    """Writes latent episodes into a folder that counts as finished once `close` wrote meta.json.

    Use it as a context manager: leaving it on an exception writes no meta.json.

    Args:
        root: the folder; created. It must hold nothing but what a writer left that never came to its meta.json, whose
            tars are removed. Who writes for long holds it with `files.sole_writer`.
        meta: what the shards hold. With `measure`, its mean and std are replaced on `close` by those of the
            episodes written; without, they are kept (the same latents, labelled).
        measure: see `meta`. Statistics of latent actions are always measured where `meta` has none.
        shard_bytes: a shard is closed once it holds this much.
        dtype: "float32", or "float16" to store latents in half the space (states and actions stay float32).
        provenance: JSON values that say how the latents were made, kept in meta.json.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        meta: LatentMeta,
        *,
        measure: bool = True,
        shard_bytes: int = 2**28,
        dtype: str = "float32",
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        if dtype not in ("float32", "float16"):
            raise UserError(f'dtype must be "float32" or "float16", got {dtype!r}')
        self.root, self.meta = Path(root), meta
        self._measure, self._shard_bytes, self._dtype = measure, shard_bytes, np.dtype(dtype)
        self._provenance = dict(provenance or {})
        self._statistics, self._latent_actions = ChannelStatistics(), ChannelStatistics()
        self._shards: list[dict[str, Any]] = []
        self._open: _OpenShard | None = None
        self._keys: set[str] = set()
        self._closed = False
        if (self.root / "meta.json").exists():
            raise UserError(
                f"{self.root} already holds finished latents (meta.json); remove it or choose another folder"
            )
        refuse_foreign_tars(self.root)
        write_json_atomic(self.root / _BEGUN, {"format": FORMAT})
        for unfinished in (*self.root.glob(TARS), *self.root.glob(f".partial-{TARS}")):
            unfinished.unlink()  # of a writer that never came to its meta.json

    def add(self, episode: LatentEpisode) -> None:
        """Appends one episode; raises ValueError where it does not fit the meta or its key is taken."""
        self._check(episode)
        stored = np.ascontiguousarray(episode.latents.astype(self._dtype))
        self._statistics.add(stored)
        if episode.latent_actions is not None and len(episode.latent_actions):
            self._latent_actions.add(episode.latent_actions)
        if (shard := self._open) is None:
            path, writing = self.root / f"latents-{len(self._shards):06d}.tar", ExitStack()
            tar = writing.enter_context(tar_writer(writing.enter_context(atomic_file(path))))
            shard = self._open = _OpenShard(tar, path, writing)
        sample = episode_sample(dataclasses.replace(episode, latents=stored))
        shard.tar.write(sample)
        # A tar is made of blocks of 512 bytes: one for a member's header, and those that its content begins.
        shard.bytes += sum(512 * (1 + -(-len(data) // 512)) for name, data in sample.items() if name != "__key__")
        shard.episodes.append(episode.info)
        if shard.bytes >= self._shard_bytes:
            self._finish_shard()

    def close(self) -> LatentMeta:
        """Finishes the last shard and writes meta.json, last and atomically; returns the final meta."""
        if self._closed:
            return self.meta
        if self._open:
            self._finish_shard()
        if not self._keys:
            raise UserError(f"{self.root}: no episode was added; a folder of latents holds at least one")
        changes: dict[str, Any] = {}
        if self._measure:
            changes["mean"], changes["std"] = self._statistics.mean_std()
        if self._latent_actions.count and self.meta.latent_action_mean is None:
            changes["latent_action_mean"], changes["latent_action_std"] = self._latent_actions.mean_std()
        self.meta = dataclasses.replace(self.meta, **changes)
        statistics = self._statistics if self._measure else None
        write_latent_meta(self.root, self.meta, str(self._dtype), self._shards, self._provenance, statistics)
        (self.root / _BEGUN).unlink(missing_ok=True)
        self._closed = True
        return self.meta

    def __enter__(self) -> LatentShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._open:
            writing, self._open = self._open.writing, None
            writing.__exit__(kind, error, trace)

    def _check(self, episode: LatentEpisode) -> None:
        expected = (self.meta.tokens, self.meta.latent_dim)
        if episode.latents.shape[1:] != expected:
            raise UserError(
                f"{episode.key}: expected latents (frames, {expected[0]}, {expected[1]}) for grid {self.meta.grid}, "
                f"got {episode.latents.shape}"
            )
        if not np.isfinite(episode.latents).all():
            raise UserError(f"{episode.key}: some latents are not finite numbers; did the tokenizer diverge?")
        if episode.key in self._keys:
            raise UserError(f"{episode.key}: an episode with this key was already written to {self.root}")
        self._keys.add(episode.key)

    def _finish_shard(self) -> None:
        assert self._open is not None
        shard, self._open = self._open, None
        shard.writing.close()
        infos = shard.episodes
        described = [info.to_dict() for info in infos]
        self._shards.append({**_describe_tar(shard.path), "keys": [info.key for info in infos], "episodes": described})


@dataclass
class _OpenShard:
    """A tar under way: its writer, where it will stand, what closes it, what it holds so far."""

    tar: Any
    path: Path
    writing: ExitStack
    episodes: list[EpisodeInfo] = field(default_factory=list)
    bytes: int = 0


@dataclass(frozen=True)
class _Tar:
    """What meta.json says of any tar."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][\w.-]*\.tar$")]
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Digest


@dataclass(frozen=True)
class _Shard(_Tar):
    """What meta.json says of a tar of latents."""

    keys: list[str]
    episodes: list[EpisodeInfo] = field(default_factory=list)  # files of before 0.1 have none
    labels: _Tar | None = None  # beside it; shards that version 0.1 labelled hold their latent actions themselves

    def __post_init__(self) -> None:
        if self.episodes and [info.key for info in self.episodes] != self.keys:
            raise UserError(f"{self.name}: keys and episodes name other samples")


@dataclass(frozen=True)
class _Document:
    """What meta.json says."""

    dtype: Literal["float32", "float16"]
    num_episodes: Count
    meta: dict[str, Any]
    shards: list[_Shard]
    provenance: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Any] | None = None
    sha256: Digest | None = None  # of the rest; folders of version 0.1 have none

    def __post_init__(self) -> None:
        keys = [key for shard in self.shards for key in shard.keys]
        if len(set(keys)) != len(keys) or len(keys) != self.num_episodes:
            raise UserError(f"num_episodes is {self.num_episodes}, the shards list {len(set(keys))} different keys")
        if len({shard.labels is None for shard in self.shards}) > 1:
            raise UserError("some of the shards have labels, others have none")


class LatentShards(Sequence[Any]):  # of LatentEpisode; type checks at run time would read one of them at each call
    """Random access to a finished folder of latent shards.

    The first time that a shard is touched, its SHA-256 is compared with meta.json, see `VerifiedFiles`.

    Args:
        root: folder written by `LatentShardWriter`.
        expect_digest: refuse latents that another tokenizer made (`RepViTok.digest()`).
        labels: False leaves out labels beside the shards, which then need not be whole.
    """

    def __init__(self, root: str | os.PathLike[str], *, expect_digest: str | None = None, labels: bool = True) -> None:
        self.root = Path(root)
        document = _read_document(self.root)
        self.meta = LatentMeta.from_dict(document["meta"], f"{self.root / 'meta.json'}, field 'meta'")
        if document.get("sha256") not in (None, _document_digest(document)):
            raise UserError(
                f"{self.root / 'meta.json'}: its SHA-256 is not the one that it names: it was changed or damaged; copy "
                'it again, or, if you changed it on purpose, remove its field "sha256"'
            )
        if expect_digest is not None and expect_digest != self.meta.tokenizer_digest:
            raise UserError(
                f"{self.root}: these latents were made by tokenizer {self.meta.tokenizer_digest[:16]}, expected "
                f"{expect_digest[:16]}; encode the data set again with the tokenizer in use, or load the other one"
            )
        self.provenance: dict[str, Any] = document.get("provenance", {})
        self.dtype: str = document["dtype"]
        self._sums: dict[str, Any] | None = document.get("statistics")
        self._shards: list[dict[str, Any]] = document["shards"]
        if not labels:
            self._shards = [{**shard, "labels": None} for shard in self._shards]
        self._tars = [tar for shard in self._shards for tar in (shard, shard.get("labels")) if tar]
        for tar in self._tars:
            path = self.root / tar["name"]
            if not path.is_file():
                raise UserError(f"{path}: missing, though meta.json lists it; copy the whole folder or make it again")
            if path.stat().st_size != tar["bytes"]:
                raise UserError(
                    f"{path}: expected {tar['bytes']} bytes, found {path.stat().st_size}; the shard is truncated or "
                    "damaged: copy it again or make it again"
                )
        self._where = [(shard, key) for shard in self._shards for key in shard["keys"]]
        self._ranges: LastUsed[str, dict[str, tuple[int, int]]] = LastUsed(2 * OPEN_SHARDS)
        self._maps: LastUsed[str, np.memmap] = LastUsed(2 * OPEN_SHARDS)
        self._touched: set[str] = set()
        self._verified = VerifiedFiles(self.root, sum(tar["bytes"] for tar in self._tars))

    @property
    def keys(self) -> list[str]:
        """The episodes' keys, in order."""
        return [key for _, key in self._where]

    @property
    def paths(self) -> list[Path]:
        """The tars of latents, readable by webdataset too."""
        return [self.root / shard["name"] for shard in self._shards]

    @property
    def entries(self) -> list[dict[str, Any]]:
        """What meta.json says of each tar of latents: name, bytes, sha256, keys, episodes, perhaps labels."""
        return [dict(shard) for shard in self._shards]

    @property
    def has_labels_beside(self) -> bool:
        """Whether latent actions lie in tars of their own; False where there are none, or where 0.1 wrote them."""
        return len(self._tars) > len(self._shards)

    @property
    def statistics(self) -> ChannelStatistics:
        """The sums behind mean and std; ValueError where they were not stored."""
        if self._sums is None:
            raise UserError(f"{self.root}: meta.json has no sums of its latents; encode the data set again")
        return ChannelStatistics.from_dict(self._sums, f"{self.root / 'meta.json'}, field 'statistics'")

    def __len__(self) -> int:
        return len(self._where)

    @cached_property
    def infos(self) -> list[EpisodeInfo]:
        """What meta.json says of each episode, in order; no tar is opened, unless it is older than this list."""
        if all(shard.get("episodes") for shard in self._shards):
            return [EpisodeInfo(**values) for shard in self._shards for values in shard["episodes"]]
        return [episode.info for episode in self]

    @cached_property
    def recorded(self) -> list[int]:
        """Numbers of the data set's episodes that were to be encoded, those too short to be among them included."""
        left_out = parse(self.provenance.get("left_out"), str | None, f"{self.root / 'meta.json'}, provenance.left_out")
        return sorted({info.episode_index for info in self.infos}.union(*parse_episodes(left_out) if left_out else ()))

    def __getitem__(self, index: int) -> LatentEpisode:  # type: ignore[override]  # no slices
        shard, key = self._where[index]
        path = self._path(shard)
        episode = _read_episode(path, key, self._ranges_of(shard))
        if episode.latents.shape[1:] != (expected := (self.meta.tokens, self.meta.latent_dim)):
            raise UserError(
                f"{path}: episode {key} has latents {episode.latents.shape}, meta.json says (frames, "
                f"{expected[0]}, {expected[1]}); encode the data set again"
            )
        if shard.get("labels"):
            labels = np.array(self.mapped(index)["latent_actions"], np.float32)
            episode = dataclasses.replace(episode, latent_actions=labels)
        return dataclasses.replace(episode, task=self._tasks.get(key, episode.task))

    @cached_property
    def _tasks(self) -> dict[str, str]:
        """Key -> instruction, by meta.json: where both have one, the tar's is older (`replace_instructions`)."""
        return {values["key"]: values["task"] for shard in self._shards for values in shard.get("episodes", ())}

    def mapped(self, index: int) -> dict[str, np.ndarray]:
        """The arrays of an episode as they lie on disk, read-only: only what is sliced out of them is read.

        Returns:
            name of an array of `LatentEpisode` -> memory map, in the type it is stored in. Valid as long as it is held.
        """
        shard, key = self._where[index]
        where = f"{self.root / shard['name']}: episode {key}"
        found: dict[str, np.ndarray] = {}
        for tar in filter(None, (shard, shard.get("labels"))):  # labels beside a shard go before those inside it
            ranges = self._ranges_of(tar)
            content = self._maps.get_or_make(tar["name"], lambda tar=tar: np.memmap(self._path(tar), np.uint8, "r"))
            for name in _ARRAYS:
                if (member := f"{key}.{name}.npy") in ranges:
                    start, length = ranges[member]
                    found[name] = _array_at(content[start : start + length], f"{where}, {name}")
        if "latents" not in found:
            raise UserError(f"{where} has no latents; encode the data set again")
        return found

    def _path(self, tar: Mapping[str, Any]) -> Path:
        """The file of a tar, whose content was compared with meta.json in this run or before."""
        path = self.root / tar["name"]
        if tar["name"] not in self._touched:
            self._verified.require(path, tar["sha256"])
            self._touched.add(tar["name"])
        return path

    def _ranges_of(self, tar: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        return self._ranges.get_or_make(tar["name"], lambda: _member_ranges(self._path(tar)))

    def __iter__(self) -> Iterator[LatentEpisode]:
        return (self[index] for index in range(len(self)))

    def verify(self) -> None:
        """Compares every tar's SHA-256 with meta.json, whenever it was last compared; UserError names the first that
        differs.
        """
        for tar in self._tars:
            self._verified.require(self.root / tar["name"], tar["sha256"], again=True)


def replace_instructions(
    shards: LatentShards, tasks: Mapping[int, str], source: InstructionSource
) -> dict[int, tuple[str, str]]:
    """Gives finished latents other instructions, whole or not at all; open the folder anew to see them.

    Only meta.json is written, which is what says the instruction of an episode. The tars stay as they are, with their
    digests; the text in a tar's own json member is the one that was known when it was encoded.

    Args:
        shards: the latents.
        tasks: number of an episode in the data set -> its instruction; others keep theirs.
        source: where these instructions come from.

    Returns:
        number of each episode that had another instruction -> that one, the new one.
    """
    infos = {info.key: info for info in shards.infos}
    new = {key: tasks.get(info.episode_index, info.task) for key, info in infos.items()}
    changes = {info.episode_index: (info.task, new[key]) for key, info in infos.items() if info.task != new[key]}
    if changes:
        with sole_writer(shards.root):
            document = _read_document(shards.root)  # it may have got labels since
            for shard in document["shards"]:
                shard["episodes"] = [{**infos[key].to_dict(), "task": new[key]} for key in shard["keys"]]
            document["meta"]["instruction_source"] = source
            _write_document(shards.root, document)
    return changes


def write_labels(
    shards: LatentShards,
    out: Path,
    lat_digest: str,
    labels_of: Callable[[EpisodeInfo], Float[np.ndarray, "_ l"]],
    frames: int = 1,
) -> LatentMeta:
    """Puts latent actions beside finished latents, a tar for each shard; meta.json, written last, says which is whose.

    Args:
        shards: the latents. The tars of another `out` are theirs by hard links (copies, where it is another disk):
            so the folder needs no other one, and costs no space.
        out: their own folder, or one that holds nothing but what killed calls of this function left.
        lat_digest: of the latent action tokenizer.
        labels_of: gives the latent actions of an episode, (frames - 1, l).
        frames: latent frames that a latent action stands for, `LatentMeta.latent_action_frames`.

    Returns:
        The meta of `out`.
    """
    with sole_writer(out):
        document, statistics = _read_document(shards.root), ChannelStatistics()
        infos, elsewhere = {info.key: info for info in shards.infos}, not out.samefile(shards.root)
        for leftover in (*out.glob(TARS), *out.glob(f".partial-{TARS}")) if elsewhere else ():
            leftover.unlink()
        for number, shard in enumerate(document["shards"]):
            path = out / f"labels-{number:06d}.tar"
            with atomic_file(path) as partial, tar_writer(partial) as tar:
                for key in shard["keys"]:
                    array = labels_of(infos[key])
                    if len(array):
                        statistics.add(array)
                    tar.write({"__key__": key, "latent_actions.npy": _npy(array)})
            shard["labels"] = _describe_tar(path)
            if elsewhere:
                link_or_copy(shards.root / shard["name"], out / shard["name"])
        meta = LatentMeta.from_dict(document["meta"])
        mean, std = statistics.mean_std() if statistics.count else (None, None)
        labelled = {"lat_digest": lat_digest, "latent_action_mean": mean, "latent_action_std": std}
        meta = dataclasses.replace(meta, **labelled, latent_action_frames=frames)
        _write_document(out, {**document, "meta": meta.to_dict()})
    return meta


def write_latent_meta(
    root: Path,
    meta: LatentMeta,
    dtype: str,
    shards: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
    statistics: ChannelStatistics | None,
) -> None:
    """Writes meta.json, whole or not at all: with it, `root` counts as finished.

    Args:
        root: the folder.
        meta: what the shards hold.
        dtype: of the latents on disk.
        shards: name, bytes, sha256 and keys of each tar.
        provenance: JSON values that say how the latents were made.
        statistics: the sums behind meta's mean and std, where they were measured here.
    """
    document = {
        "dtype": dtype,
        "num_episodes": sum(len(shard["keys"]) for shard in shards),
        "meta": meta.to_dict(),
        "provenance": dict(provenance),
        "statistics": None if statistics is None else statistics.to_dict(),
        "shards": list(shards),
    }
    _write_document(root, document)


def _write_document(root: Path, document: Mapping[str, Any]) -> None:
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **document}
    write_json_atomic(root / "meta.json", {**document, "sha256": _document_digest(document)})


def _document_digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of what meta.json says, but for its format and the digest itself."""
    content = {name: value for name, value in document.items() if name not in ("format", "format_version", "sha256")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def refuse_foreign_tars(root: Path, *own: str) -> None:
    """Stops before latents are written into a folder that holds anything but unfinished latents."""
    begun = any((root / name).exists() for name in (*_WORK, LABEL_WORK))
    refuse_foreign(root, (TARS, _LABEL_TARS, *own) if begun else own, "unfinished latents")


def remove_work(root: Path, *more: str) -> None:
    """Removes what finished latents were made from: the last thing a verb does, or the first of the next one.

    Labels may be under way in finished latents, so who has made them names `LABEL_WORK`, too.
    """
    for name in (*_WORK, *more):
        shutil.rmtree(root / name, ignore_errors=True)
    with suppress(OSError):  # shards of others may be read-only
        (root / _BEGUN).unlink(missing_ok=True)


@contextmanager
def tar_writer(path: Path) -> Iterator[Any]:
    """webdataset's `TarWriter` of a file, which writes the same bytes every time: no dates, no names of users."""
    from webdataset.writer import TarWriter  # it loads torch; who only reads does without

    with open(path, "wb") as file, TarWriter(file, user="", group="", mode=0o644, encoder=False, mtime=0) as tar:
        yield tar


def episode_sample(episode: LatentEpisode) -> dict[str, Any]:
    """An episode as a WebDataset sample: `<key>.<array>.npy` for each of its arrays, and `<key>.json`."""
    described = {"episode_index": episode.episode_index, "offset": episode.offset, "task": episode.task}
    if episode.augmentation:
        described["augmentation"] = episode.augmentation
    arrays = {f"{name}.npy": _npy(a) for name in _ARRAYS if (a := getattr(episode, name)) is not None}
    return {"__key__": episode.key, **arrays, "json": json.dumps(described, sort_keys=True).encode()}


def write_episode_file(path: Path, episode: LatentEpisode, *, dtype: str = "float32") -> None:
    """Writes one episode as a tar of its own, whole or not at all: what a resumable job keeps while it runs."""
    stored = dataclasses.replace(episode, latents=np.ascontiguousarray(episode.latents.astype(dtype)))
    with atomic_file(path) as partial, tar_writer(partial) as tar:
        tar.write(episode_sample(stored))


def read_episode_file(path: Path) -> LatentEpisode:
    """Reads a file written by `write_episode_file`; its name without the suffix is the episode's key."""
    return _read_episode(path, path.stem, _member_ranges(path))


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _describe_tar(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _read_document(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected latent shards written by `repvitok encode`")
    path = root / "meta.json"
    if (root / "meta/info.json").is_file():
        raise UserError(
            f"{root} is a LeRobot data set, not its latents: make them with `repvitok encode --dataset {root} "
            "--tokenizer TOKENIZER --out LATENTS`"
        )
    if not path.is_file():
        raise UserError(f"{root} has no meta.json: it holds no latent shards, or encoding them never finished")
    document = require_format(load_json(path), FORMAT, FORMAT_VERSION, str(path))
    parse(document, _Document, str(path))
    return document


def _member_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """Member name -> (first byte, length) of an uncompressed tar."""
    try:
        with tarfile.open(path, "r:") as tar:
            return {member.name: (member.offset_data, member.size) for member in tar}
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a whole tar ({error}); copy it again or encode again") from error


def _array_at(member: np.ndarray, where: str) -> np.ndarray:
    """The array of an npy member, over the member's own bytes: nothing is made by what its header claims."""
    header = io.BytesIO(member[:NPY_HEADER_BYTES].tobytes())
    try:
        if np.lib.format.read_magic(header) != (1, 0):
            raise ValueError("not version 1.0 of the format")
        shape, column_major, dtype = np.lib.format.read_array_header_1_0(header)
        if dtype.kind != "f" or column_major:
            raise ValueError(f"expected floating point numbers by rows, got {dtype}")
        return member[header.tell() :].view(dtype).reshape(shape)
    except ValueError as error:
        raise UserError(f"{where}: no readable npy array ({error}); encode the data set again") from error


def _read_episode(path: Path, key: str, members: dict[str, tuple[int, int]]) -> LatentEpisode:
    def member(name: str) -> bytes:
        start, length = members[f"{key}.{name}"]
        file.seek(start)
        return file.read(length)

    with open(path, "rb") as file:
        try:
            described = parse(json.loads(member("json")), _Described, f"{path}: episode {key}")
            arrays = {
                name: _array_at(np.frombuffer(member(f"{name}.npy"), np.uint8), f"{path}: episode {key}, {name}")
                for name in _ARRAYS
                if f"{key}.{name}.npy" in members
            }
            arrays = {name: np.array(array, np.float32) for name, array in arrays.items()}
            entry = described.episode_index, described.offset, described.task
            return LatentEpisode(key, *entry, **arrays, augmentation=described.augmentation)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: episode {key} cannot be read ({error}); encode the data set again") from error


@dataclass(frozen=True)
class _Described:
    """The json member of an episode."""

    episode_index: Count
    offset: Count
    task: str
    augmentation: Count = 0
