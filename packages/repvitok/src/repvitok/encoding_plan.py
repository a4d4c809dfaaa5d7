"""Which latents come out of an encoding, which job of an array makes them, and how finished folders are joined.

A finished folder also takes the instructions that were corrected in its data set since (`relabel_latents`).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from repvitok.data.latents import ChannelStatistics, InstructionSource, LatentMeta
from repvitok.data.lerobot.format import ROBOT_COLUMNS, EpisodeInfo
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.lerobot.tables import robot_numbers
from repvitok.data.shards import LatentShards, remove_work, replace_instructions, write_latent_meta
from repvitok.data.split import EpisodeNumbers, choose_episodes, format_episodes
from repvitok.data.transforms import Augmentation
from repvitok.interface import VideoTokenizer
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import link_or_copy, sole_writer
from repvitok.runtime.progress import progress

_PARTS = ".parts"
JobSlice = tuple[int, int]  # (i, n): the i-th of n shares, 0 <= i < n


@runtime_checkable
class EpisodeReader(Protocol):
    """What `encode_dataset` needs of a data set; `LeRobotReader` has it."""

    root: Path
    fps: float
    camera_keys: list[str]
    features: dict[str, dict[str, Any]]
    episodes: list[EpisodeInfo]
    depth_range: tuple[float, float] | None

    def require_camera(self, camera: str) -> None: ...
    def episode(self, index: int, keys: Sequence[str] | None = None) -> dict[str, np.ndarray]: ...
    def frames(
        self, episode: int, camera: str, frames: Sequence[int] | None = None
    ) -> UInt8[np.ndarray, "n h w 3"]: ...
    def channel_names(self, key: str) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class EncodingConfig:
    """Everything that decides which latents come out; a folder begun under one config is only continued under it.

    Attributes:
        tokenizer_digest: `RepViTok.digest()`.
        source: the data set's folder name.
        num_episodes, num_frames: of the episodes that are encoded.
        left_out: numbers of those that were to be and have no frame at an offset; None for none.
        precision: "bfloat16" where the model's products are; None is float32.
        augment: further encodings of each episode at each offset; None for none.
        size: (H, W) the frames are resized to.
        stride: every stride-th raw frame is encoded.
        offsets: each episode is encoded once per offset, without its first `offset` raw frames.
        cameras: in token order.
        window: latent frames the encoding stream attends over.
        dtype: of the latents on disk.
        depth_range: what became black and what white of depth maps.
        episodes: those that are encoded, where it is not all of them, see `repvitok.data.split.format_episodes`.
    """

    tokenizer_digest: str
    source: str
    num_episodes: int
    num_frames: int
    size: tuple[int, int]
    stride: int
    offsets: tuple[int, ...]
    cameras: tuple[str, ...]
    window: int | None
    dtype: str
    depth_range: tuple[float, float] | None = None
    episodes: str | None = None
    left_out: str | None = None
    precision: str | None = None
    augment: Augmentation | None = None

    @property
    def copies(self) -> range:
        """The encodings of an episode at an offset: 0 as it was recorded, then those that are augmented."""
        return range(1 + (self.augment.copies if self.augment else 0))

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back: tuples as lists."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def require_same(self, found: Mapping[str, Any], folder: Path) -> None:
        """Refuses to go on with what `folder` holds, made under the config `found`, if it is not this config."""
        wanted = self.to_dict()
        differing = [key for key in wanted if found.get(key) != wanted[key]]
        if differing:
            lines = ", ".join(f"{key} {found.get(key)} (now {wanted[key]})" for key in differing)
            raise UserError(f"{folder} holds latents made otherwise: {lines}; remove the folder or choose another")


def make_config(
    tok: VideoTokenizer,
    reader: EpisodeReader,
    size: tuple[int, int],
    stride: int,
    offsets: Sequence[int],
    cameras: Sequence[str] | None,
    dtype: str,
    episodes: EpisodeNumbers | None = None,
    precision: str = "float32",
    augment: Augmentation | None = None,
) -> EncodingConfig:
    """The config of an encoding."""
    tok.grid(*size)
    chosen = choose_cameras(reader, cameras)
    asked = infos_of(reader, episodes)
    if dtype not in ("float32", "float16"):
        raise UserError(f'dtype must be "float32" or "float16", got {dtype!r}')
    if precision not in ("float32", "bfloat16"):
        raise UserError(f'precision must be "float32" or "bfloat16", got {precision!r}')
    if stride < 1:
        raise UserError(f"stride must be 1 or more, got {stride}")
    if not offsets or min(offsets) < 0 or len(set(offsets)) != len(offsets):
        raise UserError(f"offsets must be different numbers of raw frames, 0 or more, got {list(offsets)}")
    infos = long_enough(asked, offsets)
    if not infos:
        longest = max((info.length for info in asked), default=0)
        raise UserError(f"{reader.root}: no episode has a frame at offset {max(offsets)}, the longest has {longest}")
    kept = {info.index for info in infos}
    return EncodingConfig(
        tokenizer_digest=tok.digest(),
        source=reader.root.name,
        num_episodes=len(infos),
        num_frames=sum(info.length for info in infos),
        size=(int(size[0]), int(size[1])),
        stride=stride,
        offsets=tuple(int(offset) for offset in offsets),
        cameras=chosen,
        window=tok.config.episode_window,
        dtype=dtype,
        depth_range=reader.depth_range,
        episodes=None if len(asked) == len(reader.episodes) else format_episodes(info.index for info in asked),
        left_out=format_episodes({info.index for info in asked} - kept) if len(infos) < len(asked) else None,
        precision=None if precision == "float32" else precision,
        augment=augment,
    )


def long_enough(episodes: Sequence[EpisodeInfo], offsets: Sequence[int]) -> list[EpisodeInfo]:
    """The episodes that have a frame at every offset."""
    return [info for info in episodes if info.length > max(offsets)]


def choose_cameras(reader: EpisodeReader, cameras: Sequence[str] | None) -> tuple[str, ...]:
    """The cameras to encode, all of the data set's when None."""
    chosen = tuple(cameras or reader.camera_keys)
    for camera in chosen:
        reader.require_camera(camera)
        if chosen.count(camera) > 1:
            raise UserError(f"{reader.root}: expected different cameras, got {camera!r} twice")
    if not chosen:
        raise UserError(f"{reader.root}: the data set has no camera")
    return chosen


def infos_of(reader: EpisodeReader, episodes: EpisodeNumbers | None) -> list[EpisodeInfo]:
    """The episodes to encode, all of the data set's when None; a UserError where there is no such episode."""
    if episodes is None:
        return list(reader.episodes)
    chosen = set(choose_episodes(episodes, [info.index for info in reader.episodes], str(reader.root)))
    return [info for info in reader.episodes if info.index in chosen]


def read_robot_columns(reader: EpisodeReader, episode: int) -> dict[str, np.ndarray]:
    """The actions and states of an episode, as far as there are any: (T, channels) float32 each."""
    columns = reader.episode(episode, [key for key in ROBOT_COLUMNS if key in reader.features])
    return {
        key: robot_numbers(
            column,
            reader.channel_names(key),
            lambda row, key=key: f"{reader.root}: episode {episode}, row {row}, {key}",
        )
        for key, column in columns.items()
    }


def describe_latents(
    tok: VideoTokenizer, reader: EpisodeReader, config: EncodingConfig, episodes: Sequence[EpisodeInfo]
) -> LatentMeta:
    """The meta of the latents to come, but for their mean and standard deviation."""
    return LatentMeta(
        tokenizer_digest=config.tokenizer_digest,
        frame_rate_hz=reader.fps,
        stride=config.stride,
        grid=(len(config.cameras), *tok.grid(*config.size)),
        cameras=config.cameras,
        latent_dim=tok.config.latent_dim,
        window=config.window,
        source=config.source,
        tubelet_frames=tok.config.tubelet_frames,
        instruction_source=instruction_source(reader, episodes),
        depth_range=config.depth_range,
        action_names=reader.channel_names("action") if "action" in reader.features else (),
        state_names=reader.channel_names("observation.state") if "observation.state" in reader.features else (),
    )


def instruction_source(reader: EpisodeReader, episodes: Sequence[EpisodeInfo]) -> InstructionSource:
    """Where a reader has the instructions of these episodes from."""
    if isinstance(reader, LeRobotReader):
        return reader.instruction_source
    return "tasks" if any(info.task for info in episodes) else "none"


def episodes_of_slice(episodes: Sequence[EpisodeInfo], share: JobSlice | None) -> list[EpisodeInfo]:
    """The i-th of n runs of neighbouring episodes of about equally many frames, at least one each; None: all."""
    if share is None:
        return list(episodes)
    index, shares = share
    if not 0 <= index < shares:
        raise UserError(f"shard i/n: expected 0 <= i < n, got {index}/{shares}")
    count = len(episodes)
    if shares > count:
        raise UserError(f"{shares} shares of {count} episodes: choose at most {count}")
    frames = np.cumsum([info.length for info in episodes])
    ends = [0]
    for number in range(1, shares + 1):
        even = int(np.searchsorted(frames, frames[-1] * number / shares, side="left")) + 1
        ends.append(min(max(even, ends[-1] + 1), count - (shares - number)))
    return list(episodes[ends[index] : ends[index + 1]])


def part_folder(out: Path, share: tuple[int, int]) -> Path:
    """Where the i-th of n jobs leaves its shards."""
    return out / _PARTS / f"{share[0]:05d}-of-{share[1]:05d}"


def merge_latents(out: str | os.PathLike[str]) -> LatentMeta:
    """Makes one folder of latent shards of all its parts, and removes the parts.

    Every shard is compared with its SHA-256 first. The files are linked into place, not written again (copied, where
    the file system has no links); mean and standard deviation are computed from the parts' sums in float64, so that
    they are those of one run over everything. meta.json is written last, then the parts go: a merge that was killed is
    begun again, and a finished one is verified and left as it is.

    Args:
        out: the folder given to `encode_dataset` with `shard`.
    """
    out = Path(out)
    if not out.is_dir():
        raise FileNotFoundError(f"{out}: no such folder; expected one that `repvitok encode --shard` wrote to")
    if (out / "meta.json").exists():
        done = LatentShards(out)
        done.verify()
        remove_work(out)
        return done.meta
    with sole_writer(out):
        return _merge(out)


def _merge(out: Path) -> LatentMeta:
    parts = _open_parts(out)
    for part in progress(parts, desc="verify", unit="part"):
        part.verify()
    keys = [key for part in parts for key in part.keys]
    provenance = parts[0].provenance
    copies = (provenance.get("augment") or {"copies": 0})["copies"]
    expected = provenance["num_episodes"] * len(provenance["offsets"]) * (1 + copies)
    if len(keys) != expected or len(set(keys)) != expected:
        raise UserError(f"{out}: the parts hold {len(set(keys))} different of {expected} episodes; encode them again")
    entries: list[dict[str, Any]] = []
    statistics = ChannelStatistics()
    for part in parts:
        for path, entry in zip(part.paths, part.entries, strict=True):
            name = f"latents-{len(entries):06d}.tar"
            (out / name).unlink(missing_ok=True)  # of a merge that was killed
            link_or_copy(path, out / name)
            entry.pop("labels", None)  # of a part that somebody labelled: they are made again, of the whole
            entries.append({**entry, "name": name})
        statistics.merge(part.statistics)
    mean, std = statistics.mean_std()
    unlabelled = dict.fromkeys(("lat_digest", "latent_action_mean", "latent_action_std"))
    meta = dataclasses.replace(parts[0].meta, mean=mean, std=std, latent_action_frames=1, **unlabelled)
    write_latent_meta(out, meta, parts[0].dtype, entries, parts[0].provenance, statistics)
    remove_work(out)
    return meta


def _open_parts(out: Path) -> list[LatentShards]:
    """All parts in order, if they are complete and of one plan."""
    names = sorted(path.name for path in (out / _PARTS).glob("*-of-*"))
    if not names:
        raise UserError(f"{out}: neither finished latents nor parts of a job array (repvitok encode --shard i/n)")
    shares = {name.split("-of-")[1] for name in names}
    if len(shares) > 1:
        raise UserError(f"{out}: parts of job arrays of {sorted(map(int, shares))} jobs; remove those of all but one")
    count = int(shares.pop())
    folders = [part_folder(out, (index, count)) for index in range(count)]
    unfinished = [index for index, folder in enumerate(folders) if not (folder / "meta.json").is_file()]
    if unfinished:
        named = ", ".join(f"{index}/{count}" for index in unfinished[:8]) + (", ..." if len(unfinished) > 8 else "")
        raise UserError(f"{out}: {len(unfinished)} of {count} parts are not finished ({named}); run those jobs again")
    parts = [LatentShards(folder) for folder in folders]
    for part in parts:
        differing = [key for key, value in parts[0].provenance.items() if part.provenance.get(key) != value]
        if differing:
            raise UserError(f"{part.root}: made otherwise than the other parts: {', '.join(differing)} differ")
    return parts


def relabel_latents(
    latents: str | os.PathLike[str], dataset: str | os.PathLike[str], report: Callable[[str], None] | None = None
) -> dict[int, tuple[str, str]]:
    """Gives latents, labelled with latent actions or not, the instructions that their data set has now.

    It is one atomic write of meta.json, so a killed call has done all or nothing, and calling again does what is left.

    Args:
        latents: a finished folder of latent shards.
        dataset: the LeRobot data set that they were made from.
        report: gets a line for each folder and each change.

    Returns:
        number of each episode whose instruction has changed -> the old one, the new one.
    """
    shards, reader = LatentShards(latents), LeRobotReader(dataset)
    # The data set must be the one that was encoded: by its name, its rate, its episodes' numbers and lengths.
    meta, other = shards.meta, f"{shards.root}: these latents were not made from {reader.root}"
    if meta.source not in (reader.root.name, reader.root.resolve().name):
        raise UserError(f"{other}: they come from a data set called {meta.source!r}; give that one, under its name")
    if meta.frame_rate_hz != reader.fps:
        raise UserError(f"{other}: they are of {meta.frame_rate_hz:g} frames per second, it has {reader.fps:g}")
    lengths = {info.index: info.length for info in reader.episodes}
    if missing := {info.episode_index for info in shards.infos} - set(lengths):
        raise UserError(f"{other}: it has no episodes {format_episodes(missing)}, only {format_episodes(lengths)}")
    for info in shards.infos:
        encoded = len(range(info.offset, lengths[info.episode_index], meta.stride))
        expected = 1 + (encoded - 1) // meta.tubelet_frames
        if info.frames != expected:
            raise UserError(
                f"{other}: its episode {info.episode_index} has {lengths[info.episode_index]} frames, which make "
                f"{expected} latent frames from frame {info.offset} on, and {info.frames} were encoded"
            )
    taken = {info.episode_index for info in shards.infos}
    infos = [info for info in reader.episodes if info.index in taken]
    return relabel(shards, infos, reader.instruction_source, report)


def relabel(
    shards: LatentShards,
    infos: Sequence[EpisodeInfo],
    source: InstructionSource,
    report: Callable[[str], None] | None = None,
) -> dict[int, tuple[str, str]]:
    """`relabel_latents` of the very data set, whose episodes are `infos`; reports nothing where nothing changes."""
    changes = replace_instructions(shards, {info.index: info.task for info in infos}, source)
    if changes and report is not None:
        report(f"{shards.root}: {len(changes)} of {len(infos)} episodes have another instruction now")
        for (old, new), count in Counter(changes.values()).items():
            report(f"  {old!r} -> {new!r} ({count} episode{'s' if count > 1 else ''})")
    return changes
