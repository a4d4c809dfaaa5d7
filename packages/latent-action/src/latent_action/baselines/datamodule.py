"""Batches of frame pairs for Lightning, split as the latent actions' own data are."""

from __future__ import annotations

import lightning as L
from repvitok.data.shards import LatentShards
from repvitok.data.split import HeldOut, split_latents
from repvitok.runtime.documents import BatchSize, Seed, Side, check_arguments

from latent_action.baselines.frame_pairs import FrameTable, PairBatches, load_frame_table
from latent_action.transitions import lie_within


class FramePairData(L.LightningDataModule):
    """The transitions of some latent shards as pixels, with the episodes held out that the LAT's data hold out.

    Args:
        latents: folder of latent shards; only which transitions there are is read from it.
        dataset: the LeRobot data set the latents were made from.
        size: height and width of a frame, all cameras side by side.
        batch_size: pairs per batch.
        held_out: share of the episodes kept for validation, or their numbers; of an only one, of its transitions.
        seed: of the batches.
    """

    def __init__(
        self,
        latents: str,
        dataset: str,
        size: tuple[Side, Side] = (64, 64),
        batch_size: BatchSize = 64,
        held_out: HeldOut = 0.1,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        check_arguments(FramePairData.__init__, locals())
        self.latents = latents
        self.dataset = dataset
        self.size = tuple(size)
        self.batch_size = batch_size
        self.held_out = held_out
        self.seed = seed
        self._tables: tuple[FrameTable, FrameTable] | None = None

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Read and split the frames once."""
        if self._tables is None:
            shards = LatentShards(self.latents)
            spans = split_latents(shards, self.held_out)
            table = load_frame_table(self.latents, self.dataset, (self.size[0], self.size[1]))
            train, held_out = (table.where(lie_within(side, shards.infos, table.first)) for side in spans)
            self._tables = train, held_out

    def train_dataloader(self) -> PairBatches:
        """Batches from the step the trainer is at."""
        trainer, first, rank = self.trainer, 0, 0
        if trainer is not None:
            first, rank = trainer.global_step * trainer.accumulate_grad_batches, trainer.global_rank
        return PairBatches(self._require_setup()[0], self.batch_size, self.seed, first, rank)

    def val_dataloader(self) -> PairBatches:
        """All transitions of the held-out episodes."""
        return PairBatches(self._require_setup()[1], self.batch_size, self.seed, in_order=True)

    def _require_setup(self) -> tuple[FrameTable, FrameTable]:
        self.setup()
        assert self._tables is not None
        return self._tables
