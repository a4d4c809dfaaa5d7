"""What the verb `predict` leaves behind: a file of tensors for every batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from safetensors.torch import save

from repvitok.files import atomic_file

FOLDER = "predictions"
FILES = "rank-*-batch-*.safetensors"


class PredictionFiles(BasePredictionWriter):
    """Writes each batch's predictions to `predictions/rank-<rank>-batch-<number>.safetensors` in the run's folder.

    A module's `predict_step` returns a dict of tensors by name, None for what there is not. Files of an earlier run are
    removed first.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Begins with an empty folder."""
        folder = self._folder(trainer)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob(FILES):
                old.unlink()
        trainer.strategy.barrier("predictions")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        prediction: dict[str, Any],
        batch_indices: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,
        dataloader_idx: int,  # noqa: ARG002
    ) -> None:
        """Writes one batch."""
        tensors = {
            name: torch.as_tensor(value).detach().cpu().contiguous()
            for name, value in prediction.items()
            if value is not None
        }
        name = f"rank-{trainer.global_rank:03d}-batch-{batch_idx:06d}.safetensors"
        with atomic_file(self._folder(trainer) / name) as partial:
            partial.write_bytes(save(tensors))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Says where they are."""
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            folder = self._folder(trainer)
            print(f"{folder}: predictions in {len(list(folder.glob(FILES)))} files")

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / FOLDER
