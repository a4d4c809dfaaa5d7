"""Encodes data sets to latent shards, in one process or several, and decodes latent shards to videos."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from repvitok.data.contents import describe_contents, number_columns, require_recorded
from repvitok.data.folders import open_episodes
from repvitok.data.latents import ChannelRange, InstructionSource, LatentEpisode, LatentMeta
from repvitok.data.lerobot.format import EpisodeInfo
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.shards import (
    LatentShards,
    LatentShardWriter,
    read_episode_file,
    refuse_foreign_tars,
    remove_work,
    write_episode_file,
)
from repvitok.data.split import EpisodeNumbers, choose_episodes, left_out
from repvitok.data.transforms import Augmentation, resize_frames, to_frames, to_unit
from repvitok.data.video import write_video
from repvitok.encoding_plan import (
    EncodingConfig,
    EpisodeReader,
    JobSlice,
    choose_cameras,
    describe_latents,
    episodes_of_slice,
    infos_of,
    instruction_source,
    long_enough,
    make_config,
    merge_latents,
    part_folder,
    read_robot_columns,
    relabel,
)
from repvitok.interface import VideoTokenizer
from repvitok.model import load_tokenizer
from repvitok.runtime.documents import read_json
from repvitok.runtime.errors import MOST_PROCESSES, UserError, require_disk_space, run_cli
from repvitok.runtime.files import refuse_foreign, sole_writer, write_json_atomic
from repvitok.runtime.pretrained import find_device
from repvitok.runtime.progress import progress

log = logging.getLogger(__name__)

CLIP_FRAMES = 17  # "clips per second" counts so many frames of one camera
_DECODE_BLOCK = 64  # raw frames decoded at full size at a time
_TOKENS_PER_STEP = 2**14  # tokens encoded at a time, over all streams: bounds memory
_BATCH_BYTES = 2**29  # resized frames of a batch, unless one episode has more: bounds memory
LATENTS_PER_CALL = 8


def encode_dataset(
    tok: VideoTokenizer,
    reader: EpisodeReader,
    out: str | os.PathLike[str],
    *,
    size: tuple[int, int],
    stride: int = 1,
    offsets: Sequence[int] = (0,),
    cameras: Sequence[str] | None = None,
    episodes: EpisodeNumbers | None = None,
    dtype: str = "float32",
    precision: str = "float32",
    augment: int | Augmentation = 0,
    batch_size: int = 8,
    workers: int = 1,
    shard: JobSlice | None = None,
    report: Callable[[str], None] | None = None,
) -> LatentMeta:
    """Turns every episode of a data set into latents, with its states and actions alongside.

    Episodes are streamed with the bounded window `tok.config.episode_window`, as the policy streams them while it
    drives. Episodes of like length, all offsets and all cameras run side by side; the next ones are decoded meanwhile.
    A killed run continues where it stopped, episode by episode; a finished one returns at once. Episodes that have no
    frame at an offset are left out, with a word.

    Args:
        tok: the tokenizer, on the device to encode on.
        reader: the data set.
        out: folder for the shards.
        size: (H, W) to resize frames to, multiples of the patch size.
        stride: encode every stride-th raw frame.
        offsets: encode each episode once per offset o, beginning at raw frame o: as many views of where the
            tubelets may begin.
        cameras: None for all, in the data set's order. Their tokens lie one camera behind the other.
        episodes: numbers of those to encode; None for all.
        dtype: "float32" or "float16", of the latents on disk.
        precision: "float32", the policy's own, or "bfloat16", in which a GPU multiplies faster.
        augment: so many further encodings of each episode with augmented pictures, or an `Augmentation`. No stage
            holds them out, nor trains on those of an episode that it holds out.
        batch_size: streams side by side (at least one episode with its offsets and cameras).
        workers: threads that decode; one uses several cores already where a video's codec can.
        shard: (i, n): encode the i-th of n shares of the episodes only, into a folder of its own below `out`; once
            all n are done, `repvitok.encoding_plan.merge_latents` joins them.
        report: gets a line at the end: how fast it was, and what bounded it; and one where channels never move, or
            where finished latents have got new instructions.

    Returns:
        The meta of the finished shards, or of the finished share; mean and std over all latents written.
    """
    out = Path(out)
    for name, value in (("workers", workers), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} must be 1 or more, got {value}")
    changes = augment if isinstance(augment, Augmentation) else Augmentation(copies=augment) if augment else None
    config = make_config(tok, reader, size, stride, offsets, cameras, dtype, episodes, precision, changes)
    asked = infos_of(reader, episodes)
    everything = long_enough(asked, config.offsets)
    infos = episodes_of_slice(everything, shard)
    target = out if shard is None else part_folder(out, shard)
    short = [info.length for info in asked if info.length <= max(config.offsets)]
    if short and (shard is None or shard[0] == 0):
        needed = f"offset {max(config.offsets)} takes {max(config.offsets) + 1} frames"
        log.warning("%s: %s", reader.root, left_out(short, len(asked), needed))

    instructions = instruction_source(reader, everything)
    if (done := _finished((out, target), config, infos, instructions, report)) is not None:
        return done
    if isinstance(reader, LeRobotReader):
        require_recorded(reader, config.cameras, [info.index for info in infos])
    for folder in (out, target):
        refuse_foreign_tars(folder)
    meta = describe_latents(tok, reader, config, everything)
    with sole_writer(target):
        if (done := _finished((out, target), config, infos, instructions, report)) is not None:  # by another process
            return done
        # The latents lie on disk twice while the shards are put together.
        latents = (
            len(config.copies) * len(config.offsets) * sum(info.length // meta.frames_per_latent + 1 for info in infos)
        )
        size_bytes = 2 * latents * meta.tokens * meta.latent_dim * np.dtype(config.dtype).itemsize
        require_disk_space(target, size_bytes, "latent shards")
        pace = _encode_episodes(tok, reader, target, infos, config, batch_size, workers)
        meta, constant = _write_shards(reader, target, infos, config, meta)
    if report is not None and pace.frames:
        report(f"{target}: {pace}")
    if report is not None and constant:
        report(f"{target}: never moves in these episodes: {'; '.join(constant)}")
    return meta


def _finished(
    folders: Sequence[Path],
    config: EncodingConfig,
    infos: Sequence[EpisodeInfo],
    instructions: InstructionSource,
    report: Callable[[str], None] | None,
) -> LatentMeta | None:
    """The meta of finished latents in one of the folders, if of this config, with the instructions of today.

    What a kill after their last file left is removed.
    """
    for folder in folders:
        if (folder / "meta.json").exists():
            shards = LatentShards(folder)
            config.require_same(shards.provenance, folders[0])
            remove_work(folder)
            relabel(shards, infos, instructions, report)
            return shards.meta
    return None


@dataclass(frozen=True, eq=False)
class _LoadedEpisode:
    """One episode ready to encode: camera frames resized, (copies, views, T, h, w, 3) uint8, and its columns."""

    info: EpisodeInfo
    pixels: np.ndarray
    columns: Mapping[str, np.ndarray]


class Throughput:
    """How fast an encoding goes, and whether decoding or the model bounds it.

    Attributes:
        frames: frames encoded, over all cameras and offsets.
    """

    def __init__(self) -> None:
        self.frames = 0
        self._begun_s, self._waited_s = time.monotonic(), 0.0

    def waiting_for(self, batches: Iterator[list[_LoadedEpisode]]) -> Iterator[list[_LoadedEpisode]]:
        """Passes the batches on, and counts the time spent waiting for each."""
        while True:
            asked_s = time.monotonic()
            batch = next(batches, None)
            self._waited_s += time.monotonic() - asked_s
            if batch is None:
                return
            yield batch

    def __str__(self) -> str:
        spent_s = max(time.monotonic() - self._begun_s, 1e-9)
        waited = self._waited_s / spent_s
        bound = "decoding" if waited > 0.5 else "the model"
        rate = self.frames / CLIP_FRAMES / spent_s
        return f"{rate:.3g} clips/s of {CLIP_FRAMES} frames, bound by {bound} ({waited:.0%} waiting for frames)"


def _encode_episodes(
    tok: VideoTokenizer,
    reader: EpisodeReader,
    target: Path,
    infos: Sequence[EpisodeInfo],
    config: EncodingConfig,
    batch_size: int,
    workers: int,
) -> Throughput:
    """Leaves a file of every episode and offset in target/.work, where those of a killed run are taken as they are."""
    work = target / ".work"
    if (work / "plan.json").is_file():
        config.require_same(read_json(work / "plan.json", dict[str, Any]), target)
    else:
        write_json_atomic(work / "plan.json", config.to_dict())
    pace, waiting = Throughput(), []
    with progress(desc="encode", total=sum(info.length for info in infos), unit="frame") as bar:
        for batch in _batches(infos, config, batch_size):
            if all(_work_file(target, *entry).is_file() for info in batch for entry in _entries(info, config)):
                bar.update(sum(info.length for info in batch))
            else:
                waiting.append(batch)
        for loaded in pace.waiting_for(_loaded(reader, config, waiting, workers)):
            for episode in _encode_batch(tok, loaded, config):
                write_episode_file(work / f"{episode.key}.tar", episode, dtype=config.dtype)
                raw_frames = 1 + tok.config.tubelet_frames * (len(episode.latents) - 1)
                pace.frames += len(config.cameras) * raw_frames
            bar.set_postfix_str(str(pace), refresh=False)
            bar.update(sum(item.info.length for item in loaded))
    return pace


def _write_shards(
    reader: EpisodeReader, target: Path, infos: Sequence[EpisodeInfo], config: EncodingConfig, meta: LatentMeta
) -> tuple[LatentMeta, list[str]]:
    """Joins the episodes' files to shards; returns the final meta, and per column the channels that never move."""
    provenance = {**config.to_dict(), "columns": number_columns(reader)}
    ranges = {"action": ChannelRange(meta.action_names), "observation.state": ChannelRange(meta.state_names)}
    with LatentShardWriter(target, meta, dtype=config.dtype, provenance=provenance) as writer:
        for info in infos:
            for entry in _entries(info, config):
                # An instruction may have been corrected since a killed run encoded its episode.
                episode = dataclasses.replace(read_episode_file(_work_file(target, *entry)), task=info.task)
                ranges["action"].add(episode.actions)
                ranges["observation.state"].add(episode.state)
                writer.add(episode)
    remove_work(target)
    constant = [f"{name} {', '.join(known.constant())}" for name, known in ranges.items() if known.constant()]
    return writer.meta, constant


def _entries(info: EpisodeInfo, config: EncodingConfig) -> list[tuple[EpisodeInfo, int, int]]:
    """The encodings of an episode, by offset and copy."""
    return [(info, offset, copy) for offset in config.offsets for copy in config.copies]


def _work_file(target: Path, info: EpisodeInfo, offset: int, copy: int) -> Path:
    return target / ".work" / f"{_key(info, offset, copy)}.tar"


def _key(info: EpisodeInfo, offset: int, copy: int) -> str:
    return f"episode_{info.index:06d}-o{offset}" + (f"-a{copy}" if copy else "")


def _batches(episodes: Sequence[EpisodeInfo], config: EncodingConfig, batch_size: int) -> list[list[EpisodeInfo]]:
    """Episodes to encode side by side, of like length; decided by the config alone, so that a continued run computes
    the same latents. A batch's resized frames stay below a bound, unless one episode alone has more."""
    most = max(1, batch_size // (len(config.copies) * len(config.offsets) * len(config.cameras)))
    frame_bytes = 3 * len(config.copies) * len(config.cameras) * config.size[0] * config.size[1]
    batches: list[list[EpisodeInfo]] = []
    held = 0
    for info in sorted(episodes, key=lambda info: (info.length, info.index)):
        held += info.length * frame_bytes
        if not batches or len(batches[-1]) == most or held > _BATCH_BYTES:
            batches.append([])
            held = info.length * frame_bytes
        batches[-1].append(info)
    return batches


def _loaded(
    reader: EpisodeReader, config: EncodingConfig, batches: Sequence[list[EpisodeInfo]], workers: int
) -> Iterator[list[_LoadedEpisode]]:
    """The batches in order, the next `workers` of them decoded by threads while the caller encodes."""
    coming = iter(batches)
    ahead: deque[Future[list[_LoadedEpisode]]] = deque()
    with ThreadPoolExecutor(max_workers=workers) as pool:
        ahead.extend(pool.submit(_load_batch, reader, config, batch) for batch in islice(coming, workers))
        while ahead:
            loaded = ahead.popleft().result()
            ahead.extend(pool.submit(_load_batch, reader, config, batch) for batch in islice(coming, 1))
            yield loaded


def _load_batch(reader: EpisodeReader, config: EncodingConfig, batch: Sequence[EpisodeInfo]) -> list[_LoadedEpisode]:
    loaded = []
    for info in batch:
        starts = range(0, info.length, _DECODE_BLOCK)
        blocks = [range(start, min(start + _DECODE_BLOCK, info.length)) for start in starts]
        views = [
            np.concatenate([_load_copies(reader, config, info.index, camera, block) for block in blocks], axis=1)
            for camera in config.cameras
        ]
        loaded.append(_LoadedEpisode(info, np.stack(views, axis=1), read_robot_columns(reader, info.index)))
    return loaded


def _load_copies(
    reader: EpisodeReader, config: EncodingConfig, episode: int, camera: str, block: range
) -> UInt8[np.ndarray, "copies n h w 3"]:
    """Frames of one camera, resized, as they were recorded and of every augmented copy."""
    frames, size = reader.frames(episode, camera, block), config.size
    copies = [resize_frames(frames, size)]
    if config.augment is not None:
        colour = camera not in getattr(reader, "depth_keys", ())
        copies += [config.augment.resize(frames, size, (episode, n, camera), colour) for n in config.copies[1:]]
    return np.stack(copies)


def _encode_batch(
    tok: VideoTokenizer, batch: Sequence[_LoadedEpisode], config: EncodingConfig
) -> Iterator[LatentEpisode]:
    """The latents of some episodes, at every offset, of every copy."""
    jobs = [(item, offset, copy) for item in batch for _, offset, copy in _entries(item.info, config)]
    clips = [view[offset :: config.stride] for item, offset, copy in jobs for view in item.pixels[copy]]
    latents = _stream_clips(tok, clips, config.window, bf16=config.precision is not None)
    views = len(config.cameras)  # camera v of job n is stream n * views + v
    for number, (item, offset, copy) in enumerate(jobs):
        cameras = latents[number * views : (number + 1) * views]
        joined = np.concatenate(cameras, axis=1)
        stride, f = config.stride, tok.config.tubelet_frames
        yield align_episode(item.info, offset, joined, item.columns, stride, f, copy)


def align_episode(
    info: EpisodeInfo,
    offset: int,
    latents: Float[np.ndarray, "frames tokens d"],
    columns: Mapping[str, np.ndarray],
    stride: int,
    tubelet_frames: int,
    augmentation: int = 0,
) -> LatentEpisode:
    """Puts states and actions beside latents.

    The last raw frame of latent k is last(k) = offset + f * stride * k (f frames a tubelet). state[k] is the state
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
    key = _key(info, offset, augmentation)
    arrays = {"latents": latents, "state": state, "actions": actions}
    return LatentEpisode(key, info.index, offset, info.task, **arrays, augmentation=augmentation)


@torch.no_grad()
def _stream_clips(
    tok: VideoTokenizer, clips: Sequence[UInt8[np.ndarray, "_ h w 3"]], window: int | None, *, bf16: bool = False
) -> list[Float[np.ndarray, "_ tokens d"]]:
    """Latents of clips of about equal length, streamed side by side.

    Of a clip its first 1 + f n frames are taken, the rest fills no tubelet; a shorter clip is continued with its last
    frame and those latents are dropped, which changes none before them, because the tokenizer is causal. A GPU is
    waited for once, at the end: it computes while the next frames are picked and sent.
    """
    f, parameter = tok.config.tubelet_frames, next(tok.parameters())
    counts = [1 + (len(clip) - 1) // f for clip in clips]
    tokens = int(np.prod(tok.grid(*clips[0].shape[1:3])))
    step = max(1, _TOKENS_PER_STEP // (len(clips) * tokens))
    stream = tok.stream(batch_size=len(clips), window=window)
    parts: list[Tensor] = []
    for start in range(0, max(counts), step):  # latents start .. stop - 1 of every clip
        stop = min(start + step, max(counts))
        # Latent 0 is frame 0 alone; latent k is the f frames that end with frame f k.
        frames = np.arange(0 if start == 0 else 1 + f * (start - 1), 1 + f * (stop - 1))
        picked = [clip[np.minimum(frames, f * (count - 1))] for clip, count in zip(clips, counts, strict=True)]
        pixels = torch.from_numpy(np.stack(picked))
        pixels = pixels.pin_memory() if parameter.is_cuda else pixels
        pixels = rearrange(pixels.to(parameter.device, non_blocking=True), "b t h w rgb -> b rgb t h w")
        with torch.autocast(parameter.device.type, torch.bfloat16, enabled=bf16):
            parts.append(stream.encode(to_unit(pixels).to(parameter.dtype)).float())
    latents = torch.cat(parts, dim=1).cpu().numpy()
    return [np.ascontiguousarray(row[:count]) for row, count in zip(latents, counts, strict=True)]


def decode_shards(
    tokenizer: VideoTokenizer, latents: str | Path, out: str | Path, episodes: EpisodeNumbers | None = None
) -> list[Path]:
    """Writes one mp4 per stored episode and camera, `<key>.<camera>.mp4`, at the rate the frames were taken at.

    Args:
        tokenizer: the one that made the latents, by its digest.
        latents: a finished folder of latent shards.
        out: folder for the videos.
        episodes: numbers of the episodes to decode; all when None.

    Returns:
        The files written.
    """
    shards = LatentShards(latents, expect_digest=tokenizer.digest())
    wanted = set(choose_episodes(episodes, [info.episode_index for info in shards.infos], str(latents)))
    chosen = [number for number, info in enumerate(shards.infos) if info.episode_index in wanted]
    names = [_video_name(key, camera) for key in shards.keys for camera in shards.meta.cameras]
    refuse_foreign(Path(out), map(escape, names), "decoded videos")
    written = []
    for number in progress(chosen, "decode", unit="episode"):
        episode = shards[number]
        video = decode_episode(tokenizer, episode, shards.meta)
        for camera, pixels in zip(shards.meta.cameras, video, strict=True):
            path = Path(out) / _video_name(episode.key, camera)
            write_video(path, to_frames(pixels.cpu()), shards.meta.frame_rate_hz / shards.meta.stride)
            written.append(path)
    return written


def _video_name(key: str, camera: str) -> str:
    return f"{key}.{camera.split('.')[-1]}.mp4"


def decode_episode(
    tokenizer: VideoTokenizer, episode: LatentEpisode, meta: LatentMeta
) -> Float[Tensor, "views 3 T H W"]:
    """Pixels of a whole episode, decoded as a stream with the window it was encoded with; cameras side by side."""
    views, height, width = meta.grid
    z = torch.from_numpy(episode.latents).to(next(tokenizer.parameters()))
    z = rearrange(z, "frames (views tokens) d -> views frames tokens d", views=views)
    size = (height * tokenizer.config.patch_size, width * tokenizer.config.patch_size)
    stream = tokenizer.stream(batch_size=views, window=meta.window)
    with torch.no_grad():
        parts = [stream.decode(part, size) for part in z.split(LATENTS_PER_CALL, dim=1)]
    return torch.cat(parts, dim=2)


@dataclass(frozen=True)
class EncodingJob:
    """What to encode; everything in it can be sent to another process.

    Attributes:
        tokenizer: folder or hub id.
        dataset: see `repvitok.data.folders.open_episodes`.
        out: folder for the shards.
        device: a torch device, or "auto": CUDA where there is one.
        cache_folder: for WebDataset shards.
        depth_range: what becomes black and what white of depth maps; None: they are refused.
        settings: keyword arguments of `encode_dataset`.
    """

    tokenizer: str
    dataset: str
    out: str
    device: str = "auto"
    cache_folder: str | None = None
    depth_range: Sequence[float | int] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def run(self, shard: JobSlice | None = None, process: int = 0, *, announce: bool = True) -> None:
        """Encodes the data set or a share of it, on the device of process number `process`.

        What the data hold is said first on stderr, with `announce`: a model takes its time to load, and a data set
        that later stages can do little with takes hours to encode.
        """
        reader = open_episodes(self.dataset, self.cache_folder, self.depth_range)
        if announce:
            self.announce(reader, shard)
        tokenizer: Any = load_tokenizer(self.tokenizer)
        tokenizer.to(find_device(self.device, process))
        encode_dataset(tokenizer, reader, self.out, shard=shard, report=print, **self.settings)

    def announce(self, reader: EpisodeReader, shard: JobSlice | None = None) -> None:
        """Says on stderr what the episodes and cameras to encode hold, and what later stages will miss."""
        episodes = episodes_of_slice(infos_of(reader, self.settings.get("episodes")), shard)
        cameras = choose_cameras(reader, self.settings.get("cameras"))
        describe_contents(reader, cameras, episodes).announce()


def run_job(job: EncodingJob, *, shard: JobSlice | None = None, processes: int = 1) -> None:
    """Encodes, in this process or in several, which share the episodes; several without a `shard` are merged at the
    end.
    """
    if not 1 <= processes <= MOST_PROCESSES:
        raise UserError(f"--processes: expected 1 to {MOST_PROCESSES} on this machine, got {processes}")
    if processes == 1:
        job.run(shard)
        return
    job.announce(open_episodes(job.dataset, job.cache_folder, job.depth_range), shard)
    index, shares = shard or (0, 1)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    running = [
        context.Process(
            target=_run_slice, args=(job, (index * processes + number, shares * processes), number, processes)
        )
        for number in range(processes)
    ]
    try:
        for process in running:
            process.start()
        for process in running:
            process.join()
    finally:
        for process in running:
            process.terminate()
    failed = sum(process.exitcode != 0 for process in running)
    if failed:
        raise UserError(f"{failed} of {processes} processes failed, see above; the same command continues the rest")
    if shard is None:
        merge_latents(job.out)


def _run_slice(job: EncodingJob, shard: JobSlice, number: int, processes: int) -> None:
    """One process: its part of the cores, errors in one line."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    sys.exit(run_cli(lambda _: job.run(shard, number, announce=False))([]))
