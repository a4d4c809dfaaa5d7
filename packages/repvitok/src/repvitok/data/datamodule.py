"""Clips for training and validation as a LightningDataModule that resumes at the exact batch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Sampler

from repvitok.data.clips import ClipDataset
from repvitok.data.lerobot import LeRobotReader
from repvitok.data.sources import (
    VIDEO_SUFFIXES,
    ImageFolder,
    SelectedVideos,
    VideoFolder,
    VideoSource,
    lerobot_sources,
)
from repvitok.data.split import split_episodes

Kind = Literal["auto", "lerobot", "videos", "images"]


class StepBatches(Sampler[list[int]]):
    """Endless batches of consecutive indices: batch k of rank r holds the same indices in every run.

    With b clips per rank and w ranks, batch k of rank r is indices (k w + r) b ... (k w + r) b + b - 1.
    """

    def __init__(self, batch_size: int, first: int = 0, rank: int = 0, world_size: int = 1) -> None:
        """Starts at batch number `first`."""
        self.batch_size = batch_size
        self.first = first
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        for batch in count(self.first):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))


class ClipDataModule(LightningDataModule):
    """Random clips from folders of data; some episodes or videos are held out for validation.

    Training has no epochs: batch k is drawn from (seed, k) alone. The number of batches trained on is part of the
    checkpoint, and a resumed run starts its loader at that number, so that batches that workers had prefetched before
    a crash are neither lost nor repeated, whatever the number of workers.
    """

    def __init__(
        self,
        folders: list[str],
        size: tuple[int, int],
        kind: Kind = "auto",
        cameras: list[str] | None = None,
        frames: int = 17,
        stride: int | tuple[int, int] = 1,
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int = 0,
        held_out: float = 0.1,
        val_clips: int = 16,
        cache: Literal["memory"] | None = None,
        skip_short: bool = False,
        max_bad_fraction: float = 0.0,
    ) -> None:
        """Describes the data; nothing is read before `setup`.

        Args:
            folders: LeRobot data sets, or folders of videos or of images.
            size: (height, width) in pixels that clips are resized to, multiples of the tokenizer's patch size.
            kind: what the folders are; "auto" looks.
            cameras: LeRobot cameras to use; all when None.
            frames: T, frames per clip, 1 + 4 n.
            stride: every stride-th frame of the video, or (lowest, highest) drawn per clip.
            batch_size: clips per process.
            num_workers: loader processes; 0 loads in the training process.
            seed: seed of all clips.
            held_out: fraction of each folder's episodes or videos kept for validation; 0 for no validation.
            val_clips: clips validated on, the same ones every time.
            cache: "memory" decodes everything once: for data that is small at `size`.
            skip_short: leave out videos shorter than a clip.
            max_bad_fraction: see `ClipDataset`.

        Raises:
            ValueError: if a number is out of range or there is no folder.
        """
        super().__init__()
        if not folders:
            raise ValueError("expected at least one folder of data (data.folders), got none")
        for name, value in (("batch_size", batch_size), ("val_clips", val_clips), ("frames", frames)):
            if value < 1:
                raise ValueError(f"expected {name} of 1 or more, got {value}")
        self.folders = folders
        self.kind: Kind = kind
        self.cameras = cameras
        self.stride = stride
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.held_out = held_out
        self.val_clips = val_clips
        self._clip: dict[str, Any] = {
            "frames": frames,
            "size": size,
            "stride": stride,
            "cache": cache,
            "skip_short": skip_short,
            "max_bad_fraction": max_bad_fraction,
        }
        self._first_batch = 0
        self._train: ClipDataset | None = None
        self._val: ClipDataset | None = None

    def setup(self, stage: str) -> None:
        """Opens the folders and splits them; with `cache: memory`, decodes what the stage needs."""
        splits = [_split_folder(f, self.kind, self.cameras, self.held_out) for f in self.folders]
        if stage == "fit" and self._train is None:
            sources = [source for train, _ in splits for source in train]
            self._train = ClipDataset(sources, seed=self.seed, length=sys.maxsize, **self._clip)
        held_out = [source for _, val in splits for source in val]
        if held_out and self._val is None:
            self._val = ClipDataset(held_out, seed=self.seed + 1, length=self.val_clips, **self._clip)

    def train_dataloader(self) -> DataLoader[Any]:
        """Endless batches (b, 3, T, H, W), from the first one not trained on yet."""
        assert self._train is not None
        return self._loader(self._train, StepBatches(self.batch_size, self._first_batch, *self._rank()))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation clips, split over ranks; none when nothing is held out."""
        if self._val is None:
            return []
        rank, world_size = self._rank()
        mine = list(range(rank, self.val_clips, world_size))
        size = self.batch_size
        return self._loader(self._val, [mine[i : i + size] for i in range(0, len(mine), size)])

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation clips."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation clips."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """How many batches were trained on, the one under way included."""
        done = self._first_batch
        if self.trainer is not None:
            done = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # pyright: ignore[reportAttributeAccessIssue]
        return {"batches": done, "batch_size": self.batch_size, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues after the last batch trained on; batch size and seed must be the same.

        Raises:
            ValueError: if they are not: the order of the data would be another.
        """
        for name in ("batch_size", "seed"):
            if state_dict[name] != getattr(self, name):
                raise ValueError(
                    f"the checkpoint was trained with data.{name} = {state_dict[name]}, got {getattr(self, name)}: use "
                    "the same to resume, or start a new run from its exported weights (model.init_from)"
                )
        self._first_batch = int(state_dict["batches"])

    def _loader(self, dataset: ClipDataset, batches: Sampler[list[int]] | list[list[int]]) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def _split_folder(
    folder: str, kind: Kind, cameras: Sequence[str] | None, held_out: float
) -> tuple[list[VideoSource], list[VideoSource]]:
    """(training, held out) sources of one folder."""
    found = _kind_of(Path(folder)) if kind == "auto" else kind
    if found == "lerobot":
        reader = LeRobotReader(folder)
        train, val = split_episodes(range(reader.num_episodes), held_out)
        kept = lerobot_sources(reader, cameras=cameras, episodes=val) if val else []
        return lerobot_sources(reader, cameras=cameras, episodes=train), kept
    source: VideoSource = VideoFolder(folder) if found == "videos" else ImageFolder(folder)
    train, val = split_episodes(range(len(source)), held_out)
    return [SelectedVideos(source, train)], [SelectedVideos(source, val)] if val else []


def _kind_of(folder: Path) -> Kind:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; expected a LeRobot data set or a folder of videos or images"
        )
    if (folder / "meta" / "info.json").is_file():
        return "lerobot"
    has_video = any(path.suffix.lower() in VIDEO_SUFFIXES for path in folder.rglob("*"))
    return "videos" if has_video else "images"
