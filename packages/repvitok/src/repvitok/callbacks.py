"""What every training run of the three packages has: whole checkpoints, a progress bar, loss curves on disk."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger

from repvitok.checkpointing import LAST, read_checkpoint, write_checkpoint
from repvitok.curves import append_curves
from repvitok.errors import UserError
from repvitok.progress import progress

STEPS_BETWEEN_RANK_DECISIONS = 20
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class TrainingInterrupted(RuntimeError):
    """Training was asked to stop (Ctrl-C, SIGTERM or SIGUSR1) and its state is saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoint files, written whole or not at all and read without unpickling code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes through `repvitok.checkpointing.write_checkpoint`."""
        if storage_options is not None:
            raise UserError(f"checkpoints take no storage options, got {storage_options!r}")
        write_checkpoint(checkpoint, path)

    def load_checkpoint(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads through `repvitok.checkpointing.read_checkpoint`; `weights_only=False` is refused."""
        if weights_only is False:
            raise UserError("checkpoints are loaded without unpickling code: weights_only=False is refused")
        return read_checkpoint(path, map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes a checkpoint file, if it is there."""
        Path(path).unlink(missing_ok=True)


class SaveLast(Callback):
    """Keeps `last.ckpt` in the run's folder current: every few seconds or steps, at the end, and when asked to stop.

    Ctrl-C, SIGTERM and SIGUSR1 (what Slurm is told to send before it takes a node away) do not tear a step apart: the
    step under way ends, the state is saved, and `TrainingInterrupted` is raised. Processes that train together agree
    after each step, so a signal to one of them stops all of them after the same step. A second Ctrl-C or SIGTERM stops
    at once; the last whole file remains. A long validation is left early by a process that trains alone.
    """

    def __init__(
        self,
        folder: str | None = None,
        every_seconds: float | None = 60.0,
        every_n_steps: int | None = None,
        filename: str = LAST,
    ) -> None:
        """Saves to `folder` / `filename`; the folder defaults to the trainer's root folder."""
        for name, value in (("every_seconds", every_seconds), ("every_n_steps", every_n_steps)):
            if value is not None and value <= 0:
                raise UserError(f"expected {name} to be positive or null, got {value}")
        self.folder = folder
        self.every_seconds = every_seconds
        self.every_n_steps = every_n_steps
        self.filename = filename
        self._saved_at_s = 0.0
        self._saved_step = -1
        self._between_steps = True
        self._signal: int | None = None
        self._stopping = False
        self._previous: dict[int, Any] = {}

    def path(self, trainer: Trainer) -> Path:
        """Where the checkpoint is written."""
        return Path(self.folder or trainer.default_root_dir) / self.filename

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Starts the clock and takes over the signals."""
        self._saved_at_s = time.monotonic()
        self._saved_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Ends training if that was agreed, now that the last step is logged; else notes that a step is under way."""
        if self._stopping:
            self._stop_if_asked(trainer)
        self._between_steps = False

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Saves when it is time, or because a signal came."""
        self._between_steps = True
        self._agree_on_signal(trainer)
        if self._signal is not None or self._is_due(trainer):
            self._save(trainer)
        self._stopping = self._signal is not None

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Lets a signal end a long validation; the training state of its start was or will be resumed from disk."""
        if trainer.world_size == 1:
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Saves the final state."""
        if trainer.global_step != self._saved_step:
            self._save(trainer)
        self._restore_signals()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Saves when somebody ended training between two steps; never the state that led to an error."""
        self._restore_signals()
        asked = isinstance(exception, (KeyboardInterrupt, SystemExit)) and trainer.world_size == 1
        if asked and self._between_steps and trainer.global_step not in (0, self._saved_step):
            self._save(trainer)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._signal is not None and number in (signal.SIGINT, signal.SIGTERM):
            self._restore_signals()
            raise KeyboardInterrupt
        self._signal = number

    def _agree_on_signal(self, trainer: Trainer) -> None:
        """A signal that any process got is everybody's; one small reduction per step."""
        if trainer.world_size > 1:
            mine = torch.tensor(self._signal or 0, device=trainer.strategy.root_device)
            agreed = int(trainer.strategy.reduce(mine, reduce_op="max"))
            self._signal = agreed or self._signal  # the handler may have run meanwhile

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            raise TrainingInterrupted(self._signal, f"{name} at step {trainer.global_step}: {self.path(trainer)} saved")

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        if self.every_n_steps is not None and step % self.every_n_steps == 0 and step != self._saved_step:
            return True
        if self.every_seconds is None:
            return False
        late = time.monotonic() - self._saved_at_s >= self.every_seconds
        if trainer.world_size == 1:
            return late
        return step % STEPS_BETWEEN_RANK_DECISIONS == 0 and bool(trainer.strategy.broadcast(late))

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path(trainer))
        self._saved_at_s = time.monotonic()
        self._saved_step = trainer.global_step

    def _restore_signals(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class StageProgress(Callback):
    """A progress bar per stage: its name, steps done, time spent and left, and the loss."""

    def __init__(self, stage: str = "train", refresh_every_n_steps: int = 10, force: bool = False) -> None:
        """Shows `stage` beside the bar; `force` draws it even where stderr is no terminal."""
        self.stage = stage
        self.refresh_every_n_steps = refresh_every_n_steps
        self.force = force
        self._bar: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Opens the bar at the step training starts from."""
        if trainer.is_global_zero:
            self._bar = progress(desc=self.stage, unit="step", force=self.force)
            self._bar.total = trainer.max_steps if trainer.max_steps > 0 else None
            self._bar.update(trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Moves the bar, and now and then shows the loss that `training_step` returned."""
        if self._bar is None:
            return
        step = trainer.global_step
        self._bar.update(step - self._bar.n)
        if self._bar.disable or step % self.refresh_every_n_steps:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor):
            self._bar.set_postfix(loss=f"{loss.item():.4f}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Closes the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Closes the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class CurveLogger(Logger):
    """Lightning logger that appends to the run's metrics.csv; read it with `repvitok.curves.read_curves`."""

    def __init__(self, folder: str | Path) -> None:
        """Logs to `folder` / metrics.csv."""
        super().__init__()
        self._folder = str(folder)
        self._rows: list[tuple[int, str, float]] = []

    @property
    def name(self) -> str:
        """Empty: the run's folder is the name."""
        return ""

    @property
    def version(self) -> str:
        """Empty: one folder, one run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return self._folder

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Does nothing: the whole configuration is in the folder's config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Notes the metrics of a step."""
        rows = [(int(step or 0), name, float(value)) for name, value in metrics.items() if name != "epoch"]
        self._rows.extend(rows)

    @rank_zero_only
    def save(self) -> None:
        """Appends what was noted since the last call."""
        if self._rows:
            append_curves(self._folder, self._rows)
            self._rows = []

    @rank_zero_only
    def finalize(self, status: str) -> None:  # noqa: ARG002
        """Appends the rest."""
        self.save()
