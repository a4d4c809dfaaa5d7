"""What a quickstart run does: tasks, sizes, counts and training steps, read from its recipe and its options."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from repvitok.runtime.commands import DEPTH_RANGE, episodes_argument, number, path_argument, text_argument, whole_number
from repvitok.runtime.documents import MAX_SIDE, Count, Share, Size, load_yaml, parse
from repvitok.runtime.errors import MOST_PROCESSES, UserError

from repwam_core.sim.base import DEFAULT_SUITE

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_PRESET = "metaworld"
PRESETS: dict[str, dict[str, str]] = {
    DEFAULT_PRESET: {"cpu": "sim.yaml"},
    "mt50": {"cpu": "mt50_cpu.yaml", "gpu": "mt50_gpu.yaml"},
    "aloha": {"cpu": "aloha.yaml"},
}
"""Preset -> `--budget` -> its file in `RECIPES`; a number multiplies the steps of `cpu`."""
DATASET_PLAN = "dataset.yaml"
STAGES = ("repvitok", "latent_action", "pretrain", "adapt")


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of each training stage."""

    repvitok: Size
    latent_action: Size
    pretrain: Size
    adapt: Size

    def scaled(self, budget: float) -> Steps:
        """Every stage's steps times `budget`, at least two."""
        return Steps(**{name: max(2, round(value * budget)) for name, value in asdict(self).items()})


@dataclass(frozen=True)
class QuickstartConfig:
    """The settings of one run.

    Attributes:
        tasks: tasks of the suite that the success table is about.
        same_scene: two tasks told apart by the instruction alone; may be empty.
        episodes: demonstrations per task.
        eval_episodes: unseen seeds per task in closed loop.
        language_episodes: at most this many of them with a wrong instruction, and with none.
        size: frame height and width in pixels, multiples of 16.
        stride: raw frames per frame read from the data set.
        offsets: first raw frames at which every episode is encoded once.
        noise: how demonstrations are perturbed; `none` or a mode of `repwam collect`.
        held_out: share of the episodes held out of every training stage.
        steps: optimizer steps of each training stage.
        execute: action vectors executed before the policy plans again.
        suite: the simulator, as `repwam collect --suite` takes it.
        simulator: further settings of the suite, such as the steps after which an episode has failed.
        device: where models are trained and the policy runs: the CPU, or one GPU.
        filmed: episodes of each task that are filmed; `outcomes` for its first success and its first failure.
        recipes: training stage -> files in `RECIPES` that are laid over each other; by default the one of its name.
    """

    tasks: tuple[str, ...]
    same_scene: tuple[str, ...]
    episodes: Count
    eval_episodes: Count
    language_episodes: Count
    size: tuple[Size, Size]
    stride: Size
    offsets: tuple[Count, ...]
    noise: str
    held_out: Share
    steps: Steps
    execute: Count
    suite: str = DEFAULT_SUITE
    simulator: Mapping[str, Any] = field(default_factory=dict)
    device: Literal["cpu", "gpu"] = "cpu"
    filmed: Count | Literal["outcomes"] = "outcomes"
    recipes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.recipes) - set(STAGES)):
            raise UserError(f"recipes are of the stages {', '.join(STAGES)}; got {', '.join(unknown)}")

    @property
    def all_tasks(self) -> tuple[str, ...]:
        return self.tasks + self.same_scene

    @property
    def torch_device(self) -> str:
        """`device` as torch and the commands call it."""
        return {"cpu": "cpu", "gpu": "cuda"}[self.device]

    def recipe_files(self, stage: str) -> list[Path]:
        """The recipes of a training stage, each laid over the ones before it."""
        return [RECIPES / name for name in self.recipes.get(stage, (f"{stage}.yaml",))]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for digests and for the report."""
        return asdict(self)


def load_config(arguments: argparse.Namespace) -> QuickstartConfig:
    """Read the plan that the command line asks for, and lay its options over it."""
    path = RECIPES / _plan(arguments)
    return _with_options(parse(load_yaml(path), QuickstartConfig, str(path)), arguments)


def _plan(arguments: argparse.Namespace) -> str:
    """The name of the plan in `RECIPES`."""
    machine = arguments.budget if isinstance(arguments.budget, str) else "cpu"
    if arguments.dataset is not None:
        if arguments.preset is not None or machine != "cpu":
            raise UserError("--preset and --budget gpu are of simulated tasks; with --dataset, drop them")
        return DATASET_PLAN
    preset = arguments.preset or DEFAULT_PRESET
    if machine not in PRESETS[preset]:
        told = ", ".join(name for name, machines in PRESETS.items() if machine in machines)
        raise UserError(f"--budget {machine} needs a preset that is sized for it: --preset {told}")
    return PRESETS[preset][machine]


def _with_options(config: QuickstartConfig, arguments: argparse.Namespace) -> QuickstartConfig:
    if arguments.suite is not None:
        if not arguments.tasks or arguments.dataset is not None:
            raise UserError("--suite chooses the simulator of --tasks, so it needs them, and no --dataset")
        config = replace(config, suite=arguments.suite)
    if arguments.tasks:
        config = replace(config, tasks=tuple(arguments.tasks), same_scene=())
    if arguments.episodes is not None and arguments.dataset is None:
        config = replace(config, episodes=_positive("--episodes", _count("--episodes", arguments.episodes), at_least=2))
    if arguments.eval_episodes is not None:
        config = replace(config, eval_episodes=_positive("--eval-episodes", arguments.eval_episodes))
    if arguments.size is not None:
        config = replace(config, size=_size(arguments.size))
    factor = 1.0 if isinstance(arguments.budget, str) else arguments.budget
    return replace(config, steps=config.steps.scaled(factor))


def shaped_like(config: QuickstartConfig, height: int, width: int) -> QuickstartConfig:
    """Frames of a camera's shape: the config's smallest side stays, the longer one is the nearest multiple of 16.

    480 x 640 pixels and a config of 64 x 64 give 64 x 80.
    """
    short = min(config.size)
    long = 16 * max(1, round(short * max(height, width) / min(height, width) / 16))
    return replace(config, size=(short, long) if width >= height else (long, short))


def _count(option: str, words: list[str]) -> int:
    try:
        (word,) = words
        return int(word)
    except ValueError as error:
        told = f"{option} must be one number, of demonstrations per task, without --dataset; got {' '.join(words)}"
        raise UserError(told) from error


def _budget(text: str) -> float | str:
    """The type of `--budget`: a machine that a preset is sized for, or a factor."""
    return text if text in ("cpu", "gpu") else number(0, 1000, above=True)(text)


def _positive(option: str, value: int, at_least: int = 1) -> int:
    if value < at_least:
        raise UserError(f"{option} must be at least {at_least}, got {value}")
    return value


def _size(size: list[int]) -> tuple[int, int]:
    height, width = size
    if height < 16 or width < 16 or height % 16 or width % 16:
        near = tuple(max(16, 16 * round(value / 16)) for value in size)
        raise UserError(f"--size must be multiples of 16, got {height} {width}; the nearest is {near[0]} {near[1]}")
    return height, width


def add_quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the quickstart's options to a parser."""
    add = parser.add_argument
    add(
        "--out", type=path_argument, help="folder of the run (default: runs/quickstart, or runs/ and the preset's name)"
    )
    add(
        "--seed", type=whole_number(0, 2**32 - 1), default=0, help="training and collection seed (default: %(default)s)"
    )
    add("--fresh", action="store_true", help="start over: drop the stages already done in --out")
    add(
        "--dataset",
        type=path_argument,
        help="run on this LeRobot data set (v2.0 to v3.0) instead of the simulator, ending in open-loop evaluation",
    )
    add(
        "--size",
        type=whole_number(16, MAX_SIDE),
        nargs=2,
        metavar=("H", "W"),
        help="frame size in pixels, multiples of 16",
    )
    add(
        "--preset",
        choices=PRESETS,
        help=f"what to run in the simulator: {DEFAULT_PRESET} (default), five tasks in a quarter of an hour; mt50, one "
        "policy for all 50 tasks of Meta-World (docs/mt50.md); aloha, two arms and three cameras (docs/aloha.md)",
    )
    add(
        "--tokenizer",
        type=text_argument,
        metavar="FOLDER",
        help="a trained visual tokenizer in place of one's own training: a folder, an installed one's name, or "
        "hf://owner/name",
    )
    add("--suite", type=text_argument, help="the simulator of --tasks (default: metaworld)")
    add(
        "--tasks",
        type=text_argument,
        nargs="+",
        metavar="TASK",
        help="simulated tasks (default: the recipe's three of Meta-World and its pair)",
    )
    add(
        "--episodes",
        type=episodes_argument,
        nargs="+",
        metavar="N",
        help="demonstrations per task (default: the recipe's); with --dataset the numbers of the episodes to use, and "
        "ranges of them: 0-9,12 (default: all)",
    )
    add("--cameras", type=text_argument, nargs="+", help="with --dataset: cameras to use (default: all)")
    add("--depth-range", **{**DEPTH_RANGE, "help": f"with --dataset: {DEPTH_RANGE['help']}"})
    add(
        "--eval-episodes",
        type=whole_number(1, 100_000),
        help="unseen seeds per task in closed loop (default: the recipe's)",
    )
    add(
        "--budget",
        type=_budget,
        default="cpu",
        metavar="{cpu,gpu,X}",
        help="the machine to size the run for: two cores, or with --preset mt50 16 cores and one GPU; or a number that "
        "every stage's training steps on a CPU are multiplied by (default: %(default)s)",
    )
    add(
        "--controls",
        action="store_true",
        help="also train the policy without latent actions, without the video objective and on an untrained "
        "tokenizer, and report what each of them buys (about twice the time again)",
    )
    add("--workers", type=whole_number(1, MOST_PROCESSES), help="simulator processes (default: one per core)")
