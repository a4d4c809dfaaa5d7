"""Lightning's view of the episodes: loaders of segment batches that resume exactly where they stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from repwam_core.data.episodes import EpisodeStore, SegmentBatch, SegmentSampler
from repwam_core.embodiment import ActionKind, Statistics
from repwam_core.text import EMBEDDED


class SegmentLoader:
    """Endless training batches cut into epochs of `batches`, with a position that is saved and restored.

    Batch number p of rank r holds the items (p * world_size + r) * batch_size and on, so every rank sees other
    segments and all have the same number of batches.
    """

    def __init__(
        self, sampler: SegmentSampler, batch_size: int, batches: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.sampler, self.batch_size, self.batches = sampler, batch_size, batches
        self.rank, self.world_size = rank, world_size
        self.position = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[SegmentBatch]:
        end = (self.position // self.batches + 1) * self.batches
        while self.position < end:
            first = (self.position * self.world_size + self.rank) * self.batch_size
            self.position += 1
            yield self.sampler.batch(range(first, first + self.batch_size))

    def state_dict(self) -> dict[str, Any]:
        """Number of batches handed out so far; Lightning stores it in the checkpoint."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch that was handed out."""
        self.position = int(state["position"])


class HeldOutLoader:
    """Batches that cover rows (episode, start) once, in order."""

    def __init__(self, store: EpisodeStore, rows: np.ndarray, batch_size: int, transitions: int) -> None:
        self.store, self.rows, self.batch_size, self.transitions = store, rows, batch_size, transitions

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[SegmentBatch]:
        for first in range(0, len(self.rows), self.batch_size):
            rows = self.rows[first : first + self.batch_size]
            yield self.store.batch(rows[:, 0], rows[:, 1], self.transitions)


class WAMDataModule(L.LightningDataModule):
    """Latent shards as training and held-out segments.

    Args:
        latents: folder of latent shards (`repvitok encode`, then `latent-action label`).
        space: "latent" for latent actions, any other name for the recorded robot actions.
        transitions: latent transitions per segment, F; a segment has F + 1 latent frames.
        batch_size: segments per batch and rank.
        seed: seed of the segments' draw.
        held_out: share of the recorded episodes held out, evenly spaced over the data set.
        val_segments: at most this many held-out segments are used.
        text_encoder: "minilm", a Hugging Face name, or a folder.
        steps_per_epoch: batches that make an epoch.
        statistics: statistics.json of an earlier policy, to keep its action scaling; counted when None.
        tokenizer_digest: refuse latents of any other tokenizer.
        action_units: unit of each action channel; "1" when None.
        action_kind: whether recorded actions are "absolute" targets or "relative" changes.
    """

    def __init__(
        self,
        latents: str | Path,
        space: str = "robot",
        transitions: int = 8,
        batch_size: int = 8,
        seed: int = 0,
        held_out: float = 0.05,
        val_segments: int = 32,
        text_encoder: str = EMBEDDED,
        steps_per_epoch: int = 1000,
        statistics: str | Path | None = None,
        tokenizer_digest: str | None = None,
        action_units: list[str] | None = None,
        action_kind: ActionKind = "absolute",
    ) -> None:
        super().__init__()
        for name, value in (
            ("transitions", transitions),
            ("batch_size", batch_size),
            ("steps_per_epoch", steps_per_epoch),
        ):
            if value < 1:
                raise ValueError(f"data.{name}: expected at least 1, got {value}")
        self.latents, self.space, self.transitions, self.batch_size = Path(latents), space, transitions, batch_size
        self.seed, self.held_out, self.val_segments = seed, held_out, val_segments
        self.text_encoder, self.steps_per_epoch = text_encoder, steps_per_epoch
        self.statistics_path, self.tokenizer_digest = statistics, tokenizer_digest
        self.action_units = action_units
        self.action_kind: ActionKind = action_kind
        self._store: EpisodeStore | None = None

    @property
    def store(self) -> EpisodeStore:
        """The episodes, read on first use."""
        if self._store is None:
            given = None if self.statistics_path is None else Statistics.load(self.statistics_path)
            self._store = EpisodeStore(
                self.latents,
                space=self.space,
                text_encoder=self.text_encoder,
                held_out=self.held_out,
                statistics=given,
                expect_digest=self.tokenizer_digest,
                units=self.action_units,
                kind=self.action_kind,
            )
        return self._store

    def setup(self, stage: str) -> None:
        """Read the shards, so that a bad folder stops the run before any training."""
        del stage
        _ = self.store

    def train_dataloader(self) -> SegmentLoader:
        """Endless training segments."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = SegmentSampler(self.store, self.transitions, self.seed)
        return SegmentLoader(sampler, self.batch_size, self.steps_per_epoch, rank, world_size)

    def val_dataloader(self) -> HeldOutLoader | list[HeldOutLoader]:
        """Held-out segments, evenly thinned to `val_segments`; no loader at all without held-out episodes."""
        rows = self.store.starts(self.store.val_episodes, self.transitions)
        if len(rows) > self.val_segments:
            rows = rows[np.linspace(0, len(rows) - 1, self.val_segments).round().astype(int)]
        if not len(rows):
            return []
        return HeldOutLoader(self.store, rows, self.batch_size, self.transitions)

    def test_dataloader(self) -> HeldOutLoader:
        """Every held-out segment."""
        rows = self.store.starts(self.store.val_episodes, self.transitions)
        return HeldOutLoader(self.store, rows, self.batch_size, self.transitions)
