"""The code blocks of the documents: found, their commands read by a real shell and parsed by the real parsers.

A block's commands are not guessed from its text. bash runs it with every program replaced by a stub that notes what it
was called with, so that variables, loops, continued lines and comments mean what they mean to a reader's shell.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from latent_action import cli as latent_action
from repvitok import cli as repvitok
from repvitok.runtime.commands import LIGHTNING_VERBS, TrainingStage, command_parser
from repvitok.runtime.lightning_cli import parse_recipe
from repwam_core import cli as repwam

ROOT = Path(__file__).parents[1]
STAGES = tuple(f"docs/stages/{path.name}" for path in sorted((ROOT / "docs/stages").glob("*.md")))
"""The pages of the stages are read as one document: each takes what the one before made."""
ROBOT = ("docs/own-robot.md", "docs/real-robot.md")
CHAINS = (
    *((str(path.relative_to(ROOT)),) for path in (ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md")))),
    STAGES,
    ROBOT,
    *((path,) for path in (f"docs/{page.name}" for page in sorted(ROOT.glob("docs/*.md"))) if path not in ROBOT),
    *((str(path.relative_to(ROOT)),) for path in sorted(ROOT.glob("docs/decisions/*.md"))),
    *((str(path.relative_to(ROOT)),) for path in sorted(ROOT.glob("docs/api/*.md"))),
    ("CONTRIBUTING.md",),
)
"""Documents that belong together, in reading order. Results in benchmarks/ and recipes/ say what was run once, at the
commit that they name: they are records, no instructions."""
INSTALLED = {entry.name for entry in entry_points(group="repvitok.weights")}
"""Models that are installed, which are loaded by their names."""
YOURS = {
    "docs/own-robot.md": ("dataset", "key.txt"),  # recorded in section 1; a file with a secret
    "README.md": ("policy",),  # "models, tokenizers and statistics, one folder"
    "docs/stages/7-serve.md": ("key.txt",),
    "docs/datasets.md": (
        "tokenizer", "wam", "prepared/task_327", "agibot/task_*",
        *(f"runs/{name}/latents" for name in
          ("agibot", "robomind_agilex", "robocoin", "interndata_a1_genie1", "interndata_a1_dual_6dof")),
    ),
    "docs/robotwin.md": ("policy", "RoboTwin/data", "RoboTwin/eval_result"),
    "packages/repwam-client/README.md": ("policy",),
    "packages/repwam-core/README.md": ("policy", "latents", "tokenizer", "lat", "RoboTwin/data"),  # "Latents ..."
}  # fmt: skip
"""What a document expects to be there, beside names in capitals, absolute paths and hub addresses."""
INSIDE_OTHERS = {
    "cd RoboTwin": "in RoboTwin's checkout; tests/integrations drives the folders that it gets",
    "bash eval.sh": "likewise",
    "vla-eval run": "in the harness's environment; tests/integrations/test_vla_eval.py runs it",
}
"""Blocks that are typed among another project's files, by a part of them, and why nothing of them is read here."""
READS = {
    "api_key_file", "ckpt", "dataset", "demonstrations", "folders", "init_from", "lapa", "lat", "latents", "policy",
    "tokenizer",
}  # fmt: skip
_STUBS = {
    "note": """#!/bin/sh
printf '%s\\037' "${0##*/}" "$@" >> "$CALLS"; printf '\\036' >> "$CALLS"
""",
    "uv": """#!/bin/sh
case "$1" in
run) shift
    while :; do case "$1" in --group | --with | --extra) shift 2 ;; --*) shift ;; *) break ;; esac; done
    exec "$@" ;;
venv) mkdir -p "${2:-.venv}/bin"; for stub in "${0%/*}"/*; do ln -sf "$stub" "${2:-.venv}/bin/"; done ;;
esac
exec "${0%/*}/note-uv" "$@"
""",
    "git": '#!/bin/sh\nif [ "$1" = clone ]; then ln -sfn . "$3"; fi\nexec "${0%/*}/note-git" "$@"\n',
    "tar": '#!/bin/sh\nmkdir -p repvitok-0.1.0\nexec "${0%/*}/note-tar" "$@"\n',
    "python": '#!/bin/sh\nif [ "$1" = -c ]; then exec "$PYTHON" "$@"; fi\nexec "${0%/*}/note-python" "$@"\n',
}
_NOTED = (
    "repvitok", "latent-action", "repwam", "pip", "curl", "sbatch", "mkdocs", "pytest", "tensorboard", "lerobot-eval",
    "lerobot-rollout",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block: `line` is its first line's number in the document."""

    document: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.document}:{self.line}"


@dataclass(frozen=True)
class Call:
    """A program and its arguments, as a block calls it; `tasks` are the lines of a job array's list."""

    block: Block
    words: tuple[str, ...]
    tasks: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return " ".join(self.words)


def blocks(documents: tuple[str, ...], *languages: str) -> list[Block]:
    """The blocks of documents in these languages, in order."""
    found = []
    for document in documents:
        text = (ROOT / document).read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
            if match.group(1) in languages:
                found.append(Block(document, text[: match.start(2)].count("\n") + 1, match.group(1), match.group(2)))
    return found


def make_sandbox(folder: Path, dataset: Path) -> Path:
    """A folder with the clone's files, where commands of documents run; names in capitals of data are `dataset`."""
    for name in ("recipes", "benchmarks", "packages", "tests", "tools"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("DATASET", "FOLDER"):
        (folder / name).symlink_to(dataset)
    stubs = folder / ".stubs"
    stubs.mkdir()
    for name, text in _STUBS.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    for name in _NOTED:
        (stubs / name).symlink_to("note")
    for name in ("uv", "git", "tar", "python"):
        (stubs / f"note-{name}").symlink_to("note")
    return folder


def calls(block: Block, sandbox: Path) -> list[Call]:
    """The programs that a bash block calls, in order, by running it in a sandbox with stubs in their place."""
    if any(part in block.text for part in INSIDE_OTHERS):
        return []
    noted = sandbox / ".calls"
    noted.write_text("")
    stubs = sandbox / ".stubs"
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    environment = {**kept, "PATH": f"{stubs}:/usr/bin:/bin", "CALLS": str(noted), "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text.replace("<this repository>", "REPOSITORY")],
        cwd=sandbox, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{block.name}: {done.stderr}"
    found = []
    for record in noted.read_text().split("\036")[:-1]:
        words = tuple(
            word.removeprefix("note-") if not at else word for at, word in enumerate(record.split("\037")[:-1])
        )
        found.append(_submitted(block, words, sandbox) if words[0] == "sbatch" else Call(block, words))
    return found


def _submitted(block: Block, words: tuple[str, ...], sandbox: Path) -> Call:
    """What a Slurm script was told to run, from what it gave to sbatch."""
    script = next(at for at, word in enumerate(words) if word.endswith(".sbatch"))
    if words[script].endswith("array.sbatch"):
        tasks = (sandbox / words[script + 1]).read_text().splitlines()
        return Call(block, ("sbatch", *words[script + 2 :]), tuple(tasks))
    return Call(block, ("sbatch", *words[script + 1 :]))


@dataclass
class Meaning:
    """What a command of ours reads and writes, as its parser says."""

    reads: set[str] = field(default_factory=set)
    writes: set[str] = field(default_factory=set)


_PROGRAMS: dict[str, tuple[Any, TrainingStage]] = {
    "repvitok": (repvitok, repvitok.STAGE),
    "latent-action": (latent_action, latent_action.STAGE),
    "repwam": (repwam, repwam.STAGE),
}


class Parser:
    """Parses the commands of a document; keeps the recipes of its training runs, whose config.yaml later ones name."""

    def __init__(self) -> None:
        self._runs: dict[str, tuple[list[str], list[str]]] = {}

    def parse(self, words: list[str]) -> Meaning:
        """Raises a `UserError` for what the command itself would refuse."""
        program, stage = _PROGRAMS[words[0]]
        commands, verbs = program.COMMANDS, words[1:]
        if verbs[0] == "lapa":
            commands, stage, verbs = latent_action.LAPA_COMMANDS, latent_action.LAPA_STAGE, verbs[1:]
        if verbs[0] in LIGHTNING_VERBS:
            return self._parse_training(verbs[0], verbs[1:], stage)
        if verbs == ["--version"]:
            return Meaning()
        distribution = "repwam-core" if words[0] == "repwam" else words[0]
        parser = command_parser(words[0], distribution, "", commands)
        return _meaning_of_options(parser.parse_args(verbs))

    def _parse_training(self, verb: str, arguments: list[str], stage: TrainingStage) -> Meaning:
        recipes: list[str] = []
        overrides: list[str] = []
        rest = iter(arguments)
        for word in rest:
            if word == "-c":
                files, earlier = self._recipe(next(rest), stage)
                recipes, overrides = recipes + files, earlier + overrides
            else:
                overrides.append(word)
        config = parse_recipe(verb, recipes, stage, overrides)
        run = str(config.trainer.default_root_dir)
        meaning = Meaning(set(_paths(config.as_dict())))
        if verb == "fit":
            meaning.writes = {run}
            self._runs[run] = (recipes, overrides)
        return meaning

    def _recipe(self, path: str, stage: TrainingStage) -> tuple[list[str], list[str]]:
        """Files and overrides that a -c stands for: of a run's config.yaml those that the run was started with."""
        folder, _, name = path.rpartition("/")
        if name == "config.yaml" and folder in self._runs:
            return self._runs[folder]
        if path == "RECIPE":
            return [str(next((ROOT / "recipes").glob(f"*_{stage.name}/base.yaml")))], []
        assert (ROOT / path).is_file(), f"no recipe {path}"
        return [str(ROOT / path)], []


def _meaning_of_options(options: argparse.Namespace) -> Meaning:
    given = {name: value for name, value in vars(options).items() if value is not None}
    meaning = Meaning()
    for name in READS & given.keys():
        values = given[name] if isinstance(given[name], list | tuple) else [given[name]]
        meaning.reads |= {str(value) for value in values}
    if options.verb == "merge":
        meaning.reads.add(str(options.out))
    elif "out" in given:
        meaning.writes = {str(given["out"])}
    return meaning


def _paths(config: Any, key: str = "") -> Iterator[str]:
    """Values under the names of `READS`, anywhere in a configuration."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield from _paths(value, name)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _paths(value, key)
    elif key in READS and isinstance(config, str | os.PathLike):
        yield str(config)


def is_there(path: str, made: set[str], documents: tuple[str, ...]) -> bool:
    """Whether what a document reads was made by an earlier command, is an installed model, or the reader's own."""
    first = path.split("/")[0]
    if first.isupper() or path.startswith(("/", "hf://")) or path in INSTALLED:
        return True
    if any(path in YOURS.get(document, ()) for document in documents):
        return True
    return any(path == folder or path.startswith(f"{folder}/") for folder in made)
