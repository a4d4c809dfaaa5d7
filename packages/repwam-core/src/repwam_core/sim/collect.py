"""Demonstrations of experts, disturbed if asked for, as a LeRobot data set: parallel, resumable, fixed by the seed."""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from repvitok.data import LeRobotReader, LeRobotWriter
from repvitok.data.lerobot.metadata import HAND_FILE
from repvitok.runtime.documents import Count, From0, Share, check_fields, load_json, parse, require_format
from repvitok.runtime.errors import UserError, require_disk_space
from repvitok.runtime.files import refuse_foreign, sole_writer, write_json_atomic
from repvitok.runtime.progress import progress

from repwam_core.interface import Observation
from repwam_core.sim.base import (
    DEFAULT_SUITE,
    MAX_ATTEMPTS,
    MAX_EPISODES_PER_TASK,
    SimSettings,
    SimTask,
    TaskPool,
    collection_seed,
    find_suite,
)
from repwam_core.sim.workers import default_workers, map_jobs

PLAN_FILE = "collection.json"
BYTES_PER_PIXEL = 0.8
"""Of a frame on disk, generously: H.264 at crf 10 needs about 0.4 at 64 px."""
TYPICAL_FRAMES = 60


@dataclass(frozen=True)
class Perturbation:
    """How the expert is disturbed, so that the data also shows how to recover.

    The recorded action is always what the expert wanted at that moment, never the disturbed one that was carried out.

    Attributes:
        pushes: Number of short pushes in random directions at full speed: in place of the expert's action where actions
            are changes, and away from it where they are targets.
        push_steps: Control steps each push lasts.
        push_within_steps: Control steps from the start in which all pushes happen, each in its own share of them.
        action_std: Standard deviation of Gaussian noise on every motion channel, as a share of full speed: of the
            largest action, or of the task's `step_limits`.
        share: Share of the episodes that are disturbed, drawn by the episode's seed.
    """

    pushes: Count = 0
    push_steps: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 4
    push_within_steps: Count = 24
    action_std: From0 = 0.0
    share: Share = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.pushes and self.push_within_steps // self.pushes < self.push_steps:
            raise UserError(
                f"{self.pushes} pushes of {self.push_steps} steps do not fit into {self.push_within_steps} steps"
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` inverts it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Perturbation:
        """Invert `to_dict`; a wrong, missing or unknown field is a UserError."""
        return parse(values, cls, "noise", required=[field.name for field in fields(cls)])


NOISE_MODES = {
    "none": Perturbation(),
    "pushes": Perturbation(pushes=2),
    "gaussian": Perturbation(action_std=0.3),
    "pushes+gaussian": Perturbation(pushes=2, action_std=0.3),
}
"""Perturbation by name, as `repwam collect --noise` takes it. A push of 4 control steps lasts 8 environment steps."""


@dataclass(frozen=True, eq=False)
class Demonstration:
    """What one successful episode showed.

    Attributes:
        frames: Camera key -> uint8 `(T, H, W, 3)`.
        state: float32 `(T, S)`; None where the robot tells none.
        action: float32 `(T, C)`: what the expert wanted to do after frame i.
    """

    frames: dict[str, np.ndarray]
    state: np.ndarray | None
    action: np.ndarray

    def __len__(self) -> int:
        return len(self.action)


def record_demonstration(
    task: SimTask, seed: int, noise: Perturbation | None = None, extra_steps: int = 4
) -> Demonstration | None:
    """Let the expert solve the episode of `seed`; None if it does not.

    The episode is simulated twice: drawing costs far more, and is spared where the expert fails.

    Args:
        task: The simulated task.
        seed: Fixes the layout and every disturbance.
        noise: None leaves the expert alone.
        extra_steps: Control steps recorded after the first success.
    """
    noise = noise or Perturbation()
    if attempt(task, seed, noise, extra_steps, lambda: None) is None:
        return None
    observations: list[Observation] = []
    actions = attempt(task, seed, noise, extra_steps, lambda: observations.append(task.observe()))
    if actions is None:
        raise UserError(f"task {task.name!r} went another way the second time: the seed does not fix its episodes")
    cameras = observations[0].cameras
    frames = {camera: np.concatenate([seen.frames(camera) for seen in observations]) for camera in cameras}
    states = [states for seen in observations if (states := seen.states()) is not None]
    return Demonstration(frames, np.concatenate(states) if states else None, np.stack(actions))


def attempt(
    task: SimTask, seed: int, noise: Perturbation, extra_steps: int, look: Callable[[], None]
) -> list[np.ndarray] | None:
    """The expert's actions until `extra_steps` after its success, with a `look` before each; None if it fails."""
    disturbance = Perturber(task, noise, seed)
    actions: list[np.ndarray] = []
    task.start(seed)
    left = extra_steps
    while True:
        look()
        wanted = task.expert_action()
        actions.append(wanted)
        task.advance(disturbance.applied_to(wanted, task.steps))
        if task.success:
            if left == 0 or task.steps >= task.max_steps:
                return actions
            left -= 1
        elif task.done:
            return None


class Perturber:
    """The pushes and the noise of one episode, all drawn from its seed."""

    def __init__(self, task: SimTask, noise: Perturbation, seed: int) -> None:
        self._rng = np.random.default_rng([seed, zlib.crc32(task.name.encode()), 1])
        self._limits, self._absolute = task.action_limits, task.step_limits is not None
        self._speed = task.action_limits if task.step_limits is None else task.step_limits
        self._moves = np.array([unit != "1" for unit in task.embodiment.action_units])
        active = self._rng.random() < noise.share
        self._std = noise.action_std if active else 0.0
        self.pushes: dict[int, np.ndarray] = {}
        share = noise.push_within_steps // max(1, noise.pushes)
        for push in range(noise.pushes if active else 0):
            first = push * share + int(self._rng.integers(share - noise.push_steps + 1))
            direction = self._rng.standard_normal(self._limits.shape)
            velocity = direction / np.abs(direction[self._moves]).max() * self._speed * self._moves
            for step in range(noise.push_steps):
                # a target is pushed farther with every step, a change is the same in all of them
                self.pushes[first + step] = velocity * (step + 1 if self._absolute else 1)

    def applied_to(self, wanted: np.ndarray, step: int) -> np.ndarray:
        """The action to carry out at control step `step` in place of `wanted`, float32 `(C,)`."""
        action = wanted
        if step in self.pushes:
            push = self.pushes[step]
            action = wanted + push if self._absolute else np.where(self._moves, push, wanted)
        if self._std:
            action = action + self._std * self._rng.standard_normal(wanted.shape) * self._speed * self._moves
        return np.clip(action, -self._limits, self._limits).astype(np.float32)


FORMAT, FORMAT_VERSION = "repwam-collection", 1


@dataclass(frozen=True)
class CollectionConfig:
    """Everything that decides what a collection holds, see `collect`; kept beside the data as `collection.json`.

    Episode i of the data set shows task `i % len(tasks)`.
    """

    tasks: tuple[str, ...]
    episodes_per_task: int
    seed: int
    settings: SimSettings
    noise: Perturbation
    extra_steps: int
    version: str
    pix_fmt: str
    crf: int

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError("expected at least one task, got none")
        if not 1 <= self.episodes_per_task <= MAX_EPISODES_PER_TASK:
            raise UserError(f"episodes per task must lie in 1 .. {MAX_EPISODES_PER_TASK}, got {self.episodes_per_task}")
        if not 0 <= self.extra_steps <= 500:
            raise UserError(f"extra_steps must lie in 0 .. 500, got {self.extra_steps}")
        if not 0 <= self.crf <= 51:
            raise UserError(f"crf must lie in 0 (best) .. 51, got {self.crf}")
        collection_seed(self.seed, 0)

    @property
    def num_episodes(self) -> int:
        """Episodes of all tasks together."""
        return len(self.tasks) * self.episodes_per_task

    def task_of(self, index: int) -> tuple[str, int]:
        """Task and number among its task's demonstrations of episode `index`."""
        return self.tasks[index % len(self.tasks)], index // len(self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` inverts it."""
        values = {**asdict(self), "tasks": list(self.tasks)}
        values |= {"settings": self.settings.to_dict(), "noise": self.noise.to_dict()}
        return {"format": FORMAT, "format_version": FORMAT_VERSION, "suite": self.settings.suite, **values}

    @classmethod
    def from_dict(cls, values: Any, source: str = "the collection's plan") -> CollectionConfig:
        """Invert `to_dict`; another format, a wrong, missing or unknown field is a UserError."""
        values = require_format(values, FORMAT, FORMAT_VERSION, source)
        suite = find_suite(values.pop("suite", DEFAULT_SUITE))
        if "settings" in values:
            values["settings"] = suite.from_dict(values["settings"])
        return replace(
            parse(values, cls, source), noise=Perturbation.from_dict(values.get("noise"))
        )  # it must be complete


@dataclass(frozen=True)
class CollectionSummary:
    """What a run of `collect` did.

    Attributes:
        root: The data set's folder.
        episodes: Episodes it holds now.
        frames: Frames it holds now.
        recorded: Episodes this run added; the others were there.
        failed_attempts: Task -> attempts at which the expert failed, over all episodes.
        seconds: Wall time of this run.
    """

    root: Path
    episodes: int
    frames: int
    recorded: int
    failed_attempts: dict[str, int]
    seconds: float


def collect(
    out: str | Path,
    tasks: Sequence[str],
    *,
    episodes_per_task: int,
    seed: int = 0,
    settings: SimSettings | None = None,
    noise: Perturbation | None = None,
    extra_steps: int = 4,
    version: str = "v2.1",
    pix_fmt: str = "yuv444p",
    crf: int = 10,
    workers: int | None = None,
) -> CollectionSummary:
    """Record demonstrations of the scripted experts into `out`, a LeRobot data set with an instruction per episode.

    What comes out depends on the arguments alone, never on `workers` or on interruptions. Episodes that are already
    there are kept, so a killed run is continued by running it again, and a v2.1 data set is made longer by asking for
    more episodes per task. Where the expert fails, the episode is tried again with its next seed; the row of each
    episode in LeRobot's episodes table holds `task_name`, `environment_seed` and `failed_attempts`.

    Args:
        out: Folder; new, empty, or one with the same config.
        tasks: Names of the suite's tasks.
        episodes_per_task: Demonstrations of each.
        seed: The data set's seed, 0 to 99; other seeds give other layouts, see `collection_seed`.
        settings: The suite, its cameras, size, rate and length; None is Meta-World.
        noise: How the expert is disturbed; None not at all.
        extra_steps: Control steps recorded after success.
        version: "v2.1" or "v3.0".
        pix_fmt, crf: Colour and quality of the videos. The defaults keep small frames close to what a policy sees
            in closed loop (39 dB at 64 pixels; 30 dB with yuv420p and 18); `pix_fmt="yuv420p"` plays everywhere.
        workers: Processes; None as many as there are cores, 1 this one.
    """
    started_s = time.monotonic()
    root = Path(out)
    settings = settings or find_suite(DEFAULT_SUITE)()
    config = CollectionConfig(
        settings.task_names(tasks),
        episodes_per_task,
        seed,
        settings,
        noise or Perturbation(),
        extra_steps,
        version,
        pix_fmt,
        crf,
    )
    height, width = settings.size
    pixels = config.num_episodes * TYPICAL_FRAMES * len(settings.embodiment.cameras) * height * width
    require_disk_space(root, int(pixels * BYTES_PER_PIXEL), "collecting demonstrations")
    writer = _writer(root, config)  # refuses an unknown version before anything is written
    with sole_writer(root):
        _keep_plan(root, config)
        missing = [index for index in range(config.num_episodes) if not writer.episode_exists(index)]
        missing.sort(key=lambda index: (index % len(config.tasks), index))  # a worker stays with a task while it can
        _record_all(root, config, missing, workers or default_workers())
        writer.finalize()
        if (hand := settings.hand_projection()) is not None:
            write_json_atomic(root / HAND_FILE, hand.to_dict())
    reader = LeRobotReader(root)
    failed: Counter[str] = Counter()
    for episode in reader.episodes:
        failed[episode.metadata["task_name"]] += episode.metadata["failed_attempts"]
    seconds = time.monotonic() - started_s
    return CollectionSummary(root, reader.num_episodes, len(reader), len(missing), dict(failed), seconds)


def read_plan(root: str | Path) -> CollectionConfig:
    """The config of a collected data set."""
    path = Path(root) / PLAN_FILE
    if not path.is_file():
        raise UserError(f"{root} holds no {PLAN_FILE}: it was not made by `repwam collect`")
    return CollectionConfig.from_dict(load_json(path), str(path))


class DemonstrationRecorder:
    """Records single episodes of a config into its data set; lives in a worker process."""

    def __init__(self, root: Path, config: CollectionConfig) -> None:
        self._plan = config
        self._writer = _writer(root, config)
        self._tasks = TaskPool(config.settings, keep=4)

    def record(self, index: int) -> int:
        """Record episode `index` with the first of its seeds at which the expert succeeds; failed attempts."""
        name, episode = self._plan.task_of(index)
        task = self._tasks.take(name)
        for attempt in range(MAX_ATTEMPTS):
            seed = collection_seed(self._plan.seed, episode, attempt)
            demonstration = record_demonstration(task, seed, self._plan.noise, self._plan.extra_steps)
            if demonstration is not None:
                break
        else:
            raise UserError(
                f"the expert of {name!r} failed {MAX_ATTEMPTS} times at episode {episode} (last seed {seed}); "
                "use less noise or more environment steps"
            )
        self._tasks.give_back(task)
        self._writer.add_episode(
            index,
            frames=demonstration.frames,
            state=demonstration.state,
            action=demonstration.action,
            task=self._plan.settings.instruction(name, seed),
            metadata={"task_name": name, "environment_seed": seed, "failed_attempts": attempt},
        )
        return attempt

    def close(self) -> None:
        """Free simulators and renderer."""
        self._tasks.close()


def _record_all(root: Path, config: CollectionConfig, missing: Sequence[int], workers: int) -> None:
    make: Callable[[], DemonstrationRecorder] = partial(DemonstrationRecorder, root, config)
    jobs = [(index,) for index in sorted(missing, key=lambda index: config.task_of(index)[0])]  # a task's at a time
    failed = 0
    with progress(range(config.num_episodes), "collect", unit="episode") as bar:
        bar.update(config.num_episodes - len(missing))
        for _, attempts in map_jobs(make, "record", jobs, workers):
            failed += attempts
            bar.set_postfix(expert_failures=failed)
            bar.update(1)


def _writer(root: Path, config: CollectionConfig) -> LeRobotWriter:
    robot = config.settings.embodiment
    return LeRobotWriter(
        root,
        version=config.version,
        fps=robot.rate_hz,
        cameras=dict.fromkeys(robot.cameras, config.settings.size),
        state_names=robot.state_channels,
        action_names=robot.action_names,
        robot_type=robot.name,
        pix_fmt=config.pix_fmt,
        crf=config.crf,
    )


def _keep_plan(root: Path, config: CollectionConfig) -> None:
    """Write the config, or check that it continues the one that is there."""
    path = root / PLAN_FILE
    if not path.exists():
        refuse_foreign(root, (), "data set made by `repwam collect`")
        write_json_atomic(path, config.to_dict())
        return
    before, now = read_plan(root).to_dict(), config.to_dict()
    changed = [key for key in now if before[key] != now[key] and key != "episodes_per_task"]
    if changed or now["episodes_per_task"] < before["episodes_per_task"]:
        key = changed[0] if changed else "episodes_per_task"
        raise UserError(
            f"{root} holds a collection with {key} {before[key]!r}, not {now[key]!r}; choose another folder, or the "
            "same settings to continue it"
        )
    if now != before:
        write_json_atomic(path, now)
