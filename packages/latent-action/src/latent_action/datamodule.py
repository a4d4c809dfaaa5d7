"""Batches of transitions from a folder of latent shards, for Lightning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from repvitok.data.latents import LatentMeta
from repvitok.data.shards import LatentShards
from repvitok.data.split import HeldOut, split_latents
from repvitok.runtime.documents import BatchSize, From0, Positive, Seed, check_arguments
from repvitok.runtime.errors import UserError
from repvitok.runtime.training import EndlessLoader
from torch import Tensor

from latent_action.config import TransitionFrames
from latent_action.transitions import TransitionTable, lie_within, load_transitions


class TransitionBatch(NamedTuple):
    """Standardised latents before and after each of b transitions, and where asked for after the one that follows.

    Attributes:
        z_t, z_next: the two ends.
        z_after: the end of the transition that starts at z_next, or None where nobody asked for triplets.
        continued: which transitions have one; elsewhere z_after is z_next.
    """

    z_t: Float[Tensor, "b tokens d"]
    z_next: Float[Tensor, "b tokens d"]
    z_after: Float[Tensor, "b tokens d"] | None = None
    continued: Bool[Tensor, " b"] | None = None

    @classmethod
    def of(cls, table: TransitionTable, index: Int[Tensor, " b"], triplets: bool) -> TransitionBatch:
        """The transitions of a table with these indices."""
        pair = table.pairs(index)
        return cls(*pair, table.after(index), table.continued[index]) if triplets else cls(*pair)


class TrainingBatches(EndlessLoader[TransitionBatch]):
    """Endless random batches of transitions; batch k depends on (seed, k, rank) only, whatever the epochs.

    So training that stops after step k and goes on sees what it would have seen.
    """

    def __init__(
        self,
        table: TransitionTable,
        batch_size: int,
        seed: int,
        first_batch: int = 0,
        rank: int = 0,
        triplets: bool = False,
    ) -> None:
        super().__init__(first_batch)
        self.triplets = triplets
        self.table = table
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank

    def draw(self, number: int) -> Int[Tensor, " b"]:
        """The transitions of batch `number`, drawn with replacement from all."""
        random = np.random.default_rng([self.seed, number, self.rank])
        return torch.from_numpy(random.integers(len(self.table), size=self.batch_size))

    def batch(self, number: int) -> TransitionBatch:
        """Batch `number`."""
        return TransitionBatch.of(self.table, self.draw(number), self.triplets)

    def batches_from(self, number: int) -> Iterator[TransitionBatch]:
        """Batch `number` and those after it."""
        return map(self.batch, count(number))


def which_episodes(trainer: L.Trainer, batch: Sequence[Tensor]) -> str:
    """The episodes of a training batch, for a message: found by drawing the batches about this step again.

    `batch` holds the two ends of its transitions.
    """
    batches: Any = trainer.train_dataloader
    step = trainer.global_step * trainer.accumulate_grad_batches
    for number in range(max(0, step - 2), step + trainer.accumulate_grad_batches + 2):
        drawn = zip(batches.batch(number)[:2], batch, strict=True)
        if all(torch.equal(mine.nan_to_num(), theirs.cpu().nan_to_num()) for mine, theirs in drawn):
            return f"episodes {sorted(set(batches.table.episode[batches.draw(number)].tolist()))}"
    return "a batch of other episodes than the loader's"


class EvaluationBatches:
    """At most `limit` transitions, evenly spread over a table, in order; no batch for an empty table."""

    def __init__(self, table: TransitionTable, batch_size: int, limit: int) -> None:
        self.table = table
        count = min(limit, len(table))
        index = torch.linspace(0, len(table) - 1, count).round().long()
        self.index = index.split(batch_size) if count else ()

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[TransitionBatch]:
        return (TransitionBatch.of(self.table, index, triplets=True) for index in self.index)


class LatentActionData(L.LightningDataModule):
    """Transitions of latent shards in memory, with whole episodes held out for validation.

    Episodes too short for a transition are left out, with a word. Of an only episode the last transitions are held out
    (docs/decisions/054).

    Args:
        latents: folder of latent shards, from `repvitok encode` or any other visual tokenizer.
        batch_size: transitions per batch and rank.
        held_out: share of the episodes kept for validation, or their numbers; 0 for no validation. Which ones a
            share takes is the same in every stage, see `repvitok.data.split`.
        val_transitions: most transitions a validation looks at.
        seed: of the batches.
        first_transitions: use the first transition of each clip, too. It leads from the latent of a single image to
            one of several frames: a change of code, not of the scene, and so large that it drowns the others
            (docs/decisions/020). Set it for a tokenizer that encodes every frame alike.
        transition_frames: latent frames from a transition's beginning to its end; the model keeps it, and labels with
            it (docs/decisions/074).
        memory_limit_gb: refuse latents that take more than this in memory.
    """

    def __init__(
        self,
        latents: str,
        batch_size: BatchSize = 128,
        held_out: HeldOut = 0.1,
        val_transitions: Positive = 1024,
        seed: Seed = 0,
        first_transitions: bool = False,
        memory_limit_gb: From0 = 16.0,
        transition_frames: TransitionFrames = 1,
    ) -> None:
        super().__init__()
        check_arguments(LatentActionData.__init__, locals())
        self.latents = Path(latents)
        self.batch_size = batch_size
        self.held_out = held_out
        self.val_transitions = val_transitions
        self.seed = seed
        self.first_transitions = first_transitions
        self.memory_limit_gb = memory_limit_gb
        self.transition_frames = transition_frames
        self._tables: tuple[TransitionTable, TransitionTable] | None = None
        self._shards: LatentShards | None = None

    @property
    def meta(self) -> LatentMeta:
        """What the latents are: grid, statistics, the digest of their tokenizer."""
        if self._shards is None:
            self._shards = LatentShards(self.latents)
        return self._shards.meta

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Read and split the latents once."""
        if self._tables is not None:
            return
        meta, shards = self.meta, self._shards
        assert shards is not None
        size_gb = sum(path.stat().st_size for path in shards.paths) / 1e9
        if size_gb > self.memory_limit_gb:
            raise UserError(
                f"{self.latents}: {size_gb:.1f} GB of latents are over memory_limit_gb = {self.memory_limit_gb}. "
                "Raise it if the machine has the memory, or train on a part of the data: a LAT needs no more "
                "than some hours of video."
            )
        step = self.transition_frames
        spans = split_latents(shards, self.held_out, step + (1 if self.first_transitions else 2))
        table = load_transitions(shards, meta.standardizer.like(torch.empty(0)), step)
        if not self.first_transitions:
            table = table.where(table.place > 0)
        train, held_out = (table.where(lie_within(side, shards.infos, table.first, step)) for side in spans)
        self._tables = train, held_out

    def train_dataloader(self) -> TrainingBatches:
        """Batches from the step the trainer is at, which those of version 0.1 kept no other place of.

        They hold triplets where the model's loss weighs their composition.
        """
        train, _ = self._require_setup()
        trainer, first, rank, triplets = self.trainer, 0, 0, False
        if trainer is not None:
            first = trainer.global_step * trainer.accumulate_grad_batches
            rank = trainer.global_rank
            triplets = getattr(trainer.lightning_module, "composition_weight", 0) > 0
        if triplets and not train.continued.any():
            raise UserError(
                f"model.composition_weight is above 0, but {self.latents} holds no two transitions in a row of "
                f"{self.transition_frames} latent frames each to train on: encode longer episodes, or set it to 0"
            )
        return TrainingBatches(train, self.batch_size, self.seed, first, rank, triplets)

    def val_dataloader(self) -> EvaluationBatches:
        """The held-out episodes' transitions."""
        return EvaluationBatches(self._require_setup()[1], self.batch_size, self.val_transitions)

    def test_dataloader(self) -> EvaluationBatches:
        """All transitions of the held-out episodes."""
        held_out = self._require_setup()[1]
        if not len(held_out):
            raise UserError("data.held_out: nothing is held out of these episodes, so there is nothing to test on")
        return EvaluationBatches(held_out, self.batch_size, len(held_out))

    def predict_dataloader(self) -> EvaluationBatches:
        """The same as for testing."""
        return self.test_dataloader()

    def _require_setup(self) -> tuple[TransitionTable, TransitionTable]:
        if self._tables is None:
            self.setup()
        assert self._tables is not None
        return self._tables
