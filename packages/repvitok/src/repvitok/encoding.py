"""Encodes whole data sets to latent shards."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from repvitok.data.atomic import write_json_atomic
from repvitok.data.lerobot_format import EpisodeInfo
from repvitok.data.shards import (
    LatentEpisode,
    LatentMeta,
    LatentShards,
    LatentShardWriter,
    read_episode_file,
    write_episode_file,
)
from repvitok.data.transforms import resize_frames, to_unit
from repvitok.errors import require_disk_space
from repvitok.model import RepViTok
from repvitok.progress import progress as progress_bar

_DECODE_BLOCK = 64  # raw frames decoded at full size at a time
_TOKENS_PER_STEP = 2**14  # tokens encoded at a time, over all streams: bounds memory


@runtime_checkable
class EpisodeReader(Protocol):
    """What `encode_dataset` needs of a data set; `LeRobotReader` has it."""

    root: Path
    fps: float
    camera_keys: list[str]
    features: dict[str, dict[str, Any]]
    episodes: list[EpisodeInfo]

    def episode(self, index: int) -> dict[str, np.ndarray]: ...
    def frames(
        self, episode: int, camera: str, frames: Sequence[int] | None = None
    ) -> UInt8[np.ndarray, "n h w 3"]: ...
    def channel_names(self, key: str) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class EncodingPlan:
    """Everything that decides which latents come out; a folder begun under one plan is only continued under it.

    Attributes:
        tokenizer_digest: `RepViTok.digest()`.
        source: the data set's folder name.
        num_episodes, num_frames: of the data set.
        size: (H, W) the frames are resized to.
        stride: every stride-th raw frame is encoded.
        offsets: each episode is encoded once per offset, without its first `offset` raw frames.
        cameras: in token order.
        window: latent frames the encoding stream attends over.
        dtype: of the latents on disk.
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

    def to_dict(self) -> dict[str, Any]:
        """As JSON gives it back: tuples as lists."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def encode_dataset(
    tok: RepViTok,
    reader: EpisodeReader,
    out: str | os.PathLike[str],
    *,
    size: tuple[int, int],
    stride: int = 1,
    offsets: Sequence[int] = (0,),
    cameras: Sequence[str] | None = None,
    dtype: str = "float32",
    batch_size: int = 8,
    progress: bool = False,
) -> LatentMeta:
    """Turns every episode of a data set into latents, with its states and actions alongside.

    Episodes are streamed with the bounded window `tok.config.episode_window`, as the policy streams them while it
    drives. Episodes of like length, all offsets and all cameras run side by side; the next ones are decoded meanwhile.
    A killed run continues where it stopped, episode by episode; a finished one returns at once.

    Args:
        tok: the tokenizer, on the device to encode on.
        reader: the data set.
        out: folder for the shards.
        size: (H, W) to resize frames to, multiples of the patch size.
        stride: encode every stride-th raw frame.
        offsets: encode each episode once per offset o, beginning at raw frame o: as many views of where the
            tubelets may begin.
        cameras: None for all, in the data set's order. Their tokens lie one camera behind the other.
        dtype: "float32" or "float16", of the latents on disk.
        batch_size: streams side by side (at least one episode with its offsets and cameras).
        progress: draw the progress bar even where stderr is no terminal.

    Returns:
        The meta of the finished shards; mean and std over all latents written.

    Raises:
        ValueError: a size, stride, offset or camera does not fit, an episode is too short for an offset, a video is
            damaged, or `out` holds latents made otherwise.
    """
    out = Path(out)
    plan = _make_plan(tok, reader, size, stride, offsets, cameras, dtype)
    if (out / "meta.json").exists():
        return _require_same_plan(LatentShards(out), plan)
    meta = _describe(tok, reader, plan)
    work = _open_work_folder(out, plan)
    _require_space(out, reader, plan, meta, tok.config.tubelet_frames)
    with progress_bar(desc="encode", total=float(plan.num_frames), unit="frame", force=progress) as bar:
        for batch in _loaded_batches(reader, plan, work, batch_size, bar):
            for episode in _encode_batch(tok, batch, plan):
                write_episode_file(work / f"{episode.key}.tar", episode, dtype=dtype)
            bar.update(sum(item.info.length for item in batch))
    with LatentShardWriter(out, meta, dtype=dtype, provenance=plan.to_dict()) as writer:
        for info in reader.episodes:
            for offset in plan.offsets:
                writer.add(read_episode_file(_work_file(work, info, offset)))
    shutil.rmtree(work)
    return writer.meta


@dataclass(frozen=True, eq=False)
class _LoadedEpisode:
    """One episode ready to encode: camera frames resized, (views, T, h, w, 3) uint8, and its columns."""

    info: EpisodeInfo
    pixels: np.ndarray
    columns: Mapping[str, np.ndarray]


def _make_plan(
    tok: RepViTok,
    reader: EpisodeReader,
    size: tuple[int, int],
    stride: int,
    offsets: Sequence[int],
    cameras: Sequence[str] | None,
    dtype: str,
) -> EncodingPlan:
    tok.grid(*size)
    chosen = tuple(cameras or reader.camera_keys)
    unknown = [camera for camera in chosen if camera not in reader.camera_keys]
    if unknown or not chosen:
        raise ValueError(f"{reader.root}: no cameras {unknown}; there are {reader.camera_keys}")
    if dtype not in ("float32", "float16"):
        raise ValueError(f'dtype must be "float32" or "float16", got {dtype!r}')
    if stride < 1:
        raise ValueError(f"stride must be 1 or more, got {stride}")
    if not offsets or min(offsets) < 0 or len(set(offsets)) != len(offsets):
        raise ValueError(f"offsets must be different numbers of raw frames, 0 or more, got {list(offsets)}")
    for info in reader.episodes:
        if info.length <= max(offsets):
            raise ValueError(
                f"{reader.root}: episode {info.index} has {info.length} frames, none after offset {max(offsets)}"
            )
    return EncodingPlan(
        tokenizer_digest=tok.digest(),
        source=reader.root.name,
        num_episodes=len(reader.episodes),
        num_frames=sum(info.length for info in reader.episodes),
        size=(int(size[0]), int(size[1])),
        stride=stride,
        offsets=tuple(int(offset) for offset in offsets),
        cameras=chosen,
        window=tok.config.episode_window,
        dtype=dtype,
    )


def _describe(tok: RepViTok, reader: EpisodeReader, plan: EncodingPlan) -> LatentMeta:
    return LatentMeta(
        tokenizer_digest=plan.tokenizer_digest,
        frame_rate_hz=reader.fps,
        stride=plan.stride,
        grid=(len(plan.cameras), *tok.grid(*plan.size)),
        cameras=plan.cameras,
        latent_dim=tok.config.latent_dim,
        window=plan.window,
        source=plan.source,
        action_names=reader.channel_names("action") if "action" in reader.features else (),
        state_names=reader.channel_names("observation.state") if "observation.state" in reader.features else (),
    )


def _require_same_plan(shards: LatentShards, plan: EncodingPlan) -> LatentMeta:
    _refuse_other_plan(shards.root, shards.provenance, plan)
    return shards.meta


def _refuse_other_plan(out: Path, found: Mapping[str, Any], plan: EncodingPlan) -> None:
    wanted = plan.to_dict()
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        lines = ", ".join(f"{key} {found.get(key)} (now {wanted[key]})" for key in differing)
        raise ValueError(f"{out} holds latents made otherwise: {lines}; remove the folder or choose another")


def _open_work_folder(out: Path, plan: EncodingPlan) -> Path:
    """out/.work, where finished episodes wait; ValueError if another plan began it."""
    work = out / ".work"
    path = work / "plan.json"
    if path.is_file():
        _refuse_other_plan(out, json.loads(path.read_text(encoding="utf-8")), plan)
    else:
        write_json_atomic(path, plan.to_dict())
    return work


def _require_space(out: Path, reader: EpisodeReader, plan: EncodingPlan, meta: LatentMeta, tubelet_frames: int) -> None:
    """The latents lie on disk twice while the shards are put together."""
    latents = len(plan.offsets) * sum(info.length // (tubelet_frames * plan.stride) + 1 for info in reader.episodes)
    size_bytes = 2 * latents * meta.tokens * meta.latent_dim * np.dtype(plan.dtype).itemsize
    require_disk_space(out, size_bytes, "latent shards")


def _work_file(work: Path, info: EpisodeInfo, offset: int) -> Path:
    return work / f"{_key(info, offset)}.tar"


def _key(info: EpisodeInfo, offset: int) -> str:
    return f"episode_{info.index:06d}-o{offset}"


def _loaded_batches(
    reader: EpisodeReader, plan: EncodingPlan, work: Path, batch_size: int, bar: Any
) -> Iterator[list[_LoadedEpisode]]:
    """The batches that are still to do, the next one decoded by a thread while the caller encodes.

    Which episodes share a batch depends on the plan alone, so that a continued run computes the same latents.
    """
    per_batch = max(1, batch_size // (len(plan.offsets) * len(plan.cameras)))
    by_length = sorted(reader.episodes, key=lambda info: (info.length, info.index))
    batches = [by_length[start : start + per_batch] for start in range(0, len(by_length), per_batch)]
    waiting = []
    for batch in batches:
        if all(_work_file(work, info, offset).is_file() for info in batch for offset in plan.offsets):
            bar.update(sum(info.length for info in batch))
        else:
            waiting.append(batch)
    with ThreadPoolExecutor(max_workers=1) as decoder:
        future = decoder.submit(_load_batch, reader, plan, waiting[0]) if waiting else None
        for number in range(len(waiting)):
            assert future is not None
            loaded = future.result()
            if number + 1 < len(waiting):
                future = decoder.submit(_load_batch, reader, plan, waiting[number + 1])
            yield loaded


def _load_batch(reader: EpisodeReader, plan: EncodingPlan, batch: Sequence[EpisodeInfo]) -> list[_LoadedEpisode]:
    return [
        _LoadedEpisode(
            info,
            np.stack([_resized_episode(reader, info, camera, plan.size) for camera in plan.cameras]),
            reader.episode(info.index),
        )
        for info in batch
    ]


def _resized_episode(reader: EpisodeReader, info: EpisodeInfo, camera: str, size: tuple[int, int]) -> np.ndarray:
    blocks = [range(start, min(start + _DECODE_BLOCK, info.length)) for start in range(0, info.length, _DECODE_BLOCK)]
    return np.concatenate([resize_frames(reader.frames(info.index, camera, block), size) for block in blocks])


def _encode_batch(tok: RepViTok, batch: Sequence[_LoadedEpisode], plan: EncodingPlan) -> Iterator[LatentEpisode]:
    """The latents of some episodes, at every offset."""
    jobs = [(item, offset) for item in batch for offset in plan.offsets]
    clips = [view[offset :: plan.stride] for item, offset in jobs for view in item.pixels]
    latents = _stream_clips(tok, clips, plan.window)
    views = len(plan.cameras)
    for number, (item, offset) in enumerate(jobs):
        cameras = latents[number * views : (number + 1) * views]
        joined = np.concatenate(cameras, axis=1)
        yield align_episode(item.info, offset, joined, item.columns, plan.stride, tok.config.tubelet_frames)


def align_episode(
    info: EpisodeInfo,
    offset: int,
    latents: Float[np.ndarray, "frames tokens d"],
    columns: Mapping[str, np.ndarray],
    stride: int,
    tubelet_frames: int,
) -> LatentEpisode:
    """Puts states and actions beside latents.

    The last raw frame of latent k is last(k) = offset + f * stride * k (f = 4 frames a tubelet). state[k] is the state
    at last(k); actions[k] are the actions last(k) .. last(k+1) - 1, because a data set's action i is executed after
    its frame i. Example, f = 4, stride 1, offset 0: latents end at frames 0, 4, 8; transition 0 holds actions 0..3.
    """
    per_transition = tubelet_frames * stride
    last = offset + per_transition * np.arange(len(latents))
    state, actions = columns.get("observation.state"), columns.get("action")
    if state is not None:
        state = state.reshape(len(state), -1)[last].astype(np.float32)
    if actions is not None:
        rows = last[:-1, None] + np.arange(per_transition)
        actions = actions.reshape(len(actions), -1)[rows].astype(np.float32)
    return LatentEpisode(_key(info, offset), info.index, offset, info.task, latents, state, actions)


@torch.no_grad()
def _stream_clips(
    tok: RepViTok, clips: Sequence[UInt8[np.ndarray, "_ h w 3"]], window: int | None
) -> list[Float[np.ndarray, "_ tokens d"]]:
    """Latents of clips of about equal length, streamed side by side.

    A clip is cut to its last 1 + f n frames; a shorter one is continued with its last frame and those latents are
    dropped, which changes none before them, because the tokenizer is causal.
    """
    f, parameter = tok.config.tubelet_frames, next(tok.parameters())
    counts = [1 + (len(clip) - 1) // f for clip in clips]
    tokens = int(np.prod(tok.grid(*clips[0].shape[1:3])))
    step = max(1, _TOKENS_PER_STEP // (len(clips) * tokens))
    stream = tok.stream(batch_size=len(clips), window=window)
    parts: list[Tensor] = []
    for start in range(0, max(counts), step):
        stop = min(start + step, max(counts))
        frames = np.arange(0 if start == 0 else 1 + f * (start - 1), 1 + f * (stop - 1))
        picked = [clip[np.minimum(frames, f * (count - 1))] for clip, count in zip(clips, counts, strict=True)]
        pixels = rearrange(torch.from_numpy(np.stack(picked)), "b t h w rgb -> b rgb t h w")
        parts.append(stream.encode(to_unit(pixels.to(parameter.device)).to(parameter.dtype)).float().cpu())
    latents = torch.cat(parts, dim=1).numpy()
    return [np.ascontiguousarray(row[:count]) for row, count in zip(latents, counts, strict=True)]
