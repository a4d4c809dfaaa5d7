"""Meta-World's 50 tasks (MuJoCo, a Sawyer arm) behind the simulator interface: the one module that knows them.

Meta-World itself has no language; `metaworld.yaml` beside this file has our own sentences. The tasks come in the four
groups of difficulty in which success rates of MT50 are published.
"""

from __future__ import annotations

import copy
import warnings
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from repvitok.data.lerobot.metadata import HandProjection
from repvitok.runtime.documents import load_yaml, parse
from repvitok.runtime.errors import UserError

from repwam_core.interface import ActionChannel, Embodiment
from repwam_core.sim.base import HAND_TO_OBJECT, OBJECT_TO_GOAL
from repwam_core.sim.mujoco import (
    CameraView,
    FrameRenderer,
    MujocoSettings,
    MujocoTask,
    import_mujoco,
    not_installed,
    projection_matrix,
)

__path__: list[str] = []  # until version 0.3: the modules it was made of are found by their names (runtime/moved.py)
_FILE = Path(__file__).with_suffix(".yaml")
_SENTENCES = parse(load_yaml(_FILE), dict[str, tuple[str, ...]], str(_FILE))
TASKS: tuple[str, ...] = tuple(_SENTENCES)
"""The 50 tasks of Meta-World v3, in its order, without the version suffix."""
_HARDER = {
    "medium": (
        "basketball", "bin-picking", "box-close", "coffee-pull", "coffee-push", "hammer", "peg-insert-side",
        "push-wall", "soccer", "sweep", "sweep-into",
    ),
    "hard": ("assembly", "hand-insert", "pick-out-of-hole", "pick-place", "push", "push-back"),
    "very hard": ("disassemble", "pick-place-wall", "shelf-place", "stick-pull", "stick-push"),
}  # fmt: skip
_EASY = tuple(task for task in TASKS if not any(task in harder for harder in _HARDER.values()))
DIFFICULTIES: dict[str, tuple[str, ...]] = {"easy": _EASY, **_HARDER}
"""The groups of Seo et al., "Masked World Models for Visual Control" (2022), which LeRobot's evaluation uses too."""


def paraphrases(task: str) -> tuple[str, ...]:
    """Every sentence for `task` (a name of `TASKS`), at least four."""
    if task not in _SENTENCES:
        raise UserError(f"no instructions for task {task!r}; there are some for {', '.join(TASKS)}")
    return _SENTENCES[task]


def instruction(task: str, seed: int) -> str:
    """The sentence of one episode: a uniform draw that `(task, seed)` alone decides."""
    sentences = paraphrases(task)
    rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
    return sentences[int(rng.integers(len(sentences)))]


def difficulty(task: str) -> str:
    """The group of a task by its canonical name."""
    if task not in TASKS:
        raise UserError(f"expected one of Meta-World's {len(TASKS)} tasks by its canonical name, got {task!r}")
    return next(name for name, tasks in DIFFICULTIES.items() if task in tasks)


FINGER_SPAN_M = 0.1
"""Meta-World reports the distance between the fingers as a fraction of this."""
ACTION_CHANNELS = (
    ActionChannel("ee_delta_x", "m"),
    ActionChannel("ee_delta_y", "m"),
    ActionChannel("ee_delta_z", "m"),
    ActionChannel("gripper_effort", "1"),
)
STATE_CHANNELS = ("ee_x", "ee_y", "ee_z", "gripper_opening")
CAMERAS = {
    "corner": CameraView("corner", rolled=True),
    "corner2": CameraView("corner2", rolled=True, pos_m=(0.75, 0.075, 0.7), fovy_deg=50.0),
    "corner3": CameraView("corner3", rolled=True),
    "topview": CameraView("topview"),
    "gripper": CameraView("gripperPOV"),
    "behind_gripper": CameraView("behindGripper"),
}
"""Camera names a user may give. `corner2` stands closer than in the model, as in LeRobot's Meta-World data."""
SAME_SCENE_PAIR = ("faucet-close", "faucet-open")
"""Two tasks that one picture cannot tell apart when they share a layout; docs/decisions/005-same-scene-pair.md."""


@dataclass(frozen=True)
class MetaWorldSettings(MujocoSettings):
    """How Meta-World is run and seen, beside what `MujocoSettings` says; an `act_repeat` of 2 gives 40 Hz.

    Attributes:
        same_scene: Groups of tasks with one scene: every task of a group draws its layout from the first one's
            distribution and shows no goal markers, so that only the instruction tells them apart.
    """

    suite = "metaworld"
    title = "Meta-World"
    tasks = TASKS
    groups = DIFFICULTIES
    packages = ("metaworld", "mujoco")
    views, environment_rate_hz, most_env_steps = CAMERAS, 80, 500

    cameras: tuple[str, ...] = ("corner2",)
    act_repeat: int = 2
    same_scene: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        tasks = [self.task_name(task) for group in self.same_scene for task in group]
        if len(set(tasks)) != len(tasks):
            raise UserError(f"a task may stand in one group of same_scene only, got {self.same_scene}")

    @property
    def embodiment(self) -> Embodiment:
        """The Sawyer arm as the model meets it."""
        return Embodiment("metaworld-sawyer", ACTION_CHANNELS, STATE_CHANNELS, self.camera_keys, self.rate_hz)

    def scene_of(self, task: str) -> str | None:
        """The task whose layouts `task` shares, or None where it has its own."""
        name = self.task_name(task)
        for group in self.same_scene:
            members = [self.task_name(member) for member in group]
            if name in members:
                return members[0]
        return None

    def instruction(self, task: str, seed: int) -> str:
        return instruction(task, seed)

    def make_task(self, name: str, renderer: FrameRenderer | None = None) -> MetaWorldTask:
        return MetaWorldTask(name, self, renderer)

    def hand_projection(self) -> HandProjection:
        """By the model of the first task: its cameras stand alike in all of them."""
        env, _ = _make_environment(TASKS[0])
        for view in (views := [CAMERAS[camera] for camera in self.cameras]):
            view.place(env.model)
        found = {
            key: projection_matrix(env.model, view, self.size)
            for key, view in zip(self.camera_keys, views, strict=True)
        }
        env.close()
        return HandProjection(list(STATE_CHANNELS[:3]), {key: rows for key, rows in found.items() if rows is not None})

    @classmethod
    def task_name(cls, task: str) -> str:
        """`button-press-topdown` for that name with or without Meta-World's version suffix."""
        return super().task_name(task.removesuffix("-v3"))


class MetaWorldTask(MujocoTask):
    """One Meta-World task.

    Actions are what is commanded for one control step: the mocap target moves by `ee_delta_*` metres in
    `act_repeat` equal parts (at most 0.01 m per environment step and axis; more is cut), and the fingers are pressed
    together (1) or apart (-1) with `gripper_effort`. The state is the hand's position in metres and the distance
    between the fingers in metres. Arguments as of `MujocoTask`.
    """

    def __init__(
        self, task: str, settings: MetaWorldSettings | None = None, renderer: FrameRenderer | None = None
    ) -> None:
        settings = settings or MetaWorldSettings()
        super().__init__(task, settings, renderer)
        scene = settings.scene_of(self.name)
        self._markers = scene is None
        self._env, self._expert = _make_environment(self.name)
        reach_m = self._env.action_scale * settings.act_repeat
        self.action_limits = np.array([reach_m, reach_m, reach_m, 1.0])
        if scene is not None and scene != self.name:  # draw object positions from another task's distribution
            other, _ = _make_environment(scene)
            if other.model_name != self._env.model_name:
                raise UserError(f"tasks {scene!r} and {self.name!r} have different models; they share no scene")
            self._env._random_reset_space = other._random_reset_space
            other.close()
        for view in self._views.values():
            view.place(self._env.model)

    def start(self, seed: int) -> None:
        self._env.seed(seed)
        self._env.reset()
        import_mujoco().mj_forward(self._env.model, self._env.data)  # some tasks move the object after their last one
        self._obs = self._env._get_obs()
        self._started, self.success, self.steps = True, False, 0

    def advance(self, action_si: np.ndarray) -> None:
        command = np.clip(self._checked(action_si) / self.action_limits, -1.0, 1.0)
        for _ in range(self.settings.act_repeat):
            self._obs, _, _, _, info = self._env.step(command)
            self.success = self.success or bool(info["success"] > 0)
        self.steps += 1

    @property
    def state(self) -> np.ndarray:
        """Hand position and finger distance in metres, float32 `(4,)`."""
        self._require_started()
        obs = self._obs
        return np.array([*obs[:3], obs[3] * FINGER_SPAN_M], np.float32)

    def distances(self) -> dict[str, float]:
        """Between the hand, the task's first object and its goal; reaching has no object."""
        self._require_started()
        obs = self._obs
        hand, item, goal = obs[:3], obs[4:7], np.asarray(self._env._target_pos)
        pairs = {"hand to goal": (hand, goal)}
        if self.name not in ("reach", "reach-wall"):
            pairs |= {HAND_TO_OBJECT: (hand, item), OBJECT_TO_GOAL: (item, goal)}
        return {name: float(np.linalg.norm(here - there)) for name, (here, there) in pairs.items()}

    def expert_action(self) -> np.ndarray:
        self._require_started()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "constants may be too high": the command is cut to [-1, 1] here
            command = self._expert.get_action(self._obs)
        return (np.clip(command, -1.0, 1.0) * self.action_limits).astype(np.float32)

    def close(self) -> None:
        self._env.close()
        super().close()

    def _drawn(self) -> tuple[str, Any, Any]:
        return self._env.model_name, self._env.model, self._env.data


def _make_environment(name: str) -> tuple[Any, Any]:
    """Meta-World's environment, seedable and with the goal in its observation, and its scripted expert."""
    import_mujoco()
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
    except ModuleNotFoundError as error:
        raise not_installed("sim") from error
    environment = ALL_V3_ENVIRONMENTS[f"{name}-v3"]
    env: Any = type(environment.__name__, (environment,), {"_initialize_simulation": _copied_simulation})()
    env._partially_observable = False  # the expert needs the goal; the policy sees pictures only
    vars(env).pop("sawyer_observation_space", None)  # cached with the goal hidden
    env._set_task_called = True
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True  # object positions come from the generator that env.seed() sets
    return env, ENV_POLICY_MAP[f"{name}-v3"]()


def _copied_simulation(env: Any) -> tuple[Any, Any]:
    """In place of compiling the model's file for every environment: 0.05 instead of 0.45 s from the second one on."""
    model = copy.copy(_compiled(env.fullpath))
    return model, import_mujoco().MjData(model)


@lru_cache(maxsize=8)
def _compiled(path: str) -> Any:
    return import_mujoco().MjModel.from_xml_path(path)
