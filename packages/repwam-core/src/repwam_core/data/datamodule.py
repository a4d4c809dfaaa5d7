"""Lightning's view of a run's data sets: latents made on first use, loaders that resume where they stopped."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import msgspec
import numpy as np
import torch
from latent_action import LatentActionTokenizer
from latent_action.labelling import label_shards
from repvitok.data.contents import describe_contents, without_actions
from repvitok.data.folders import VideoEpisodes, open_episodes
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.split import HeldOut
from repvitok.encoding import encode_dataset
from repvitok.encoding_plan import choose_cameras, infos_of
from repvitok.model import load_tokenizer
from repvitok.runtime.documents import (
    BatchSize,
    Count,
    Frames,
    From0,
    Positive,
    Seed,
    Side,
    check_arguments,
    checked_range,
)
from repvitok.runtime.errors import MOST_PROCESSES, UserError
from repvitok.runtime.files import sole_writer
from repvitok.runtime.training import EndlessLoader

from repwam_core.data.batches import SegmentBatch
from repwam_core.data.episodes import MEMORY_LIMIT_GB, EpisodeStore, SegmentSampler
from repwam_core.data.packing import DataSetSettings, Mixture, PackedLoader, PackingSettings, make_packer
from repwam_core.model.config import LATENT_SPACE
from repwam_core.statistics import ActionKind
from repwam_core.text import EMBEDDED


@dataclass(frozen=True, kw_only=True)
class EncodingSettings:
    """How a data set that is no latents yet becomes latents; as of `repvitok encode` and `latent-action label`.

    Attributes:
        tokenizer: folder of the video tokenizer, or a hub id.
        size: (H, W) that frames are resized to, in pixels.
        lat: folder of the latent action tokenizer; needed where latent actions are learned.
        stride: encode every stride-th frame.
        offsets: raw frames at which each episode's encodings begin.
        augment: further encodings of each episode with augmented pictures, trained on and never held out.
        cameras: camera keys, in the order of their tokens; all of the data set's when None.
        episodes: their numbers in the data set, also ranges like "0-9,12"; all when None.
        depth_range: reads depth maps, too: (MIN, MAX) in the numbers they store become black and white.
        out: where the latents are kept, a folder for each data set and way of encoding it.
        workers: threads that decode.
    """

    tokenizer: str | Path
    size: tuple[Side, Side]
    lat: str | Path | None = None
    stride: Frames = 1
    offsets: list[Count] = field(default_factory=lambda: [0])
    augment: Count = 0
    cameras: list[str] | None = None
    episodes: list[int] | int | str | None = None
    depth_range: tuple[float, float] | None = None
    out: str | Path = "runs/latents"
    workers: Annotated[int, msgspec.Meta(ge=1, le=MOST_PROCESSES)] = 1

    def __post_init__(self) -> None:
        check_arguments(EncodingSettings, vars(self))
        object.__setattr__(self, "depth_range", checked_range(self.depth_range))


class LatentsOnDemand:
    """Latents of data sets: made on the first use, found again on every later one, by any run with these settings."""

    def __init__(self, settings: EncodingSettings) -> None:
        self.settings = settings

    def folder(self, dataset: str | Path) -> Path:
        """Where the latents of `dataset` are, or will be: named by all that decides what they hold."""
        settings, source = self.settings, Path(dataset).resolve()
        made_by = [str(source), self._digests, settings.size, settings.stride, settings.offsets, settings.cameras]
        made_by += [] if settings.episodes is None else [settings.episodes]  # folders of version 0.1 keep their names
        made_by += [] if settings.depth_range is None else [{"depth_range": settings.depth_range}]
        made_by += [] if settings.augment == 0 else [{"augment": settings.augment}]
        digest = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()
        return Path(settings.out) / f"{source.name}-{digest[:10]}"

    def announce(self, dataset: str | Path, *, needs_actions: bool) -> None:
        """Say on stderr what a data set holds, before it is encoded."""
        reader = self._open(dataset)
        cameras, infos = choose_cameras(reader, self.settings.cameras), infos_of(reader, self.settings.episodes)
        describe_contents(reader, cameras, infos).announce(needs_actions=needs_actions)

    def make(self, dataset: str | Path, device: torch.device | str = "cpu") -> Path:
        """Encode `dataset`, and label it where a latent action tokenizer is given; resumes, and returns when done.

        Args:
            dataset: a LeRobot data set, or videos or images (which have no robot actions).
            device: where to compute.

        Returns:
            The folder of the latents.
        """
        settings, reader, folder = self.settings, self._open(dataset), self.folder(dataset)
        with sole_writer(folder, f"{folder}: another run is making these latents; start this one when it has"):
            unlabelled = folder if self._lat is None else folder / "unlabelled"
            encode_dataset(
                self._tokenizer.to(device),
                reader,
                unlabelled,
                size=settings.size,
                stride=settings.stride,
                offsets=settings.offsets,
                augment=settings.augment,
                cameras=settings.cameras,
                episodes=settings.episodes,
                workers=settings.workers,
                report=print,
            )
            if self._lat is not None:
                label_shards(self._lat, unlabelled, folder, device=device)
        return folder

    def _open(self, dataset: str | Path) -> LeRobotReader | VideoEpisodes:
        return open_episodes(str(dataset), depth_range=self.settings.depth_range)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.settings.tokenizer)

    @cached_property
    def _lat(self) -> LatentActionTokenizer | None:
        return None if self.settings.lat is None else LatentActionTokenizer.from_pretrained(self.settings.lat)

    @cached_property
    def _digests(self) -> list[str]:
        return [self._tokenizer.digest(), "" if self._lat is None else self._lat.digest()]


def has_latents(folder: str | Path) -> bool:
    """Whether `folder` holds finished latents, rather than a data set they can be made from."""
    return (Path(folder) / "meta.json").is_file()


class SegmentLoader(EndlessLoader[SegmentBatch]):
    """Endless training batches cut into epochs of `batches`, which keep their place.

    Batch number p of rank r holds the items (p * world_size + r) * batch_size and on, so every rank sees other
    segments and all have the same number of batches.
    """

    def __init__(
        self, sampler: SegmentSampler, batch_size: int, batches: int, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(length=batches)
        self.sampler, self.batch_size = sampler, batch_size
        self.rank, self.world_size = rank, world_size

    def batches_from(self, number: int) -> Iterator[SegmentBatch]:
        """Batch `number` and those after it."""
        for place in count(number):
            first = (place * self.world_size + self.rank) * self.batch_size
            yield self.sampler.batch(range(first, first + self.batch_size))


class HeldOutLoader:
    """Batches that cover the rows (episode, start) of each store once, in order; a batch is of one store.

    All ranks have equally many batches, or a sharded model would wait for ever: where they are no multiple of the
    ranks, the first ones come again at the end, with no transition valid, so that they count for nothing.
    """

    def __init__(
        self, parts: Sequence[tuple[EpisodeStore, np.ndarray]], batch_size: int, transitions: int,
        rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        self.batch_size, self.transitions = batch_size, transitions
        batches = [
            (store, rows[first : first + batch_size])
            for store, rows in parts
            for first in range(0, len(rows), batch_size)
        ]
        whole = -(-len(batches) // world_size) * world_size
        self._batches = [
            (*batches[number % len(batches)], number < len(batches)) for number in range(rank, whole, world_size)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[SegmentBatch]:
        for store, rows, counts in self._batches:
            batch = store.batch(rows[:, 0], rows[:, 1], self.transitions)
            yield replace(batch, valid=batch.valid & counts)


class WAMDataModule(L.LightningDataModule):
    """Latent shards, or data sets encoded on their first use, as training and held-out segments.

    Args:
        latents: folder of latent shards (`repvitok encode`, then `latent-action label`); or a LeRobot data set, with
            `encoding`.
        space: "latent" for latent actions, any other name for the recorded robot actions.
        transitions: latent transitions per segment, F; a segment has F + 1 latent frames.
        batch_size: segments per batch and rank.
        seed: seed of the segments' draw.
        held_out: share of the recorded episodes held out, or their numbers; 0 for no validation. Which ones a share
            takes is the same in every stage; of an only episode it takes the end, see `repvitok.data.split`.
        val_segments: at most this many held-out segments are used.
        text_encoder: "minilm", a Hugging Face name, or a folder.
        steps_per_epoch: batches that make an epoch.
        statistics: statistics.json of an earlier policy, to keep its action scaling; counted when None.
        tokenizer_digest: refuse latents of any other tokenizer.
        action_units: unit of each action channel, in order; or by patterns of their names, {"left_*": "rad"}; or one
            for all; "1" when None.
        action_kind: what recorded actions are and what is learned of them: "absolute" targets or "relative" changes, as
            they are; "from_state": targets, learned as changes from the robot's state before their chunk.
        packing: pack whole episodes into sequences of a token budget, one sequence per step and rank, in place of
            segments of `transitions` transitions; `transitions` and `batch_size` are then validation's alone.
        data_sets: several data sets in one packed run, in place of `latents` and what belongs to it.
        memory_limit_gb: latents of a data set that take more than this in memory stay on disk, and only what a batch
            holds is read, through the page cache that the ranks of a node share. 0 leaves all on disk.
        encoding: how data sets given in place of latents are encoded, once, before the run's first step, by its first
            process. Its folder `out` must be seen by all nodes. Data for many devices are encoded by a job array.
        chunk_sizes: the model's, over which "from_state" statistics are counted; linked, not to be given.
    """

    def __init__(
        self,
        latents: str | Path | None = None,
        space: str = "robot",
        transitions: Frames = 8,
        batch_size: BatchSize = 8,
        seed: Seed = 0,
        held_out: HeldOut = 0.05,
        val_segments: Positive = 32,
        text_encoder: str = EMBEDDED,
        steps_per_epoch: Positive = 1000,
        statistics: str | Path | None = None,
        tokenizer_digest: str | None = None,
        action_units: list[str] | dict[str, str] | str | None = None,
        action_kind: ActionKind = "absolute",
        packing: PackingSettings | None = None,
        data_sets: list[DataSetSettings] | None = None,
        memory_limit_gb: From0 | Count = MEMORY_LIMIT_GB,
        encoding: EncodingSettings | None = None,
        chunk_sizes: tuple[Frames, Frames] = (1, 1),
    ) -> None:
        super().__init__()
        self.prepare_data_per_node = False
        check_arguments(WAMDataModule.__init__, locals())
        if (latents is None) == (not data_sets):
            raise UserError("data: expected either data.latents or data.data_sets, got both or neither")
        if data_sets and packing is None:
            raise UserError("data.data_sets: several data sets are mixed in packed sequences; set data.packing")
        if not isinstance(held_out, float | int) and data_sets and len(data_sets) > 1:
            told = f"numbers of episodes are those of one data set, got {len(data_sets)}; give a share"
            raise UserError(f"data.held_out: {told}")
        if encoding is not None and encoding.lat is None and space == LATENT_SPACE:
            raise UserError(
                "data.encoding.lat: latent actions are learned, so name the latent action tokenizer's folder"
            )
        self.space, self.transitions, self.batch_size = space, transitions, batch_size
        self.seed, self.held_out, self.val_segments = seed, held_out, val_segments
        self.text_encoder, self.steps_per_epoch = text_encoder, steps_per_epoch
        self.tokenizer_digest, self.packing = tokenizer_digest, packing
        self.memory_limit_gb, self.chunk_sizes = memory_limit_gb, chunk_sizes
        self.data_sets = data_sets or [
            DataSetSettings(
                latents=latents or "", statistics=statistics, action_units=action_units, action_kind=action_kind
            )
        ]
        self.split_of_0_1 = False
        self._on_demand = LatentsOnDemand(encoding) if encoding is not None else None

    @cached_property
    def mixture(self) -> Mixture:
        """The episodes of all data sets, read on first use."""
        made = self._on_demand
        data_sets = [
            entry if made is None or has_latents(entry.latents) else replace(entry, latents=made.folder(entry.latents))
            for entry in self.data_sets
        ]
        return Mixture(
            data_sets,
            space=self.space,
            text_encoder=self.text_encoder,
            held_out=self.held_out,
            tokenizer_digest=self.tokenizer_digest,
            memory_limit_gb=self.memory_limit_gb,
            chunk_frames=self.chunk_sizes[1],
            split_of_0_1=self.split_of_0_1,
        )

    def keep_split_of_0_1(self) -> None:
        """Holds out what version 0.1 did, since it began the run that goes on (docs/decisions/054)."""
        self.split_of_0_1 = True
        self.__dict__.pop("mixture", None)

    @property
    def store(self) -> EpisodeStore:
        """The episodes of the first data set, most often the only one."""
        return self.mixture.stores[0]

    @property
    def any_number_of_ranks(self) -> bool:
        """Whether training may go on with another number of ranks: packed sequences are a stream that all share."""
        return self.packing is not None

    def prepare_data(self) -> None:
        """Make the latents of data sets that have none; of all processes, the first one does, the others wait."""
        if self._on_demand is None:
            return
        without = [entry for entry in self.data_sets if not has_latents(entry.latents)]
        for entry in without:  # all of them before the first one takes hours
            self._on_demand.announce(entry.latents, needs_actions=self.space != LATENT_SPACE)
        for entry in without:
            self._on_demand.make(entry.latents, self.trainer.strategy.root_device if self.trainer else "cpu")

    def setup(self, stage: str) -> None:
        """Read the shards, so that a bad folder stops the run before any training."""
        for store in self.mixture.stores:
            if stage == "fit" and self.space == LATENT_SPACE and not store.meta.action_names and self._rank()[0] == 0:
                told = "these latents hold no robot actions, so stage two cannot learn from them"
                print(f"{store.shards.root}: {told}. {without_actions(store.shards)}", file=sys.stderr)

    def train_dataloader(self) -> SegmentLoader | PackedLoader:
        """Endless training segments, or packed sequences."""
        if self.packing is not None:
            model: Any = self.trainer.lightning_module  # type: ignore[union-attr]
            packer = make_packer(self.mixture, self.packing, model.wam.config, self.seed)
            return PackedLoader(self.mixture, packer, self.steps_per_epoch, *self._rank(), model.with_noise)
        sampler = SegmentSampler(self.store, self.transitions, self.seed)
        return SegmentLoader(sampler, self.batch_size, self.steps_per_epoch, *self._rank())

    def val_dataloader(self) -> HeldOutLoader | list[HeldOutLoader]:
        """Held-out segments, evenly thinned to `val_segments`; no loader at all where nothing is held out."""
        parts = [(store, self._thinned(rows)) for store, rows in self._held_out_rows()]
        if not any(len(rows) for _, rows in parts):
            return []
        return HeldOutLoader(parts, self.batch_size, self.transitions, *self._rank())

    def test_dataloader(self) -> HeldOutLoader:
        """Every held-out segment."""
        if not any(len(store.val_episodes) for store in self.mixture.stores):
            raise UserError("data.held_out: nothing is held out of these episodes, so there is nothing to test on")
        return HeldOutLoader(self._held_out_rows(), self.batch_size, self.transitions, *self._rank())

    def predict_dataloader(self) -> HeldOutLoader:
        """The same as for testing."""
        return self.test_dataloader()

    def _held_out_rows(self) -> list[tuple[EpisodeStore, np.ndarray]]:
        return [(store, store.starts(store.val_episodes, self.transitions)) for store in self.mixture.stores]

    def _thinned(self, rows: np.ndarray) -> np.ndarray:
        """At most this data set's part of `val_segments` rows, evenly spaced."""
        most = max(1, self.val_segments // len(self.mixture.stores))
        return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
