"""Stage two whose gradient reaches the tokenizer: the history's latents are made from frames by its last blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from repvitok import RepViTok
from repvitok.data import LatentMeta
from repvitok.data.folders import open_episodes
from repvitok.data.transforms import resize_frames, to_unit
from repvitok.model import load_tokenizer
from repvitok.runtime.errors import UserError
from repvitok.runtime.training import ExponentialMovingAverage
from torch import Tensor, nn

from repwam_core.data.batches import SegmentBatch
from repwam_core.data.episodes import EpisodeStore
from repwam_core.training.finetuning import TuneTokenizer


class RecordedFrames:
    """The frames that some latents were made from, resized as they were then, uint8; episodes are kept once decoded."""

    def __init__(self, dataset: str | Path, meta: LatentMeta, size: tuple[int, int], memory_limit_gb: float) -> None:
        self._reader = open_episodes(str(dataset), depth_range=meta.depth_range)
        self._meta, self._size = meta, size
        self._left, self._kept = memory_limit_gb * 1e9, dict[tuple[int, int, int], np.ndarray]()

    def episode(self, index: int, offset: int, latents: int) -> np.ndarray:
        """All frames of an episode's latents at an offset: (views, 1 + f (latents - 1), h, w, 3)."""
        key, meta = (index, offset, latents), self._meta
        if key in self._kept:
            return self._kept[key]
        chosen = range(offset, offset + meta.stride * meta.tubelet_frames * (latents - 1) + 1, meta.stride)
        views = [resize_frames(self._reader.frames(index, camera, chosen), self._size) for camera in meta.cameras]
        frames = np.stack(views)
        if frames.nbytes <= self._left:
            self._left -= frames.nbytes
            self._kept[key] = frames
        return frames


class TunedTokenizer(nn.Module):
    """The tokenizer of a run that trains its last blocks, their averages, and the clips that its latents come from.

    A latent of a stream with window w depends on the (L + 1)(w - 1) latent frames before it, for L blocks and the
    projection attend over w each. A segment's clip begins earlier by those and one more, which stands in for a tubelet
    as a single frame and which nothing that is used sees; or at the episode's beginning. So the latents are those of
    the stream that drives the robot, whatever the segment.

    Args:
        settings: which part, on which frames.
        store: the only data set of the run; its latents' scale stays.
        ema_decay: of the averages.
    """

    def __init__(self, settings: TuneTokenizer, store: EpisodeStore, ema_decay: float) -> None:
        super().__init__()
        tokenizer: Any = load_tokenizer(settings.tokenizer)
        meta = store.meta
        if type(tokenizer) is not RepViTok or meta.window is None:
            raise UserError(
                f"tune_tokenizer: {settings.tokenizer}: expected a RepViTok that streams with a window, got "
                f"{type(tokenizer).__name__}, window {meta.window}"
            )
        if any(info.augmentation for info in store.infos):
            raise UserError(
                "tune_tokenizer reads the recorded frames anew, and some latents are of augmented ones; encode without "
                "--augment"
            )
        if (found := tokenizer.digest()) != meta.tokenizer_digest:
            raise UserError(
                f"tune_tokenizer: {settings.tokenizer} is {found[:16]}, the latents come from "
                f"{meta.tokenizer_digest[:16]}; give the tokenizer that made them"
            )
        blocks = tokenizer.encoder.transformer.blocks
        if settings.last_k > len(blocks):
            raise UserError(f"tune_tokenizer.last_k: {settings.last_k} blocks of an encoder that has {len(blocks)}")
        tokenizer.requires_grad_(False)
        for part in (*blocks[-settings.last_k :], tokenizer.encoder.project):
            part.requires_grad_(True)
        self.tokenizer, self.meta, self._window = tokenizer, meta, meta.window
        self.lookback = (len(blocks) + 1) * (meta.window - 1) + 1
        patch = tokenizer.config.patch_size
        self._frames = RecordedFrames(
            settings.dataset, meta, (meta.grid[1] * patch, meta.grid[2] * patch), settings.memory_limit_gb
        )
        self.average, self.lr_factor = ExponentialMovingAverage(tokenizer, ema_decay), settings.lr_factor
        self._store = store

    def with_history(self, batch: SegmentBatch) -> SegmentBatch:
        """The batch with latents made of its frames as history, with a gradient; what is to be predicted stays."""
        clips, position = self.clips(batch.episode.tolist(), batch.start.tolist(), batch.valid.shape[1])
        views, device = clips.shape[1], batch.latents.device
        video = to_unit(rearrange(clips.to(device), "b v t h w rgb -> (b v) rgb t h w"))
        with torch.autocast(device.type, enabled=False):  # as the stream that drives the robot
            z = self.tokenizer.encode(video, self._window)
        z = rearrange(z, "(b v) frames tokens d -> b frames (v tokens) d", v=views)
        rows = torch.arange(len(z), device=device)[:, None]
        return replace(batch, history=self.meta.standardizer.like(z)(z[rows, position.to(device)]))

    def clips(self, rows: Sequence[int], starts: Sequence[int], transitions: int) -> tuple[Tensor, Tensor]:
        """Frames of segments, (b, views, T, h, w, 3) uint8, and which latent of its clip each frame is, (b, frames).

        Args:
            rows: of the store.
            starts: first latent frame of each segment, counted in its episode.
            transitions: of each segment.
        """
        f, clips, positions = self.meta.tubelet_frames, [], []
        for row, start in zip(rows, starts, strict=True):
            info, part = self._store.infos[row], self._store.parts[row]
            frames = self._frames.episode(info.episode_index, info.offset, info.frames)
            first = max(0, start - self.lookback)
            picked = f * first + np.arange(1 + f * (self.lookback + transitions))
            clips.append(frames[:, np.minimum(picked, frames.shape[1] - 1)])
            # beyond a part's end its last frame is repeated, as `EpisodeStore.batch` does
            positions.append(np.minimum(start + np.arange(transitions + 1), part.last - 1) - first)
        return torch.from_numpy(np.stack(clips)), torch.from_numpy(np.stack(positions))
