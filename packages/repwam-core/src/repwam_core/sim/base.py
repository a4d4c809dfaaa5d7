"""What a simulator is to the rest: a task to drive, and the settings that make tasks, found by their suite's name.

To add a simulator, subclass both in a module of your own (docs/own-simulator.md has a whole one in 60 lines).
Collecting, evaluating, baselines and the command line then take it as they take Meta-World. Training and test episodes
have their seeds from two ranges that cannot meet.
"""

from __future__ import annotations

import difflib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar

import numpy as np
from repvitok.runtime.documents import parse
from repvitok.runtime.errors import UserError

from repwam_core.interface import CommandKind, Embodiment, Observation

EVALUATION_SEEDS_FROM = 1_000_000
MAX_DATASET_SEED = 99
MAX_EPISODES_PER_TASK = 1_000
MAX_ATTEMPTS = 10
DEFAULT_SUITE = "metaworld"
"""Also of the data sets and results of version 0.1, which name no suite."""
HAND_TO_OBJECT, OBJECT_TO_GOAL = "hand to object", "object to goal"
"""Names of `SimTask.distances` from which a report tells where failed episodes end."""
ENTRY_POINTS = "repwam.simulators"
"""The group in which a package names its suites: `suite = "module:SettingsClass"`."""
BUILT_IN = (
    EntryPoint("metaworld", "repwam_core.sim.metaworld:MetaWorldSettings", ENTRY_POINTS),
    EntryPoint("aloha", "repwam_core.sim.aloha:AlohaSettings", ENTRY_POINTS),
)


def collection_seed(dataset_seed: int, episode: int, attempt: int = 0) -> int:
    """The simulator's seed for one attempt at demonstration number `episode` of a task.

    `dataset_seed * 10,000 + attempt * 1,000 + episode`: distinct for distinct arguments, and below
    `EVALUATION_SEEDS_FROM`. Tasks share seeds, so that tasks of one scene are shown in the same layouts.
    """
    for what, value, largest in (
        ("the data set's seed", dataset_seed, MAX_DATASET_SEED),
        ("the episode of a task", episode, MAX_EPISODES_PER_TASK - 1),
        ("the attempt", attempt, MAX_ATTEMPTS - 1),
    ):
        if not 0 <= value <= largest:
            raise UserError(f"{what} must lie in 0 .. {largest}, got {value}")
    return dataset_seed * 10_000 + attempt * 1_000 + episode


def evaluation_seeds(count: int, first: int = EVALUATION_SEEDS_FROM) -> list[int]:
    """`count` consecutive seeds that no collection uses."""
    seeds = list(range(first, first + count))
    require_evaluation_seeds(seeds)
    return seeds


def require_evaluation_seeds(seeds: list[int]) -> None:
    """Raise a UserError if a seed could be one of a collection, or is given twice."""
    seen = [seed for seed in seeds if seed < EVALUATION_SEEDS_FROM]
    if seen:
        raise UserError(
            f"evaluation seeds must be at least {EVALUATION_SEEDS_FROM}, so that no demonstration shows them, "
            f"got {seen[0]}"
        )
    if len(set(seeds)) != len(seeds):
        raise UserError("an evaluation seed may be given once only")


_SUITES: dict[str, type[SimSettings]] = {}


class SimTask(ABC):
    """One task in one simulator. The seed of `start` fixes the whole episode, whatever ran before it.

    Simulating and rendering are two calls, because rendering costs far more: `start` and `advance` simulate,
    `observe` renders; `reset` and `step` do both.

    Attributes:
        name: The task's name, as a user gives it.
        embodiment: Action channels with units, state names, camera keys and control rate.
        action_limits: The largest magnitude of each action channel, `(C,)` in its unit.
        step_limits: Where actions are absolute targets, how far full speed moves each of them in a control step, `(C,)`
            in its unit: what disturbances are measured by. None where actions are changes: `action_limits` says it.
        max_steps: Control steps after which an episode counts as failed.
        success: Whether the task has been solved at any moment of this episode; `start` and `advance` keep it.
        steps: Control steps since `start`; kept likewise.
    """

    name: str
    embodiment: Embodiment
    action_limits: np.ndarray
    step_limits: np.ndarray | None = None
    max_steps: int
    success: bool = False
    steps: int = 0

    @abstractmethod
    def start(self, seed: int) -> None:
        """Begin the episode of `seed` without rendering."""

    @abstractmethod
    def advance(self, action_si: np.ndarray) -> None:
        """Carry out one action, `(C,)` in the embodiment's units, for one control step, without rendering.

        Raises:
            UserError: If the action has another shape or is not finite.
        """

    @abstractmethod
    def observe(self) -> Observation:
        """Render every camera and read the robot's state, now."""

    def distances(self) -> dict[str, float]:
        """How far the episode has come, in metres by name, such as of the hand to the object; a task may tell none."""
        return {}

    def expert_action(self) -> np.ndarray:
        """What the scripted expert would do now, float32 `(C,)` in the embodiment's units; a task may have none."""
        raise UserError(f"task {self.name!r} has no scripted expert, which demonstrations and --baseline expert need")

    def close(self) -> None:  # noqa: B027
        """Free what the simulator and the renderer hold, by default nothing."""

    @property
    def done(self) -> bool:
        """Whether the episode is over: solved, or out of steps."""
        return self.success or self.steps >= self.max_steps

    def random_action(self, rng: np.random.Generator) -> np.ndarray:
        """An action drawn uniformly from all that the robot accepts, float32 `(C,)`."""
        return (rng.uniform(-1.0, 1.0, self.action_limits.shape) * self.action_limits).astype(np.float32)

    def reset(self, seed: int) -> Observation:
        """`start`, then `observe`."""
        self.start(seed)
        return self.observe()

    def step(self, action_si: np.ndarray) -> Observation:
        """`advance`, then `observe`."""
        self.advance(action_si)
        return self.observe()

    def __enter__(self) -> SimTask:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SimSettings(ABC):
    """How one suite of simulated tasks is run and seen, and how its tasks are made.

    A subclass is a frozen dataclass whose fields are JSON values: they are stored with data sets and results. Defining
    it registers it under `suite`. Worker processes make tasks by it, so it lives in a module that they can import.

    Attributes:
        suite: The name under which `find_suite` and `--suite` know it.
        tasks: Canonical names of all its tasks.
        title: The simulator's name in messages and reports; the suite's where it is empty.
        action_kind: Whether actions are "relative" changes, so that zero is no motion in channels with a unit, or
            "absolute" targets; what holding still means while a policy plans (`Embodiment.hold`).
        groups: Groups of tasks whose mean success rates are told, in order.
        packages: Distributions whose versions a report names.
        size: Height and width of every picture, in pixels.
    """

    suite: ClassVar[str]
    tasks: ClassVar[Sequence[str]]
    title: ClassVar[str] = ""
    action_kind: ClassVar[CommandKind] = "relative"
    groups: ClassVar[Mapping[str, Sequence[str]]] = {}
    packages: ClassVar[Sequence[str]] = ()
    size: tuple[int, int]

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if "suite" in vars(cls):
            _SUITES[cls.suite] = cls

    @property
    @abstractmethod
    def embodiment(self) -> Embodiment:
        """The robot of all tasks; its cameras are keys of LeRobot, `observation.images.<camera>`."""

    @abstractmethod
    def instruction(self, task: str, seed: int) -> str:
        """What a person would say in the episode of `seed`; `(task, seed)` alone decides it."""

    @abstractmethod
    def make_task(self, name: str, renderer: Any = None) -> SimTask:
        """A simulator of one task by its canonical name, with what `make_renderer` gave."""

    def hand_projection(self) -> Any:
        """Where the cameras see the hand, a `HandProjection` kept with collected data; None where a suite has none."""
        return None

    def make_renderer(self) -> Any:
        """What the tasks of one process share and `TaskPool` closes, such as a GL context; None where nothing is."""
        return None

    @classmethod
    def task_name(cls, task: str) -> str:
        """The canonical name of a task as a user gives it."""
        if task in cls.tasks:
            return task
        close = difflib.get_close_matches(task, cls.tasks, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"the tasks are {', '.join(cls.tasks)}"
        raise UserError(f"unknown {cls.title or cls.suite} task {task!r}; {hint}")

    @classmethod
    def task_names(cls, tasks: Sequence[str]) -> tuple[str, ...]:
        """Canonical names of the given tasks, each once."""
        names = tuple(cls.task_name(task) for task in tasks)
        if not names:
            raise UserError("expected at least one task, got none")
        if len(set(names)) != len(names):
            raise UserError(f"a task may be given once only, got {list(tasks)}")
        return names

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` inverts it."""
        return json.loads(json.dumps(asdict(self)))  # pyright: ignore[reportArgumentType]: subclasses are dataclasses

    @classmethod
    def from_dict(cls, values: Any, *, complete: bool = True) -> SimSettings:
        """Invert `to_dict`; a wrong, unknown or (if it must be `complete`) missing field is a UserError."""
        required = [field.name for field in fields(cls)] if complete else []  # pyright: ignore[reportArgumentType]
        return parse(values, cls, f"{cls.title or cls.suite} settings", required=required)


def find_suite(name: Any) -> type[SimSettings]:
    """The settings of a suite: of a class that has been defined, or that an installed package names as entry point."""
    if not isinstance(name, str):
        raise UserError(f"expected the name of a simulator suite, got {name!r}")
    if name in _SUITES:
        return _SUITES[name]
    points = {point.name: point for point in (*entry_points(group=ENTRY_POINTS), *BUILT_IN)}
    if name not in points:
        known = ", ".join(sorted({*points, *_SUITES}))
        raise UserError(f"unknown simulator suite {name!r}; there are {known}. Is its package installed?")
    try:
        found = points[name].load()
    except Exception as error:
        raise UserError(f"simulator suite {name!r} ({points[name].value}) does not load: {error!r}") from error
    if not (isinstance(found, type) and issubclass(found, SimSettings) and found.suite == name):
        raise UserError(f"{points[name].value} should be a SimSettings with suite = {name!r}, got {found!r}")
    return found


class TaskPool:
    """Simulators to borrow, with one renderer among them; all are closed together.

    Args:
        settings: Makes the tasks of the pool.
        keep: Idle simulators kept for the next `take`; the longest idle ones are closed first.
    """

    def __init__(self, settings: SimSettings, keep: int = 64) -> None:
        self._settings, self._keep = settings, keep
        self._renderer = settings.make_renderer()
        self._idle: list[SimTask] = []

    def take(self, name: str) -> SimTask:
        """A simulator of this task that nobody else has."""
        for task in reversed(self._idle):
            if task.name == name:
                self._idle.remove(task)
                return task
        return self._settings.make_task(name, self._renderer)

    def give_back(self, task: SimTask) -> None:
        """Return what `take` gave."""
        self._idle.append(task)
        while len(self._idle) > self._keep:
            self._idle.pop(0).close()

    def close(self) -> None:
        """Close the idle simulators and the renderer."""
        for task in self._idle:
            task.close()
        self._idle.clear()
        if self._renderer is not None:
            self._renderer.close()
