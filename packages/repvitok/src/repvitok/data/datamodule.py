"""Clips for training and validation as a LightningDataModule that resumes at the exact batch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import lightning as L
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader

from repvitok.data.clips import (
    ClipDataset,
    ClipLoader,
    ClipMixture,
    GivenBatches,
    MixtureBatches,
    StepBatches,
    frames_needed,
    require_pace,
)
from repvitok.data.folders import FolderKind, split_folder
from repvitok.data.split import HeldOut
from repvitok.runtime.documents import (
    Above0,
    BatchSize,
    Frames,
    Positive,
    Seed,
    Share,
    Side,
    check_arguments,
    check_fields,
    checked_range,
)
from repvitok.runtime.errors import MOST_PROCESSES, UserError


@dataclass(frozen=True)
class ClipKind:
    """One more kind of batch in a run: images between videos, a second resolution, another frame rate.

    Attributes:
        weight: how often its batches come; the data module's own kind has weight 1.
        frames, size, stride, rate_hz, batch_size: as the data module's, which hold where they are None.
    """

    weight: Above0 = 1.0
    frames: Frames | None = None
    size: tuple[Side, Side] | None = None
    stride: int | tuple[int, int] | None = None
    rate_hz: float | tuple[float, float] | None = None
    batch_size: BatchSize | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        require_pace(1 if self.stride is None else self.stride, self.rate_hz)


class ClipDataModule(L.LightningDataModule):
    """Random clips from folders of data; some episodes or videos are held out for validation.

    Batch k of a run is drawn from (seed, k) alone, whatever its epochs. The loader keeps its place, which is part of
    the checkpoint (`EndlessLoader`): batches that workers had prefetched before a crash are neither lost nor repeated,
    whatever the number of workers.

    Of a folder of one episode, or of one that is long enough, the last frames are held out (docs/decisions/054).

    With a `mixture`, each batch is of one kind, hence of one shape, drawn by its number: images (T = 1) between videos,
    several resolutions in one run. Images, from folders or shards, take part in kinds of one frame only; videos in all.
    """

    def __init__(
        self,
        folders: list[str],
        size: tuple[Side, Side],
        kind: FolderKind = "auto",
        cameras: list[str] | None = None,
        episodes: list[int] | int | str | None = None,
        frames: Frames = 17,
        stride: int | tuple[int, int] = 1,
        rate_hz: float | tuple[float, float] | None = None,
        batch_size: BatchSize = 4,
        mixture: list[ClipKind] | None = None,
        num_workers: int = 0,
        seed: Seed = 0,
        held_out: HeldOut = 0.1,
        val_clips: Positive = 16,
        cache: Literal["memory"] | None = None,
        skip_short: bool = True,
        max_bad_fraction: Share = 0.0,
        cache_folder: str | None = None,
        depth_range: tuple[float, float] | None = None,
    ) -> None:
        """Describes the data; nothing is read before `setup`.

        Args:
            folders: LeRobot data sets, folders of videos or of images, or WebDataset shards (see `TarShards`).
            size: (height, width) in pixels that clips are resized to, multiples of the tokenizer's patch size.
            kind: what the folders are; "auto" looks.
            cameras: LeRobot cameras to use; all when None.
            episodes: numbers of the episodes to use, also ranges like "0-9,12"; all when None. Videos and images are
                numbered in the order of their paths.
            frames: T, frames per clip, 1 + 4 n.
            stride: every stride-th frame of the video, or (lowest, highest) drawn per clip.
            rate_hz: instead of a stride: frames per second of the clips, or (lowest, highest); see `ClipDataset`.
            batch_size: clips per process.
            mixture: other kinds of batches besides this one; validation is of this one.
            num_workers: loader processes; 0 loads in the training process.
            seed: seed of all clips.
            held_out: fraction of each folder's episodes or videos kept for validation, or their numbers; 0 for no
                validation. Which ones a fraction takes is the same in every stage, see `repvitok.data.split`.
            val_clips: clips validated on, the same ones every time.
            cache: "memory" decodes everything once: for data that is small at `size`.
            skip_short: leave out videos shorter than a clip, and say how many; False refuses them.
            max_bad_fraction: how many files may be unreadable; see `ClipDataset`.
            cache_folder: where WebDataset shards keep their indices and local copies.
            depth_range: reads depth maps, too: (MIN, MAX) in the numbers they store become black and white.
        """
        super().__init__()
        check_arguments(ClipDataModule.__init__, locals())
        require_pace(stride, rate_hz)
        if not folders:
            raise UserError("expected at least one folder of data (data.folders), got none")
        if not isinstance(held_out, float | int) and len(folders) > 1:
            raise UserError(f"data.held_out: numbers of episodes are those of one folder, got {len(folders)} folders")
        if not 0 <= num_workers <= MOST_PROCESSES:
            raise UserError(f"expected num_workers of 0 to {MOST_PROCESSES}, got {num_workers}")
        self.folders, self.batch_size, self.mixture = folders, batch_size, list(mixture or ())
        self.num_workers, self.seed, self.val_clips, self.stride = num_workers, seed, val_clips, stride
        self._split: dict[str, Any] = {
            "kind": kind, "cameras": cameras, "episodes": episodes, "held_out": held_out,
            "max_bad_fraction": max_bad_fraction, "cache_folder": cache_folder,
            "depth_range": checked_range(depth_range),
        }  # fmt: skip
        self._clip: dict[str, Any] = {"frames": frames, "size": size, "stride": stride, "rate_hz": rate_hz}
        self._reading = {"cache": cache, "skip_short": skip_short, "max_bad_fraction": max_bad_fraction}
        self._first_batch = 0
        self._train: list[ClipDataset] = []
        self._val: ClipDataset | None = None
        self._rates_hz: list[float] = []

    def setup(self, stage: str) -> None:
        """Opens the folders and splits them; with `cache: memory`, decodes what the stage needs."""
        kinds = [self._clip, *(self._settings(kind) for kind in self.mixture)]
        paces = [{name: clip[name] for name in ("frames", "stride", "rate_hz")} for clip in kinds]
        needed = [partial(frames_needed, **pace) for pace in paces] if self._reading["skip_short"] else []
        splits = [split_folder(folder, needed=needed, **self._split) for folder in self.folders]
        unused = [split.folder for split in splits if not any(split.serves(clip["frames"]) for clip in kinds)]
        if unused:
            raise UserError(
                f"{', '.join(unused)}: images, and no kind of clips has one frame; set data.frames to 1, or add a kind "
                "with frames 1 to data.mixture"
            )
        if stage == "fit" and not any(split.train for split in splits):
            raise UserError(f"no video of {', '.join(self.folders)} is long enough for a clip; use shorter clips")
        if stage == "fit" and not self._train:
            self._train = [
                ClipDataset(
                    [source for split in splits if split.serves(clip["frames"]) for source in split.train],
                    seed=self.seed,
                    length=sys.maxsize,
                    **clip,
                    **self._reading,
                )
                for clip in kinds
            ]
        sources = [source for split in splits for source in split.train]
        self._rates_hz = sorted({source.frame_rate_hz(0) or 0.0 for source in sources} - {0.0})
        held_out = [source for split in splits if split.serves(self._clip["frames"]) for source in split.held_out]
        if held_out and self._val is None:
            settings = self._clip | self._reading
            self._val = ClipDataset(held_out, seed=self.seed + 1, length=self.val_clips, **settings)

    def train_dataloader(self) -> ClipLoader:
        """Endless batches (b, 3, T, H, W), from the first one not trained on yet."""
        rank, world_size = self._rank()
        place = {"first": self._first_batch, "rank": rank, "world_size": world_size}
        if not self.mixture:
            return ClipLoader(self._train[0], StepBatches(self.batch_size, **place), self.num_workers)
        sizes = (self.batch_size, *(kind.batch_size or self.batch_size for kind in self.mixture))
        weights = (1.0, *(kind.weight for kind in self.mixture))
        batches = MixtureBatches(sizes, weights, self.seed, **place)
        return ClipLoader(ClipMixture(self._train), batches, self.num_workers)

    def first_clips(self, count: int) -> Iterator[Float[Tensor, "3 T H W"]]:
        """The first clips of the training data, the same on every rank."""
        return (self._train[0][index] for index in range(count))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation clips, split over ranks; none when nothing is held out."""
        if self._val is None:
            return []
        rank, world_size = self._rank()
        if self.val_clips < world_size:
            raise UserError(
                f"expected data.val_clips of at least one clip for each of {world_size} processes, got {self.val_clips}"
            )
        mine = list(range(rank, self.val_clips, world_size))
        size = self.batch_size
        batches: Any = GivenBatches([mine[i : i + size] for i in range(0, len(mine), size)])
        workers = self.num_workers
        return DataLoader(self._val, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0)

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The validation clips."""
        if self._val is None:
            raise UserError("data.held_out: nothing is held out of these videos, so there is nothing to test on")
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The same as for testing."""
        return self.test_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """The settings that decide what batch k holds, and for the model card the videos' frames per second; the
        loader's own state is the place."""
        mixture = [asdict(kind) for kind in self.mixture]
        _, world_size = self._rank()
        given = {"batch_size": self.batch_size, "seed": self.seed, "mixture": mixture, "world_size": world_size}
        return given | {"rates_hz": self._rates_hz}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues after the last batch trained on; batch size, seed, mixture and processes must be the same."""
        mine = self.state_dict()
        theirs = {"mixture": [], "world_size": mine["world_size"]} | state_dict  # version 0.1 wrote neither
        for name in ("batch_size", "seed", "mixture", "world_size"):
            if theirs.get(name) != mine[name]:
                what = "number of processes" if name == "world_size" else f"data.{name}"
                raise UserError(
                    f"the checkpoint was trained with {what} = {theirs.get(name)}, got {mine[name]}: use the same to "
                    "resume, or start a new run from its exported weights (model.init_from)"
                )
        self._first_batch = int(state_dict.get("batches", 0))  # version 0.1 kept the place here

    def _settings(self, kind: ClipKind) -> dict[str, Any]:
        """What `ClipDataset` needs for a kind: its own settings, the data module's where it has none."""
        own = {name: value for name in self._clip if (value := getattr(kind, name)) is not None}
        paced = {"stride": 1, "rate_hz": None} if own.keys() & {"stride", "rate_hz"} else {}
        return self._clip | paced | own

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
