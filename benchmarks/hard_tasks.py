"""Why do drawer-open, door-lock and push fail more often? Where episodes end, by the simulator's own positions.

Three parts, each a table in Markdown:

- `stages`: how far trained policies get on unseen layouts, beside the scripted expert, and what a longer episode
  would bring: successes within 200, 400 and 500 environment steps are of the same episodes
- `handover`: the expert drives until the hand is down at the object, or until the object moves; then the policy does
- `tolerance`: the expert is told a wrong place of the object; how wrong may it be?

    uv run python benchmarks/hard_tasks.py --policy base=POLICY gripper=POLICY --episodes 10

POLICY is a policy folder, such as `train-*/policy` of `benchmarks/wam_learning.py --question tasks`. `--plan`
lets policies plan otherwise than trained (`--plan action_steps=10`); less than one latent frame of four actions
cannot be carried out. What the latents know of the objects' places: `benchmarks/hard_tasks_latents.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from repwam_core.interface import Observation, stack_observations
from repwam_core.policy import BatchedPolicy
from repwam_core.sim.base import evaluation_seeds
from repwam_core.sim.metaworld import MetaWorldSettings, MetaWorldTask, instruction
from repwam_core.sim.mujoco import FrameRenderer
from repwam_core.sim.results import wilson_interval

HARD_TASKS = ("drawer-open", "door-lock", "push")
LIMITS = (200, 400, 500)
"""Environment steps; the first is the repository's limit, the last Meta-World's."""
OFFSETS_M = (0.0, 0.01, 0.02, 0.03, 0.04, 0.06)
MOVED_M, DOWN_M = 0.01, 0.08
"""An object has moved, when it is this far from its start; a hand is down, when it is less than this above it, and was
higher before (it starts lower than the lock)."""


class MeasuredTask(MetaWorldTask):
    """Meta-World with what the simulator knows, in metres."""

    @property
    def hand_m(self) -> np.ndarray:
        return self._require_started()[:3].copy()

    @property
    def object_m(self) -> np.ndarray:
        return self._require_started()[4:7].copy()

    @property
    def left_m(self) -> float:
        """What is left to the goal, as the task itself measures it."""
        return float(self._env.evaluate_state(self._require_started(), np.zeros(4, np.float32))[1]["obj_to_target"])

    @property
    def grasped(self) -> bool:
        """Whether both fingers touch the object; only push has one to grasp."""
        return self.name == "push" and bool(self._env.touching_main_object)

    def mistaken_action(self, offset_m: np.ndarray) -> np.ndarray:
        """The expert's action if it saw the object `offset_m` (x, y) away from where it is."""
        true = self._require_started()
        self._obs = true.copy()
        self._obs[4:6] += offset_m
        try:
            return self.expert_action()
        finally:
            self._obs = true


@dataclass
class Trace:
    """One episode, a row per control step, the first before any action."""

    task: MeasuredTask
    seed: int
    hand_m: list[np.ndarray] = field(default_factory=list)
    object_m: list[np.ndarray] = field(default_factory=list)
    left_m: list[float] = field(default_factory=list)
    grasped: list[bool] = field(default_factory=list)
    gripper: list[float] = field(default_factory=list)
    solved_at: float = np.inf

    def note(self, action: np.ndarray | None = None) -> None:
        """Write down where everything is, and what was done to the gripper."""
        task = self.task
        self.hand_m.append(task.hand_m)
        self.object_m.append(task.object_m)
        self.left_m.append(task.left_m)
        self.grasped.append(task.grasped)
        self.gripper.append(0.0 if action is None else float(action[3]))
        if task.success:
            self.solved_at = min(self.solved_at, task.steps * task.settings.act_repeat)

    def step(self, action: np.ndarray) -> None:
        """Carry out an action."""
        self.task.advance(action)
        self.note(action)

    @property
    def down(self) -> bool:
        """Whether the hand has ever been down at the object."""
        return bool(self._down().any())

    @property
    def moving(self) -> bool:
        """Whether the object has ever moved."""
        return bool(self._moved().any())

    def _down(self) -> np.ndarray:
        low = np.stack(self.hand_m)[:, 2] - np.stack(self.object_m)[:, 2] < DOWN_M
        return low & np.logical_or.accumulate(~low)

    def _moved(self) -> np.ndarray:
        places = np.stack(self.object_m)
        return np.linalg.norm(places - places[0], axis=1) > MOVED_M

    def descent_m(self, limit: int) -> np.ndarray | None:
        """Where the object lay, and where the hand first came down, (2, 2) of x and y; None if it did not."""
        low = self._down()[: limit // self.task.settings.act_repeat + 1]
        return np.stack([self.object_m[0][:2], self.hand_m[low.argmax()][:2]]) if low.any() else None

    def measures(self, limit: int) -> dict[str, float]:
        """What the table shows of the first `limit` environment steps; distances in cm."""
        end = limit // self.task.settings.act_repeat + 1
        apart = (np.stack(self.hand_m) - np.stack(self.object_m))[:end]
        flat, moved, low = np.linalg.norm(apart[:, :2], axis=1), self._moved()[:end], self._down()[:end]
        before = slice(0, int(moved.argmax()) + 1 if moved.any() else None)
        closed = np.array(self.gripper[:end]) > 0.3
        return {
            "aim": 100 * flat[low.argmax()] if low.any() else np.nan,
            "flat": 100 * flat[before].min(),
            "near": 100 * np.linalg.norm(apart[before], axis=1).min(),
            "moved": float(moved.any()),
            "closed": float((closed & low).any()),
            "grasped": float(any(self.grasped[:end])),
            "left": self.left_m[:end][-1] / self.left_m[0],
            "steps": self.solved_at,
        }


Handover = Callable[[Trace], bool]
HANDOVERS: dict[str, Handover] = {
    "hand down at the object": lambda trace: trace.down,
    "object moving": lambda trace: trace.moving,
}


def drive(policy: BatchedPolicy, tasks: Sequence[str], episodes: int, limit: int, handover: Handover | None = None):
    """The policy in closed loop, from the start or from where the expert hands over; one trace per episode."""
    settings = settings_of(policy, limit)
    renderer = FrameRenderer(settings.size)
    traces = [
        Trace(MeasuredTask(name, settings, renderer), seed) for name in tasks for seed in evaluation_seeds(episodes)
    ]
    seen = [trace.task.reset(trace.seed) for trace in traces]
    for trace in traces:
        trace.note()
    told = [instruction(trace.task.name, trace.seed) for trace in traces]
    policy.reset(told, [trace.seed for trace in traces])
    driving = [handover is None] * len(traces)
    while not all(trace.task.done for trace in traces):
        rows = [chunk.actions.copy() for chunk in policy.act(seen)]
        for slot, trace in enumerate(traces):
            if trace.task.done:
                continue
            driving[slot] = driving[slot] or handover is None or handover(trace)
            seen[slot] = _carried_out(trace, rows[slot], driving[slot])
        policy.record(rows)
        seen = [_repeated(observation, len(rows[0])) for observation in seen]
    for trace in traces:
        trace.task.close()
    renderer.close()
    return traces


def _carried_out(trace: Trace, rows: np.ndarray, by_policy: bool) -> Observation:
    """Carry out a chunk, or the expert's actions, which are written over it; all frames since."""
    frames = []
    for row in rows:
        if not by_policy:
            row[:] = trace.task.expert_action()
        trace.step(row)
        frames.append(trace.task.observe())
        if trace.task.done:
            break
    return stack_observations(frames)


def _repeated(observation: Observation, count: int) -> Observation:
    """An observation of `count` frames: an episode that is over goes on showing its last one."""
    if observation.num_frames == count:
        return observation
    at = np.minimum(np.arange(count), observation.num_frames - 1)
    images = {camera: observation.frames(camera)[at] for camera in observation.cameras}
    states = observation.states()
    return Observation(images, None if states is None else states[at], None, observation.time_s)


def drive_expert(tasks: Sequence[str], episodes: int, limit: int, offset_m: float = 0.0) -> list[Trace]:
    """The scripted expert, told a place that is `offset_m` off in a direction drawn by the seed."""
    traces = []
    for name in tasks:
        with closing(MeasuredTask(name, MetaWorldSettings(max_env_steps=limit))) as task:
            for seed in evaluation_seeds(episodes):
                angle = np.random.default_rng(seed).uniform(0, 2 * np.pi)
                offset = offset_m * np.array([np.cos(angle), np.sin(angle)])
                task.start(seed)
                traces.append(Trace(task, seed))
                traces[-1].note()
                while not task.done:
                    traces[-1].step(task.mistaken_action(offset))
    return traces


def settings_of(policy: BatchedPolicy, limit: int) -> MetaWorldSettings:
    """The simulator as the policy has seen it."""
    cameras = tuple(key.removeprefix("observation.images.") for key in policy.embodiment.cameras)
    height, width = policy.parts.manifest.size
    return MetaWorldSettings(cameras=cameras, size=(height, width), max_env_steps=limit)


def stage_rows(name: str, traces: Iterable[Trace], limits: Sequence[int]) -> None:
    """Print a row per task."""
    by_task: dict[str, list[Trace]] = {}
    for trace in traces:
        by_task.setdefault(trace.task.name, []).append(trace)
    for task, group in by_task.items():
        found = [trace.measures(limits[0]) for trace in group]
        values = {key: np.array([each[key] for each in found], float) for key in found[0]}
        n = len(group)
        down = np.isfinite(values["aim"])
        cells = [name, task, f"{down.sum()}/{n}", f"{np.median(values['aim'][down]):.1f}" if down.any() else "-"]
        cells.append(_follows([at for trace in group if (at := trace.descent_m(limits[0])) is not None]))
        cells += [f"{np.median(values[key]):.1f}" for key in ("flat", "near")]
        cells += [f"{(values['flat'] < 100 * bound).sum()}" for bound in (0.05, 0.02)]
        cells += [f"{values[key].sum():.0f}" if task == "push" or key == "moved" else "-" for key in _COUNTED]
        cells += [f"{100 * np.median(values['left']):.0f} %", *_successes(values["steps"], limits)]
        print("| " + " | ".join(cells) + " |", flush=True)


def _follows(descents: Sequence[np.ndarray]) -> str:
    """By how much the hand comes down elsewhere, per distance that the object lies elsewhere: 1 is right, 0 blind."""
    if len(descents) < 3:
        return "-"
    objects, hands = np.stack(descents, axis=1)
    objects, hands = objects - objects.mean(0), hands - hands.mean(0)
    return f"{(objects * hands).sum() / (objects**2).sum():.2f}"


_COUNTED = ("moved", "closed", "grasped")


def _successes(steps: np.ndarray, limits: Sequence[int]) -> list[str]:
    solved = [int((steps <= limit).sum()) for limit in limits]
    low, high = (100 * bound for bound in wilson_interval(solved[0], len(steps)))
    took = f"{np.median(steps[np.isfinite(steps)]):.0f}" if solved[-1] else "-"
    return [f"{solved[0]}/{len(steps)} ({low:.0f} to {high:.0f} %)", *map(str, solved[1:]), took]


def print_stages(policies: dict[str, BatchedPolicy], options: argparse.Namespace) -> None:
    """How far episodes get within the first limit; medians over episodes, distances in cm.

    `aim` is the hand's horizontal distance from the object when it first comes down, `closest` is before the object
    moves, `< 5` and `< 2` count episodes by the horizontal one, `closed` those that then close the gripper,
    `left` is what is left of the way to the goal, `steps` the environment steps of the solved episodes.
    """
    columns = ["driver", "task", "down", "aim", "follows", "closest, flat", "closest", "< 5", "< 2", *_COUNTED, "left"]
    columns += [*(f"in {limit}" for limit in options.limits), "steps"]
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    stage_rows("expert", drive_expert(options.tasks, options.episodes, options.limits[-1]), options.limits)
    for name, policy in policies.items():
        stage_rows(name, drive(policy, options.tasks, options.episodes, options.limits[-1]), options.limits)


def print_handover(policies: dict[str, BatchedPolicy], options: argparse.Namespace) -> None:
    """Successes in 200 environment steps by when the policy takes over."""
    print("\n| policy | from | task | successes |\n|---|---|---|---|")
    for name, policy in policies.items():
        for moment, handover in HANDOVERS.items():
            traces = drive(policy, options.tasks, options.episodes, LIMITS[0], handover)
            for task in options.tasks:
                steps = np.array([trace.solved_at for trace in traces if trace.task.name == task])
                print(f"| {name} | {moment} | {task} | {_successes(steps, LIMITS[:1])[0]} |", flush=True)


def print_tolerance(_: dict[str, BatchedPolicy], options: argparse.Namespace) -> None:
    """Successes of the expert in 200 environment steps, by how wrong it sees the object."""
    print("\n| task | " + " | ".join(f"{100 * offset:.0f} cm" for offset in OFFSETS_M) + " |")
    print("|---" * (1 + len(OFFSETS_M)) + "|", flush=True)
    for task in (*options.tasks, *options.easy):
        counts = []
        for offset in OFFSETS_M:
            traces = drive_expert([task], options.episodes, LIMITS[0], offset)
            counts.append(f"{sum(trace.task.name == task and np.isfinite(trace.solved_at) for trace in traces)}")
        print(f"| {task}, of {options.episodes} | " + " | ".join(counts) + " |", flush=True)


PARTS = {"stages": print_stages, "handover": print_handover, "tolerance": print_tolerance}


def main() -> None:
    """Print the tables of the asked parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--plan", nargs="*", default=[], metavar="FIELD=INTEGER", help="plan otherwise than trained")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tasks", nargs="+", default=list(HARD_TASKS))
    parser.add_argument("--easy", nargs="*", default=[], help="more tasks for the part `tolerance`")
    parser.add_argument("--episodes", type=int, default=10, help="unseen layouts driven per task")
    parser.add_argument("--limits", nargs="+", type=int, default=list(LIMITS), help="environment steps, growing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan: dict[str, Any] = {key: int(value) for key, value in (entry.split("=") for entry in options.plan)}
    folders = dict(entry.split("=", 1) for entry in options.policy)
    policies = {name: BatchedPolicy.from_pretrained(folder, **plan) for name, folder in folders.items()}
    for part in options.parts:
        PARTS[part](policies, options)


if __name__ == "__main__":
    main()
