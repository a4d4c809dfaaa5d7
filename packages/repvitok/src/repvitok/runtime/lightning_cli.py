"""fit, validate, test and predict on LightningCLI, as a function that can be called many times in one process."""

from __future__ import annotations

import difflib
import logging
import math
import os
import re
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from jsonargparse import ArgumentError, Namespace, get_loader, set_loader
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.seed import isolate_rng

from repvitok.runtime.callbacks import (
    AtomicCheckpointIO,
    CurveLogger,
    PredictionFiles,
    SaveLast,
    StageProgress,
    TrainingInterrupted,
)
from repvitok.runtime.checkpointing import find_checkpoint, is_sharded, read_checkpoint, warn_of_damaged
from repvitok.runtime.commands import TrainingStage, import_object
from repvitok.runtime.documents import refuse_yaml_bomb
from repvitok.runtime.errors import MOST_PROCESSES, UserError, one_line, say_next
from repvitok.runtime.files import write_text_atomic

TRAINER_DEFAULTS: dict[str, Any] = {
    "accelerator": "auto",
    "devices": 1,
    "check_val_every_n_epoch": None,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "log_every_n_steps": 20,
    "max_epochs": -1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
}
"""Trainer arguments of every stage: checkpoints and progress are our callbacks, data modules split over ranks."""

_PRECISIONS = ("32-true", "32", 32, "16-mixed", "16", 16, "bf16-mixed", "bf16")
"""Weights are float32 in all of them: averages, Muon's moments and what is exported are made for that."""
_LEAST: dict[str, float] = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "limit_predict_batches": 0,
    "limit_test_batches": 0,
    "limit_train_batches": 0,
    "limit_val_batches": 0,
    "log_every_n_steps": 1,
    "num_nodes": 1,
    "reload_dataloaders_every_n_epochs": 0,
}
"""Smallest values of Trainer arguments, where Lightning checks none."""
_MOST = {"accumulate_grad_batches": 10**6, "devices": MOST_PROCESSES, "num_nodes": 100_000}
"""Largest ones: Lightning makes a list of so many devices, and starts a process for each."""
_RESUMED = ("global_step", "loops", "lr_schedulers", "optimizer_states", "state_dict")
"""Sections of a checkpoint without which a run would start anew or on other terms, and Lightning say nothing."""
_ENVIRONMENT = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning", "pytorch_lightning")
_YAML = "bounded_yaml"


def run_lightning(verb: str, argv: list[str], stage: TrainingStage) -> int:
    """Runs one of LightningCLI's verbs.

    The random state, logging levels and environment of the process are as before when this returns.

    Args:
        verb: "fit", "validate", "test" or "predict".
        argv: everything after the verb: `-c recipe.yaml`, dotted overrides, `--ckpt_path last|FILE`.
        stage: what is trained, on which data.

    Returns:
        0, or 128 + the number of the signal that ended training after its state was saved: 143 for SIGTERM, 138 for
        SIGUSR1.
    """
    with isolate_rng(), _quiet(), _environment_kept():
        try:
            _stage_cli(verb, stage)(argv)
        except TrainingInterrupted as error:
            if rank_zero_only.rank == 0:
                print(error, file=sys.stderr)
            if error.signal_number == signal.SIGINT:
                raise KeyboardInterrupt(str(error)) from error
            return 128 + error.signal_number
        except UserError:
            raise
        except (
            ArgumentError,
            MisconfigurationException,
            RuntimeError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
        ) as error:
            message = _user_message(error)
            if message is None:
                raise
            raise UserError(message) from error
        except SystemExit as ended:
            if isinstance(ended.__context__, KeyboardInterrupt):  # how Lightning ends on Ctrl-C outside of a step
                raise type(ended.__context__) from ended
            raise
    return 0


def parse_recipe(verb: str, recipes: list[str], stage: TrainingStage, overrides: Sequence[str] = ()) -> Any:
    """The configuration that a verb would run with, without building anything.

    Args:
        verb: "fit", "validate", "test" or "predict".
        recipes: YAML files, each laid over the ones before.
        stage: what they are recipes of.
        overrides: dotted options laid over them, such as the data's folder.

    Returns:
        The configuration, a namespace with the sections model, data, trainer, ...
    """
    arguments = [*(part for recipe in recipes for part in ("-c", recipe)), *overrides]
    with isolate_rng(), _quiet(), _environment_kept():
        try:
            _stage_cli(verb, stage, _ParsingOnly)(arguments)
        except _Parsed as parsed:
            return parsed.config[verb]
        except (ArgumentError, MisconfigurationException) as error:
            raise UserError(_component(error)) from error


def _load_yaml(text: str) -> Any:
    """jsonargparse's own loader, behind a look at the anchors; its refusals are jsonargparse's."""
    refuse_yaml_bomb(text, "recipe")
    return get_loader("yaml")(text)


set_loader(_YAML, _load_yaml, exceptions=(yaml.YAMLError,))


class WholeConfig(SaveConfigCallback):
    """Writes the run's config.yaml whole or not at all."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Puts it where it is resumed from."""
        text = self.parser.dump(self.config, skip_none=False)
        write_text_atomic(Path(trainer.default_root_dir) / self.config_filename, text)


class StageCLI(LightningCLI):
    """LightningCLI with this project's callbacks, loss curves, run folder and checkpoint rules."""

    verb: str
    stage: TrainingStage
    damaged: Mapping[Path, str] = MappingProxyType({})  # newer checkpoints than the one to resume from

    def __init__(self, argv: list[str]) -> None:
        """Parses `argv` (without the verb), builds everything and runs the verb."""
        self.program = self.stage.name.replace("_", "-")
        told = shlex.join([self.program, self.verb, *argv])
        # A model card tells it: what lies elsewhere on this machine by its name alone.
        self.command = re.sub(r"(?<![\w.~:/])/[^\s'\",\[\]]*/(?=[^\s/])", "", told)
        trainer_defaults = TRAINER_DEFAULTS | {"default_root_dir": str(Path("runs") / self.stage.name)}
        options = {"parser_mode": _YAML, "exit_on_error": False}
        super().__init__(
            import_object(self.stage.module),
            import_object(self.stage.data) if self.stage.data else None,
            save_config_callback=WholeConfig if self.verb == "fit" else None,  # config.yaml is training's
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults=trainer_defaults | self.stage.trainer_defaults,
            seed_everything_default=0,
            parser_kwargs={"parser_mode": _YAML, "exit_on_error": False, self.verb: options},
            subclass_mode_data=self.stage.subclass_data,
            auto_configure_optimizers=False,
            args=[self.verb, *argv],
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses without looking at `sys.argv`; a name that is not there is answered with the nearest that is.

        The help begins with the stage's own options; Lightning's trainer, three quarters of them, comes last.
        """
        verb: Any = self._subcommand_parsers[self.verb]
        verb._action_groups.sort(key=lambda group: any(a.dest.startswith("trainer") for a in group._group_actions))
        verb.usage = f"{self.program} {self.verb} -c RECIPE [-c OVERLAY ...] [--OPTION VALUE ...]"
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            if "are required" in str(error) and not {"-c", "--config"} & set(args):
                given = f"no recipe was given, -c {self.stage.recipe} for example; without one, {one_line(str(error))}"
                raise UserError(given) from error
            options = [
                name for action in self._subcommand_parsers[self.verb]._actions for name in action.option_strings
            ]
            raise UserError(_component(error) + _nearest(str(error), options)) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the sections `checkpoint` and `progress`, those of the stage's callbacks, and the stage's links."""
        parser.add_lightning_class_args(SaveLast, "checkpoint")
        parser.add_lightning_class_args(StageProgress, "progress")
        parser.set_defaults({"progress.stage": self.stage.name})
        for section, callback in self.stage.test_callbacks.items() if self.verb == "test" else ():
            parser.add_lightning_class_args(import_object(callback), section)
        for source, target in self.stage.links:
            parser.link_arguments(source, target)

    def _parse_ckpt_path(self) -> None:
        """Turns `--ckpt_path last` into a file and checks that the file can be read, before anything is built.

        `fit` with `last` starts anew where there is none; the other verbs take the last checkpoint by default, because
        numbers of untrained weights help nobody.
        """
        options = self.config[self.verb]
        wanted = options.get("ckpt_path")
        if wanted == "last" or (wanted is None and self.verb != "fit"):
            folder = Path(options.trainer.default_root_dir)
            found = find_checkpoint(folder)
            if found is None and self.verb != "fit":
                raise UserError(f"no readable checkpoint in {folder}: train first, or give --ckpt_path FILE")
            if found is not None and rank_zero_only.rank == 0:
                warn_of_damaged(found)
            if self.verb == "fit" and rank_zero_only.rank == 0:
                begin = f"resuming at step {found.step} of {found.path}" if found else "starting at step 0"
                print(begin if found else f"no checkpoint in {folder}: {begin}", file=sys.stderr)
            self.damaged = found.damaged if found else {}
            options["ckpt_path"] = str(found.path) if found else None
        if options.get("ckpt_path") is not None:
            self._check_sections(options["ckpt_path"])

    def _check_sections(self, path: str) -> None:
        """Refuses a checkpoint that lacks what this verb takes from it; Lightning passes over most of it in silence."""
        checkpoint = read_checkpoint(path, mmap=True)
        needed = _RESUMED if self.verb == "fit" else ("state_dict",)
        if is_sharded(path):
            needed = [name for name in needed if name not in ("state_dict", "optimizer_states")]
        lacking = [name for name in needed if checkpoint.get(name) is None]
        if lacking:
            raise UserError(
                f"{path} is damaged or of another program: it lacks {', '.join(lacking)}; give another checkpoint, or "
                "start anew without --ckpt_path"
            )

    def after_fit(self) -> None:
        """Makes up for the validation of a run that was stopped in it after its last step; says where the run is."""
        saves = next(callback for callback in self.trainer.callbacks if isinstance(callback, SaveLast))  # pyright: ignore[reportAttributeAccessIssue]
        if saves.validation_due:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        if self.trainer.is_global_zero:
            print(f"{saves.path(self.trainer)}: step {self.trainer.global_step}")
            say_next(*self.stage.next_words(self.config[self.verb]))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds the trainer with whole checkpoint files, and loss curves beside the loggers that are configured.

        Lightning's checkpoints and progress bars are on where such a callback is configured.
        Several processes train by the stage's own strategy unless one is configured.
        Under Slurm, Lightning's own requeueing is off: it would save beside `last.ckpt`, from inside a signal handler.
        """
        configured = self.config_init[self.verb].trainer
        if configured.strategy == "auto" and several_processes(configured):
            kwargs["strategy"] = self.stage.parallel_strategy
        plugins = configured.get("plugins") or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        if SLURMEnvironment.detect():
            kwargs["plugins"].append(SLURMEnvironment(auto_requeue=False))
        loggers = configured.get("logger")
        if loggers is not False:  # metrics.csv is always written, and first: the run's folder is where pictures go
            others = loggers if isinstance(loggers, list) else [loggers] if isinstance(loggers, Logger) else []
            kwargs["logger"] = [CurveLogger(configured.default_root_dir), *others]
        callbacks = configured.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if any(isinstance(callback, Checkpoint) for callback in callbacks):
            kwargs["enable_checkpointing"] = True
        if any(isinstance(callback, ProgressBar) for callback in callbacks):
            kwargs["enable_progress_bar"] = True
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except UserError:
            raise
        except (MisconfigurationException, ValueError, TypeError, RuntimeError, LookupError, ArithmeticError) as error:
            raise UserError(f"trainer: {one_line(str(error))}") from error
        _check_precision(trainer.precision)  # a plugin may have brought another
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, SaveLast) and self.verb == "fit":
                callback.damaged, callback.command = dict(self.damaged), self.command
        if self.verb == "predict":
            trainer.callbacks.append(PredictionFiles())  # pyright: ignore[reportAttributeAccessIssue]
        return trainer

    def before_instantiate_classes(self) -> None:
        """Checks the trainer's numbers before anything is built; predictions are on disk and need no memory."""
        options = self.config[self.verb].trainer
        if self.verb == "test" and self.stage.tells_test:
            self.config[self.verb].verbose = False
        # Arguments that Lightning would divide by, take for something else, or never stop at.
        for name, least in _LEAST.items():
            value = options.get(name)
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= least):
                raise UserError(f"trainer.{name}: expected a number of at least {least:g}, got {value}")
        for name, most in _MOST.items():
            if str(value := options.get(name)).isdecimal() and int(value) > most:
                raise UserError(f"trainer.{name}: expected at most {most}, got {value}")
        interval = options.get("val_check_interval")
        if isinstance(interval, int | float) and not (math.isfinite(interval) and interval > 0):
            raise UserError(f"trainer.val_check_interval: expected a number above 0, got {interval}")
        if options.get("precision") is not None:
            _check_precision(options.precision)
        loggers = options.get("logger") or []
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            arguments = logger.get("init_args") if isinstance(logger, Namespace) else None
            if arguments and arguments.get("save_dir") is not None:  # in the run's folder, unless it is absolute
                arguments.save_dir = os.path.normpath(Path(options.default_root_dir) / str(arguments.save_dir))
        if self.verb == "predict":
            self.config[self.verb]["return_predictions"] = False


def several_processes(configured: Any) -> bool:
    """Whether a run takes more than one device; Lightning is asked, since `devices` may be "auto", -1 or a list."""
    if configured.devices in (1, "1"):
        return configured.num_nodes > 1
    asked = Trainer(
        accelerator=configured.accelerator,
        devices=configured.devices,
        num_nodes=configured.num_nodes,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return asked.num_devices * asked.num_nodes > 1


class _Parsed(Exception):
    """Ends the construction of a command line that only parses."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


class _ParsingOnly(StageCLI):
    """Stops before anything is built: LightningCLI parses, builds and runs in its constructor."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses and hands the configuration out."""
        super().parse_arguments(parser, args)
        raise _Parsed(self.config)


def _stage_cli(verb: str, stage: TrainingStage, base: type[StageCLI] = StageCLI) -> type[StageCLI]:
    """A StageCLI that knows one verb only: building the parsers of all four takes four times as long."""
    only = {verb: LightningCLI.subcommands()[verb]}
    return type("StageCLI", (base,), {"verb": verb, "stage": stage, "subcommands": staticmethod(lambda: only)})


def _check_precision(precision: Any) -> None:
    if precision not in _PRECISIONS:
        raise UserError(
            f"trainer.precision: expected 32-true, 16-mixed or bf16-mixed, got {precision}: weights, their averages "
            "and Muon's moments are kept in float32"
        )


def _user_message(error: BaseException) -> str | None:
    """What an error of Lightning or jsonargparse says of the configuration or checkpoint; None for a bug of ours."""
    if isinstance(error, ArgumentError | MisconfigurationException):
        return _component(error)
    # The modules that the error came through, where it arose last.
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if "lightning.pytorch.trainer.connectors.checkpoint_connector" in modules:
        reason = f"{type(error).__name__}: {one_line(str(error))[:200]}"
        return (
            f"the checkpoint is damaged, or not of this recipe ({reason}); give another one, or the run's config.yaml"
        )
    if isinstance(error, ValueError | TypeError) and modules[-1].partition(".")[0] in ("jsonargparse", "lightning"):
        return _component(error)
    return None


def _component(error: BaseException) -> str:
    """The message on one line; of an optional component that could not be built, only its own error.

    jsonargparse reports `PerceptualLoss | None` as "... Errors: - what PerceptualLoss said - Expected a NoneType ...".
    """
    text = one_line(str(error))
    if lacking := re.search(r"Neither `(tensorboard)`|Requirement '(wandb)", text):
        name = lacking.group(1) or lacking.group(2)
        return f"trainer.logger: {name} is not installed: pip install 'repvitok[{name}]'"
    component = re.search(r"Errors: - (.+?) - Expected a <class 'NoneType'>", text)
    if component is None or component.group(1).startswith("Expected a"):  # no component: the option's name is needed
        return text
    return component.group(1)


def _nearest(message: str, options: Sequence[str]) -> str:
    """Words that name the option nearest to one that a message says is not there; "" where none is near."""
    unknown = re.search(r"unrecognized arguments: (--[\w.]+)|not accept option '([\w.]+)'", message)
    if unknown is None:
        return ""
    near = difflib.get_close_matches(unknown.group(1) or f"--{unknown.group(2)}", options, n=1, cutoff=0.8)
    return f" (did you mean {near[0] if unknown.group(1) else near[0].removeprefix('--')}?)" if near else ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides Lightning's banners and its advice about loader workers, for the length of a run."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")  # files are by batch
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual")  # of after the step, as meant
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Puts back the environment variables that Lightning sets."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
