"""A command line of verbs, shared by the three packages: answers --help and --version without importing torch."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from repvitok.errors import UserError


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing."""


@dataclass(frozen=True)
class Command:
    """A verb with its own options: `arguments` declares them, `run` gets them parsed and returns an exit code."""

    name: str
    help: str
    run: Callable[[argparse.Namespace], int | None]
    arguments: Callable[[argparse.ArgumentParser], None] = _no_arguments


@dataclass(frozen=True)
class RawCommand:
    """A verb that parses its own arguments: `run` gets everything after the verb."""

    name: str
    help: str
    run: Callable[[list[str]], int | None]


@dataclass(frozen=True)
class TrainingStage:
    """What LightningCLI needs to know of a stage; classes are named "module:Class" and imported when a verb runs.

    Attributes:
        name: stage name, shown beside the progress bar and used for the default run folder runs/<name>.
        module: the LightningModule.
        data: the LightningDataModule, or None for a module that brings its own loaders.
        links: (source, target) pairs of dotted keys for `link_arguments`, applied on instantiation.
        trainer_defaults: Trainer arguments that differ from `repvitok.lightning_cli.TRAINER_DEFAULTS`.
        subclass_data: take any LightningDataModule of the given base by class_path.
        parallel_strategy: Lightning's strategy of several processes where the configuration leaves it at "auto".
        test_callbacks: callbacks of the verb `test`, "module:Class" by the section of their options.
    """

    name: str
    module: str
    data: str | None
    links: tuple[tuple[str, str], ...] = ()
    trainer_defaults: dict[str, Any] = field(default_factory=dict)
    subclass_data: bool = False
    parallel_strategy: str = "auto"
    test_callbacks: dict[str, str] = field(default_factory=dict)


LIGHTNING_VERBS = {
    "fit": "train from a recipe: -c recipe.yaml, dotted overrides, --ckpt_path last to resume",
    "validate": "validation metrics of a checkpoint (the run's last one unless --ckpt_path says otherwise)",
    "test": "test metrics of a checkpoint",
    "predict": "a checkpoint's predictions of held-out data, as files in the run's folder",
}


def training_commands(stage: TrainingStage) -> list[RawCommand]:
    """The verbs fit, validate, test and predict of a stage, on LightningCLI."""

    def command(verb: str, text: str) -> RawCommand:
        def run(argv: list[str]) -> int:
            from repvitok.lightning_cli import run_lightning

            return run_lightning(verb, argv, stage)

        return RawCommand(verb, text, run)

    return [command(verb, text) for verb, text in LIGHTNING_VERBS.items()]


def run_commands(
    program: str,
    distribution: str,
    description: str,
    commands: Sequence[Command | RawCommand],
    argv: Sequence[str] | None = None,
) -> int:
    """Parses a command line and runs its verb.

    Args:
        program: name of the console script.
        distribution: installed package whose version `--version` prints.
        description: one sentence for `--help`.
        commands: the verbs.
        argv: arguments without the program's name; `sys.argv[1:]` when None.

    Returns:
        The verb's exit code, 0 when it returned None.

    Raises:
        UserError: for arguments that cannot be parsed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    raw = {command.name: command for command in commands if isinstance(command, RawCommand)}
    if arguments and arguments[0] in raw:
        return raw[arguments[0]].run(arguments[1:]) or 0
    parser = _parser(program, distribution, description, commands)
    parsed = parser.parse_args(arguments)
    if parsed.verb is None:
        parser.print_help()
        return 0
    return parsed.run(parsed) or 0


class _Parser(argparse.ArgumentParser):
    """argparse with its errors raised, so that they end as one line."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser(
    program: str, distribution: str, description: str, commands: Sequence[Command | RawCommand]
) -> argparse.ArgumentParser:
    parser = _Parser(prog=program, description=description)
    parser.add_argument("--version", action="version", version=f"{program} {version(distribution)}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    for command in commands:
        sub = verbs.add_parser(command.name, help=command.help, description=command.help)
        if isinstance(command, Command):
            command.arguments(sub)
            sub.set_defaults(run=command.run)
    return parser


def parse_share(text: str) -> tuple[int, int]:
    """The argument type of `--shard i/n`: "2/8" -> (2, 8), the third of eight shares.

    Raises:
        argparse.ArgumentTypeError: not two whole numbers with i below n; argparse adds the option's name.
    """
    index, _, shares = text.partition("/")
    if not (index.isdecimal() and shares.isdecimal() and int(index) < int(shares)):
        raise argparse.ArgumentTypeError(f"expected I/N with 0 <= I < N, for example 0/8, got {text!r}")
    return int(index), int(shares)


def parse_held_out(text: str) -> float | str:
    """The argument type of `--held-out`: a share below 1, or numbers of episodes; "0" is none of them, "0-0" episode 0.

    Raises:
        argparse.ArgumentTypeError: neither; argparse adds the option's name.
    """
    from repvitok.data.split import parse_episodes

    with suppress(ValueError):
        if (share := float(text)) < 1:
            return share
    try:
        parse_episodes(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(f"expected a share below 1 or numbers like 2,5-7, got {text!r}") from error
    return text


EPISODES: dict[str, Any] = {
    "nargs": "+",
    "metavar": "N",
    "help": "their numbers in the data set, and ranges of them: 0-9,12 (default: all)",
}
"""Keyword arguments of `add_argument("--episodes", ...)`, see `repvitok.data.split.choose_episodes`."""


def import_object(path: str) -> Any:
    """Imports "module:name"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
