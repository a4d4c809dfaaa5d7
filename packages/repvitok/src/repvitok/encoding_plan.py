"""What decides which latents come out of an encoding, and how a job array shares the episodes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from repvitok.data.latents import InstructionSource, LatentMeta
from repvitok.data.lerobot.format import ROBOT_COLUMNS, EpisodeInfo
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.lerobot.tables import robot_numbers
from repvitok.data.split import EpisodeNumbers, choose_episodes, format_episodes
from repvitok.interface import VideoTokenizer
from repvitok.runtime.errors import UserError

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
