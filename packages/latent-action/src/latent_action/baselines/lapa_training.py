"""Training of LAPA's quantiser: its batches for Lightning, the LightningModule, its checkpoint as a model folder.

The frames are split as the latent actions' own data are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from repvitok.data.shards import LatentShards
from repvitok.data.split import HeldOut, split_latents
from repvitok.runtime.checkpointing import read_checkpoint, read_section, stored_by, with_weights
from repvitok.runtime.documents import BatchSize, From0, Positive, Seed, Share, Side, check_arguments
from repvitok.runtime.training import (
    FiniteCheck,
    OptimizerSettings,
    clip_gradients,
    configure_optimizer,
    require_finite_weights,
)
from torch import Tensor, nn

from latent_action.baselines.lapa import (
    FramePair,
    FrameTable,
    LapaConfig,
    LapaQuantizer,
    PairBatches,
    code_usage,
    lapa_composed,
    load_frame_table,
)
from latent_action.config import TransitionFrames
from latent_action.datamodule import which_episodes
from latent_action.model import composition_error
from latent_action.transitions import lie_within

CHECKPOINT_KEY = "lapa"
DEFAULT_OPTIMIZER = OptimizerSettings(name="adamw", lr=1e-3, warmup_steps=500)


class FramePairData(L.LightningDataModule):
    """The transitions of some latent shards as pixels, with the episodes held out that the LAT's data hold out.

    Args:
        latents: folder of latent shards; only which transitions there are is read from it.
        dataset: the LeRobot data set the latents were made from.
        size: height and width of a frame, all cameras side by side.
        batch_size: pairs per batch.
        held_out: share of the episodes kept for validation, or their numbers; of an only one, of its transitions.
        seed: of the batches.
        transition_frames: latent frames from a transition's beginning to its end, as of the LAT's data.
    """

    def __init__(
        self,
        latents: str,
        dataset: str,
        size: tuple[Side, Side] = (64, 64),
        batch_size: BatchSize = 64,
        held_out: HeldOut = 0.1,
        seed: Seed = 0,
        transition_frames: TransitionFrames = 1,
    ) -> None:
        super().__init__()
        check_arguments(FramePairData.__init__, locals())
        self.latents = latents
        self.dataset = dataset
        self.size = tuple(size)
        self.batch_size = batch_size
        self.held_out = held_out
        self.seed = seed
        self.transition_frames = transition_frames
        self._tables: tuple[FrameTable, FrameTable] | None = None

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Read and split the frames once."""
        if self._tables is None:
            shards = LatentShards(self.latents)
            step = self.transition_frames
            spans = split_latents(shards, self.held_out, step + 1)
            table = load_frame_table(self.latents, self.dataset, (self.size[0], self.size[1]), step)
            train, held_out = (table.where(lie_within(side, shards.infos, table.first, step)) for side in spans)
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


class LapaTraining(L.LightningModule):
    """Pixel loss of the next frame, and the replacement of codes that nothing chooses.

    Args:
        lapa: sizes of the model; `size` must be that of the data.
        optimizer: its schedule ends at the trainer's max_steps.
        gradient_clip: largest norm of the gradient; null for none.
        replace_every: steps between two looks for unused codes.
        replace_share: codes are replaced in this first share of training only, so that the rest can settle.
        seed: of the quantiser's noise, which follows from it and the step, so that a resumed run draws the same.
    """

    used: Tensor

    def __init__(
        self,
        lapa: LapaConfig,
        optimizer: OptimizerSettings = DEFAULT_OPTIMIZER,
        gradient_clip: From0 | None = 1.0,
        replace_every: Positive = 20,
        replace_share: Share = 0.5,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        check_arguments(LapaTraining.__init__, locals())
        self.lapa = LapaQuantizer(lapa)
        self.optimizer_settings = optimizer
        self.gradient_clip = gradient_clip
        self._finite = FiniteCheck()
        self.replace_every = replace_every
        self.replace_share = replace_share
        self.seed = seed
        self.register_buffer("used", torch.zeros(lapa.codes, dtype=torch.long))
        self._seen = torch.zeros(lapa.codes, dtype=torch.long)

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Take the transitions' length from the data."""
        data: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self.lapa.config = replace(self.lapa.config, transition_frames=data.transition_frames)

    def training_step(self, batch: FramePair, batch_idx: int) -> Tensor:
        """The loss; counts the codes."""
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        loss, index = self.lapa(*batch, self._generator(self.global_step, self.global_rank, micro_batch))
        self.used += code_usage(index, self.lapa.config.codes)
        self.log("train/loss", loss)
        self._finite.note({"loss": loss}, lambda: which_episodes(self.trainer, batch))
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move unused codes every now and then in the first part of training."""
        super().optimizer_step(*args, **kwargs)
        step = self.trainer.global_step + 1  # counted after this hook
        if step % self.replace_every == 0:
            if step <= self.replace_share * self.trainer.max_steps:
                self.lapa.quantize.replace_unused(self.used, self._generator(step, 2**31))
            self.used.zero_()

    def _generator(self, *key: int) -> torch.Generator:
        seed = int(np.random.SeedSequence((self.seed, *key)).generate_state(1, np.uint64)[0] >> 1)
        return torch.Generator(self.device).manual_seed(seed)

    def validation_step(self, batch: FramePair) -> None:
        """Held-out loss beside that of copying x_t."""
        loss, index = self.lapa(*batch)
        self._seen += code_usage(index.cpu(), self.lapa.config.codes)
        copy = nn.functional.mse_loss(batch.x_t, batch.x_next)
        for name, value in (("val/loss", loss), ("val/copy_loss", copy)):
            self.log(name, value, batch_size=len(batch.x_t), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log how many codes are in use, and how far the latent actions of triplets of frames are from adding up."""
        batches: Any = self.trainer.val_dataloaders
        whole, parts, elsewhere = lapa_composed(self.lapa, batches.table)
        if len(whole) > 1:
            for name, value in (("", parts), ("_shuffled", elsewhere)):
                self.log(f"val/composition{name}_error", composition_error(whole, value), sync_dist=True)
        self.log("val/codes_used", float((self._seen > 0).sum()), sync_dist=True)
        self._seen.zero_()

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule."""
        return configure_optimizer(self, self.optimizer_settings, self)

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """Clip the gradient's norm; stop at no number."""
        self._finite.check(self, clip_gradients(self.parameters(), self.gradient_clip))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the config beside the weights."""
        require_finite_weights(self)
        checkpoint[CHECKPOINT_KEY] = {"config": self.lapa.config.to_dict()}


def export_lapa(checkpoint: str | Path, out: str | Path) -> LapaQuantizer:
    """Write the quantiser of a checkpoint of `latent-action lapa fit` as a folder for `from_pretrained`.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it is damaged or of another stage.
    """
    loaded, where = read_checkpoint(checkpoint), str(checkpoint)
    stored = stored_by("latent-action lapa fit", CHECKPOINT_KEY, loaded, where)
    lapa = LapaQuantizer(LapaConfig.from_dict(read_section(stored, where, "config")))
    lapa = with_weights(lapa, "lapa.", loaded, stored, where, averaged=False)
    lapa.save_pretrained(out)
    return lapa
