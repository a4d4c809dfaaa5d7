"""Callbacks of every training: checkpoints from which a run goes on, progress, loss curves, predictions on disk."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import msgspec
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ProgressBar
from lightning.pytorch.loggers.logger import Logger
from safetensors.torch import save
from tqdm import tqdm

from repvitok.runtime.checkpointing import LAST, generations_of, read_checkpoint, set_aside, write_checkpoint
from repvitok.runtime.documents import Above0, Positive, check_arguments
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import WriteError, atomic_file, kind_of, sole_writer
from repvitok.runtime.progress import Row, append_curves, mark_curves, progress, rewind_curves

FOLDER = "predictions"
FILES = "rank-*-batch-*.safetensors"
STEPS_BETWEEN_RANK_DECISIONS = 20
RUN = "run"
"""In a checkpoint: what `SaveLast` needs to go on as if the run had not stopped."""
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


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

    def write_on_batch_end(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, trainer: Trainer, _module: Any, prediction: dict[str, Any], _indices: Any, _batch: Any, batch_idx: int,
        *_: Any,
    ) -> None:  # fmt: skip
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


class TrainingInterrupted(RuntimeError):
    """Training was asked to stop (Ctrl-C, SIGTERM or SIGUSR1); the message says what is saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoint files, written whole or not at all and read without unpickling code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes through `repvitok.runtime.checkpointing.write_checkpoint`; see `generations_of` for the options."""
        write_checkpoint(checkpoint, path, generations_of(storage_options))

    def load_checkpoint(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads through `repvitok.runtime.checkpointing.read_checkpoint`; `weights_only=False` is refused."""
        if weights_only is False:
            raise UserError("checkpoints are loaded without unpickling code: weights_only=False is refused")
        if Path(path).is_dir():
            raise UserError(
                f"{path} is the checkpoint of a sharded run: use its trainer.strategy, or start from its exported "
                "weights"
            )
        return read_checkpoint(path, map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes a checkpoint file, if it is there."""
        Path(path).unlink(missing_ok=True)


class SaveLast(Callback):
    """Keeps `last.ckpt` in the run's folder current: every few seconds or steps, at the end, and when asked to stop.

    Ctrl-C, SIGTERM and SIGUSR1 (what Slurm is told to send before it takes a node away) do not tear a step apart: the
    step under way ends, the state is saved, and `TrainingInterrupted` is raised. Processes that train together agree
    after each step, so a signal to one of them stops all of them after the same step. A second Ctrl-C or SIGTERM stops
    at once; the last whole file remains. A long validation is left early by a process that trains alone, and made up
    for when the run goes on.

    The state before the last one is kept, too, as `last.1.ckpt`; a full disk at a save in between is a warning, and the
    next save tries again. While a run goes on a second one in its folder is refused.
    """

    def __init__(
        self,
        folder: str | None = None,
        every_seconds: Above0 | None = 60.0,
        every_n_steps: Positive | None = None,
        filename: str = LAST,
        generations: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 2,
    ) -> None:
        """Saves to `folder` / `filename`; the folder defaults to the trainer's root folder.

        Args:
            folder: where to.
            every_seconds, every_n_steps: when; null for never.
            filename: of the newest state.
            generations: how many states are kept. Each takes the disk space of one, and one more while it is written.
        """
        check_arguments(SaveLast.__init__, locals())
        self.folder = folder
        self.every_seconds = every_seconds
        self.every_n_steps = every_n_steps
        self.filename = filename
        self.generations = generations
        self.damaged: dict[Path, str] = {}  # checkpoints to set aside before anything is written
        self.command = ""  # what a model card says of how the run was started
        self._hours = 0.0  # of training before this start
        self._started_at_s = 0.0
        self.validation_due = False  # at the step the run was resumed from
        self._saved_at_s = 0.0
        self._saved_step = -1
        self._saved_due = False
        self._between_steps = True
        self._row_waits = False
        self._due = False
        self._validating = False
        self._loops: dict[str, Any] = {}
        self._signal: int | None = None
        self._stopping = False
        self._previous: dict[int, Any] = {}
        self._holds = ExitStack()

    def path(self, trainer: Trainer) -> Path:
        """Where the checkpoint is written."""
        return Path(self.folder or trainer.default_root_dir) / self.filename

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Makes sure that nobody else writes the run's folder, and keeps damaged checkpoints from being overwritten."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        for folder in {Path(trainer.default_root_dir), self.path(trainer).parent}:
            if (kind := kind_of(folder)) not in (None, "a training run"):
                raise UserError(f"{folder} holds {kind}; give a training run a folder of its own")
            message = f"{folder}: another run is training here; wait until it has ended, or choose another folder"
            self._holds.enter_context(sole_writer(folder, message))
        for path, reason in self.damaged.items():
            print(f"{path} is kept as {set_aside(path).name}: {reason}", file=sys.stderr)
        self.damaged = {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Lets the folder go."""
        self._holds.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Starts the clock, takes over the signals, and makes up for a validation that was not finished."""
        self._saved_at_s = self._started_at_s = time.monotonic()
        self._saved_step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
        if self.validation_due:
            _validate_now(trainer)
            self.validation_due = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Ends training if that was agreed, now that the last step is logged; else notes that a step is under way."""
        if self._stopping:
            self._stop(trainer)
        self._between_steps = False

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Saves when it is time, or because a signal came."""
        self._between_steps = True
        if trainer.world_size > 1:  # a signal that any process got is everybody's; one small reduction per step
            mine = torch.tensor(self._signal or 0, device=trainer.strategy.root_device)
            agreed = int(trainer.strategy.reduce(mine, reduce_op="max"))
            self._signal = agreed or self._signal  # the handler may have run meanwhile
        self._due = _validation_follows(trainer)
        if self._due:
            self._loops = copy.deepcopy(trainer._checkpoint_connector._get_loops_state_dict())
        self._stopping = self._signal is not None
        if self._stopping or self._is_due(trainer):
            self._row_waits = True  # Lightning logs this step's numbers after this hook
            self._save(trainer, tolerant=True)
            self._row_waits = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Ends training here if that was agreed: the validation is made up for later."""
        if trainer.state.fn != "fit":
            return
        if self._stopping:
            self._stop(trainer)
        self._between_steps, self._validating = False, True

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Lets a signal end a long validation; what is saved is the state at its start."""
        if self._signal is not None and trainer.world_size == 1:
            if trainer.global_step != self._saved_step:
                self._save(trainer, tolerant=True)
            self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Notes that nothing is to be made up for."""
        self._validating = self._due = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Saves the final state."""
        if trainer.global_step != self._saved_step or self._saved_due:
            self._save(trainer)
        self._restore_signals()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Saves when somebody ended training between two steps; never the state that led to an error."""
        self._restore_signals()
        asked = isinstance(exception, (KeyboardInterrupt, SystemExit)) and trainer.world_size == 1
        if asked and self._between_steps and trainer.global_step not in (0, self._saved_step):
            self._save(trainer, tolerant=True)
        self._holds.close()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Adds what a resumed run must know; during a validation, the loops are saved as they were at its start."""
        if self._validating:
            checkpoint["loops"] = self._loops
        row = _waiting_row(trainer) if self._row_waits else []
        checkpoint[RUN] = {
            "ranks": trainer.world_size,
            "validation_due": self._due,
            "curves": next((logger.mark(row) for logger in _curve_loggers(trainer)), None),
            "hours": self._hours + (time.monotonic() - self._started_at_s) / 3600,
            "command": self.command,
        }
        self._saved_due = self._due

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Checks the number of processes, and takes the curves back to where they were at the checkpoint."""
        run = checkpoint.get(RUN)
        if trainer.state.fn != "fit" or run is None:
            return
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if run["ranks"] != trainer.world_size and not getattr(data, "any_number_of_ranks", False):
            raise UserError(
                f"the checkpoint was trained by {run['ranks']} processes, this run has {trainer.world_size}: its data "
                "would come twice or not at all. Use as many, or start a new run from the exported weights"
            )
        self.validation_due, self._hours = run["validation_due"], run.get("hours", 0.0)  # version 0.1 did not say
        mine, theirs = os.path.realpath(self.path(trainer).parent), os.path.realpath(str(trainer.ckpt_path))
        if os.path.dirname(theirs) == mine and run["curves"] is not None:
            for logger in _curve_loggers(trainer):
                logger.rewind(run["curves"])

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._signal is not None and number in (signal.SIGINT, signal.SIGTERM):
            self._restore_signals()
            raise KeyboardInterrupt
        self._signal = number

    def _stop(self, trainer: Trainer) -> None:
        assert self._signal is not None
        path, name = self.path(trainer), signal.Signals(self._signal).name
        saved = f"{path} holds step {self._saved_step}" if os.path.lexists(path) else "nothing is saved yet"
        raise TrainingInterrupted(self._signal, f"{name} at step {trainer.global_step}: {saved}")

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

    def _save(self, trainer: Trainer, tolerant: bool = False) -> None:
        """Saves; where it cannot be written, `tolerant` warns and lets training go on.

        The process that writes is the only one to get an error. The others wait for it at the end of Lightning's
        method, and then all learn of it.
        """
        failure = None
        try:
            trainer.save_checkpoint(self.path(trainer), storage_options={"generations": self.generations})
        except WriteError as error:
            failure = str(error)
            if trainer.world_size > 1:
                trainer.strategy.barrier("Trainer.save_checkpoint")
        if trainer.world_size > 1:
            failure = trainer.strategy.broadcast(failure)
        self._saved_at_s = time.monotonic()
        if failure is None:
            self._saved_step = trainer.global_step
        elif not tolerant:
            raise WriteError(failure)
        elif trainer.is_global_zero:
            print(f"warning: step {trainer.global_step} is not saved: {failure}", file=sys.stderr)

    def _restore_signals(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


# What Lightning does not offer under a public name (2.6).


def _validation_follows(trainer: Trainer) -> bool:
    """Whether a validation comes right after this step."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # pyright: ignore[reportArgumentType]


def _waiting_row(trainer: Trainer) -> list[Row]:
    """What Lightning will log of the step that has just ended, as it will log it."""
    connector, loop = trainer._logger_connector, trainer.fit_loop
    if loop._should_accumulate() or not connector.should_update_logs:
        return []
    step = loop.epoch_loop._batches_that_stepped
    return [(step, name, float(value)) for name, value in connector.metrics["log"].items()]


def _validate_now(trainer: Trainer) -> None:
    """Runs a validation where the training loop would run one: between two steps."""
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    loop.restarting, first = False, connector._first_loop_iter
    trainer.validating = True
    loop.run()
    trainer.training = True
    connector._first_loop_iter = first


class StageProgress(Callback):
    """Says how far a training is: steps done, time spent and left, the loss; and what each validation found."""

    def __init__(self, stage: str = "train", refresh_every_n_steps: Positive = 10, force: bool = False) -> None:
        """Shows `stage` beside the bar; `force` draws it even where stderr is no terminal."""
        check_arguments(StageProgress.__init__, locals())
        self.stage = stage
        self.refresh_every_n_steps = refresh_every_n_steps
        self.force = force
        self._bar: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Opens the bar at the step training starts from, unless another one is configured."""
        others = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]  # pyright: ignore[reportAttributeAccessIssue]
        if trainer.is_global_zero and not others:
            self._bar = progress(desc=self.stage, unit="step", force=self.force)
            self._bar.total = trainer.max_steps if trainer.max_steps > 0 else None
            self._bar.update(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:  # noqa: ARG002
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

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Writes a line of what was found, if this is a validation of a training."""
        if self._bar is not None and not trainer.sanity_checking:
            found = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            told = ", ".join(f"{name} {float(value):.4g}" for name, value in found.items())
            tqdm.write(f"{self.stage}: step {trainer.global_step}: {told}", file=sys.stderr)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    on_exception = on_train_end


def _curve_loggers(trainer: Trainer) -> list[CurveLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, CurveLogger)] if trainer.is_global_zero else []


class CurveLogger(Logger):
    """Lightning logger that appends to the run's metrics.csv; read it with `repvitok.runtime.progress.read_curves`."""

    def __init__(self, folder: str | Path) -> None:
        """Logs to `folder` / metrics.csv."""
        super().__init__()
        self._folder = str(folder)
        self._rows: list[Row] = []
        self._warned = False

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
        """Appends what was noted since the last call; on a full disk it is kept for the next one."""
        try:
            append_curves(self._folder, self._rows)
            self._rows, self._warned = [], False
        except WriteError as error:
            if not self._warned:
                print(f"warning: curves are kept in memory: {error}", file=sys.stderr)
            self._warned = True

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Appends the rest."""
        if status == "success":
            append_curves(self._folder, self._rows)
            self._rows = []
        else:
            self.save()

    def mark(self, coming: list[Row]) -> dict[str, Any]:
        """Where the curves stand, for a checkpoint; `coming` are rows that are logged only after it."""
        self.save()
        return mark_curves(self._folder) | {"rows": [list(row) for row in [*self._rows, *coming]]}

    def rewind(self, mark: dict[str, Any]) -> None:
        """Takes the curves back to a mark: what the run logged after the checkpoint it will log again."""
        if rewind_curves(self._folder, mark):
            append_curves(self._folder, [(int(step), str(name), float(value)) for step, name, value in mark["rows"]])
