"""A command line of verbs, shared by the three packages: answers --help and --version without importing torch."""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

from repvitok.runtime.documents import MAX_SIDE, parse_episodes
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import write_text_atomic

LIGHTNING_VERBS = {
    "fit": "train from a recipe: -c recipe.yaml, dotted overrides, --ckpt_path last to resume",
    "validate": "validation metrics of a checkpoint (the run's last one unless --ckpt_path says otherwise)",
    "test": "test metrics of a checkpoint",
    "predict": "a checkpoint's predictions of held-out data, as files in the run's folder",
}
MANY = 10**9
"""The largest number that an option takes where no smaller bound is due: what is counted here is never more."""
SEEDS = 2**63 - 1
"""The largest seed that all generators take."""


@dataclass(frozen=True)
class Command:
    """A verb with its own options: `arguments` declares them, `run` gets them parsed and returns an exit code."""

    name: str
    help: str
    run: Callable[[argparse.Namespace], int | None]
    arguments: Callable[[argparse.ArgumentParser], None] = lambda _: None


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
        trainer_defaults: Trainer arguments that differ from `repvitok.runtime.lightning_cli.TRAINER_DEFAULTS`.
        subclass_data: take any LightningDataModule of the given base by class_path.
        parallel_strategy: Lightning's strategy of several processes where the configuration leaves it at "auto".
        recipe: one to begin with, named where none was given.
        next_words: the command that usually follows `fit`, from the configuration of the run.
        tells_test: whether the module itself prints what `test` found; Lightning's table is left out.
        test_callbacks: callbacks of the verb `test`, "module:Class" by the section of their options.
    """

    name: str
    module: str
    data: str | None
    recipe: str
    next_words: Callable[[Any], Sequence[object]]
    links: tuple[tuple[str, str], ...] = ()
    trainer_defaults: dict[str, Any] = field(default_factory=dict)
    subclass_data: bool = False
    parallel_strategy: str = "auto"
    tells_test: bool = False
    test_callbacks: dict[str, str] = field(default_factory=dict)


def say_loading() -> None:
    """On a terminal, a line before the imports that take seconds, so that the screen does not stay empty meanwhile."""
    if sys.stderr.isatty() and "lightning" not in sys.modules:
        print("loading PyTorch and Lightning ...", file=sys.stderr, flush=True)


def training_commands(stage: TrainingStage) -> list[RawCommand]:
    """The verbs fit, validate, test and predict of a stage, on LightningCLI."""

    def command(verb: str, text: str) -> RawCommand:
        def run(argv: list[str]) -> int:
            if argv in (["-h"], ["--help"]):
                return _show_help(verb, stage)
            say_loading()
            from repvitok.runtime.lightning_cli import run_lightning

            return run_lightning(verb, argv, stage)

        return RawCommand(verb, text, run)

    return [command(verb, text) for verb, text in LIGHTNING_VERBS.items()]


def _show_help(verb: str, stage: TrainingStage) -> int:
    """Prints a training verb's help: what it was the last time, kept in the user's cache while no code has changed.

    To make it all components are imported and their options built, which takes many seconds; a full or read-only cache
    is passed over.
    """
    kept = _help_file(verb, stage)
    with suppress(OSError, UnicodeDecodeError):
        print(kept.read_text(encoding="utf-8"), end="")
        return 0
    say_loading()
    from repvitok.runtime.lightning_cli import run_lightning

    said = io.StringIO()
    try:
        with redirect_stdout(said):
            code = run_lightning(verb, ["--help"], stage)
    except SystemExit as ended:  # how argparse ends after its help
        code = int(ended.code or 0)
    print(said.getvalue(), end="")
    with suppress(OSError):
        if code == 0 and said.getvalue():
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(kept, said.getvalue())
    return code


def _help_file(verb: str, stage: TrainingStage) -> Path:
    """Where a verb's help is kept, by what it depends on: our files, the libraries' versions, the screen's width."""
    packages = {"repvitok", stage.module.partition(".")[0]}
    folders = [Path(place) for name in sorted(packages) for place in import_module(name).__path__]
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    stamps = [(str(path), path.stat().st_mtime_ns) for path in files]
    versions = [sys.version, *(version(name) for name in ("torch", "lightning", "jsonargparse"))]
    known = repr((stamps, versions, get_terminal_size().columns, verb, stage.name))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "repvitok" / f"help-{hashlib.sha256(known.encode()).hexdigest()[:24]}.txt"


def add_license(parser: argparse.ArgumentParser) -> None:
    """The option `--license` of a verb that writes a model card."""
    told = "of the weights, for the model card: apache-2.0, other, ..."
    parser.add_argument("--license", type=text_argument, metavar="NAME", help=told)


def add_half(parser: argparse.ArgumentParser) -> None:
    """The option `--half` of a verb that exports a model."""
    told = "store weights rounded to float16, a file of half the size; they are loaded as float32"
    parser.add_argument("--half", action="store_true", help=told)


def push_command(*files: str) -> Command:
    """The verb that puts an exported folder on the hub.

    Args:
        files: tuples of the names that may go, each as "module:NAME", imported when the verb runs.
    """

    def arguments(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--folder", type=path_argument, required=True, help="exported folder, with its model card README.md")
        add("--to", type=text_argument, required=True, metavar="OWNER/NAME", help="on the hub; made if it is not there")
        add("--private", action="store_true", help="of a new one: only its owner sees it")
        add("--revision", type=text_argument, metavar="BRANCH", help="a branch, made if it is not there")

    def run(options: argparse.Namespace) -> None:
        push_to_hub = import_object("repvitok.runtime.pretrained:push_to_hub")  # with torch
        names = tuple(name for path in files for name in import_object(path))
        print(push_to_hub(options.folder, options.to, names, private=options.private, revision=options.revision))

    return Command("push", "an exported folder to the Hugging Face hub", run, arguments)


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
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    raw = {command.name: command for command in commands if isinstance(command, RawCommand)}
    if arguments and arguments[0] in raw:
        return raw[arguments[0]].run(arguments[1:]) or 0
    parser = command_parser(program, distribution, description, commands)
    parsed = parser.parse_args(arguments)
    if parsed.verb is None:
        parser.print_help()
        return 0
    return parsed.run(parsed) or 0


class _Parser(argparse.ArgumentParser):
    """argparse with its errors raised, so that they end as one line."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (see {self.prog} --help)")


def command_parser(
    program: str, distribution: str, description: str, commands: Sequence[Command | RawCommand]
) -> argparse.ArgumentParser:
    """The parser of a command line: a subparser for each verb, with the verb's options."""
    epilog = "--debug, with any verb: the traceback of an error, above its one line"
    parser = _Parser(prog=program, description=description, epilog=epilog)
    parser.add_argument("--version", action="version", version=f"{program} {version(distribution)}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    for command in commands:
        sub = verbs.add_parser(command.name, help=command.help, description=command.help)
        if isinstance(command, Command):
            command.arguments(sub)
            sub.set_defaults(run=command.run)
    return parser


def whole_number(least: int = 0, most: int = MANY) -> Callable[[str], int]:
    """The argument type of a whole number from `least` to `most`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {value}")
        return value

    return convert


def number(least: float | int, most: float | int, *, above: bool = False) -> Callable[[str], float]:
    """The argument type of a number from `least`, or `above` it, to `most`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not (math.isfinite(value) and (least < value if above else least <= value) and value <= most):
            ends = f"{'above' if above else 'from'} {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"expected a number {ends}, got {text}")
        return value

    return convert


def text_argument(text: str) -> str:
    """The argument type of a name that must say something: not empty, no blanks alone."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a name, got nothing; an unset variable of the shell?")
    return text


def path_argument(text: str) -> Path:
    """The argument type of a file or folder: an empty one would be the current folder, which nobody means by it."""
    return Path(text_argument(text))


def parse_share(text: str) -> tuple[int, int]:
    """The argument type of `--shard i/n`: "2/8" -> (2, 8), the third of eight shares."""
    index, _, shares = text.partition("/")
    both = index.isascii() and index.isdecimal() and shares.isascii() and shares.isdecimal()
    if not (both and len(text) <= 16 and int(index) < int(shares)):
        raise argparse.ArgumentTypeError(f"expected I/N with 0 <= I < N, for example 0/8, got {text!r}")
    return int(index), int(shares)


def parse_held_out(text: str) -> float | str:
    """The argument type of `--held-out`: a share below 1, or numbers of episodes; "0" is none, "0-0" episode 0."""
    with suppress(ValueError):
        if 0 <= (share := float(text)) < 1:
            return share
    try:
        parse_episodes(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(f"expected a share below 1 or numbers like 2,5-7, got {text!r}") from error
    return text


def parse_size(text: str) -> tuple[int, int]:
    """The argument type of `--size`: "64" -> (64, 64), "96x128" -> (96, 128), height and width in pixels."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdecimal() and len(part) <= 5 for part in parts):
        raise argparse.ArgumentTypeError(f"expected a size like 64 or 96x128 (height x width), got {text!r}")
    height, width = int(parts[0]), int(parts[-1])
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise argparse.ArgumentTypeError(f"expected sides of 1 to {MAX_SIDE} pixels, got {text!r}")
    return height, width


def episodes_argument(text: str) -> str:
    """The argument type of one of `--episodes`: numbers and ranges of them, which only a data set can look up."""
    try:
        parse_episodes(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


EPISODES: dict[str, Any] = {
    "type": episodes_argument,
    "nargs": "+",
    "metavar": "N",
    "help": "their numbers in the data set, and ranges of them: 0-9,12 (default: all)",
}
"""Keyword arguments of `add_argument("--episodes", ...)`, see `repvitok.data.split.choose_episodes`."""

DEPTH_RANGE: dict[str, Any] = {
    "type": number(0, 1e9),
    "nargs": 2,
    "metavar": ("MIN", "MAX"),
    "help": "read depth maps, too: from MIN black to MAX white, in the numbers they store",
}
"""Keyword arguments of `add_argument("--depth-range", ...)`, see `repvitok.runtime.documents.checked_range`."""


def import_object(path: str) -> Any:
    """Imports "module:name"."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
