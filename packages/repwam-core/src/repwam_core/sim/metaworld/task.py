"""Meta-World's 50 tasks (MuJoCo, a Sawyer arm) behind the simulator interface: SI units, seeds, fast cameras."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from repvitok.data.lerobot.metadata import HandProjection
from repvitok.runtime.errors import UserError

from repwam_core.interface import ActionChannel, Embodiment, Observation
from repwam_core.sim.base import HAND_TO_OBJECT, OBJECT_TO_GOAL, SimSettings, SimTask
from repwam_core.sim.metaworld.instructions import DIFFICULTIES, TASKS, instruction
from repwam_core.sim.rendering import (
    CameraView,
    FrameRenderer,
    camera_key,
    check_views,
    import_mujoco,
    not_installed,
    projection_matrix,
)

ENVIRONMENT_RATE_HZ = 80
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
class MetaWorldSettings(SimSettings):
    """How Meta-World is run and seen. The same settings must serve collection and evaluation.

    Attributes:
        cameras: Names from `CAMERAS`.
        size: Height and width of every picture, in pixels, multiples of 16 (the tokenizer's patch).
        act_repeat: Environment steps (80 Hz) that one action lasts; 2 gives 40 Hz.
        max_env_steps: Environment steps after which an episode has failed, at most Meta-World's own 500.
        same_scene: Groups of tasks with one scene: every task of a group draws its layout from the first one's
            distribution and shows no goal markers, so that only the instruction tells them apart.
    """

    suite = "metaworld"
    title = "Meta-World"
    tasks = TASKS
    groups = DIFFICULTIES
    packages = ("metaworld", "mujoco")

    cameras: tuple[str, ...] = ("corner2",)
    size: tuple[int, int] = (64, 64)
    act_repeat: int = 2
    max_env_steps: int = 200
    same_scene: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        check_views(self.cameras, CAMERAS, self.size, self.act_repeat, self.max_env_steps, 500)
        tasks = [self.task_name(task) for group in self.same_scene for task in group]
        if len(set(tasks)) != len(tasks):
            raise UserError(f"a task may stand in one group of same_scene only, got {self.same_scene}")

    @property
    def rate_hz(self) -> float:
        """Recorded frames and actions per second."""
        return ENVIRONMENT_RATE_HZ / self.act_repeat

    @property
    def camera_keys(self) -> tuple[str, ...]:
        """The cameras' keys in observations and data sets."""
        return tuple(camera_key(camera) for camera in self.cameras)

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

    def make_renderer(self) -> FrameRenderer:
        return FrameRenderer(self.size)

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


class MetaWorldTask(SimTask):
    """One Meta-World task.

    Actions are what is commanded for one control step: the mocap target moves by `ee_delta_*` metres in
    `act_repeat` equal parts (at most 0.01 m per environment step and axis; more is cut), and the fingers are pressed
    together (1) or apart (-1) with `gripper_effort`. The state is the hand's position in metres and the distance
    between the fingers in metres.

    Args:
        task: One of the 50 names.
        settings: Cameras, size, rate and length.
        renderer: Shared by all tasks of a process; None makes one of its own on the first `observe`.
    """

    def __init__(
        self, task: str, settings: MetaWorldSettings | None = None, renderer: FrameRenderer | None = None
    ) -> None:
        self.settings = settings or MetaWorldSettings()
        self.name = self.settings.task_name(task)
        self.embodiment = self.settings.embodiment
        self.max_steps = self.settings.max_env_steps // self.settings.act_repeat
        if renderer is not None and renderer.size != self.settings.size:
            raise UserError(f"the renderer draws {renderer.size}, the settings ask for {self.settings.size}")
        self._renderer, self._owns_renderer = renderer, renderer is None
        self._mujoco = import_mujoco()
        self._views = [CAMERAS[camera] for camera in self.settings.cameras]
        scene = self.settings.scene_of(self.name)
        self._markers = scene is None
        self._env, self._expert = _make_environment(self.name)
        reach_m = self._env.action_scale * self.settings.act_repeat
        self.action_limits = np.array([reach_m, reach_m, reach_m, 1.0])
        if scene is not None and scene != self.name:
            self._share_layout(scene)
        for view in self._views:
            view.place(self._env.model)
        self._obs: np.ndarray | None = None
        self._success = False
        self._steps = 0

    def start(self, seed: int) -> None:
        self._env.seed(seed)
        self._env.reset()
        self._mujoco.mj_forward(self._env.model, self._env.data)  # some tasks move the object after their last one
        self._obs = self._env._get_obs()
        self._success, self._steps = False, 0

    def advance(self, action_si: np.ndarray) -> None:
        self._require_started()
        action = np.asarray(action_si, np.float64)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise UserError(f"expected 4 finite numbers {self.embodiment.action_names}, got {action_si!r}")
        command = np.clip(action / self.action_limits, -1.0, 1.0)
        for _ in range(self.settings.act_repeat):
            self._obs, _, _, _, info = self._env.step(command)
            self._success = self._success or info["success"] > 0
        self._steps += 1

    def observe(self) -> Observation:
        self._require_started()
        if self._renderer is None:
            self._renderer = FrameRenderer(self.settings.size)
        env, renderer = self._env, self._renderer
        images = {
            camera_key(camera): renderer.render(env.model_name, env.model, env.data, view, self._markers)
            for camera, view in zip(self.settings.cameras, self._views, strict=True)
        }
        return Observation(images, self.state, None, self._steps / self.settings.rate_hz)

    @property
    def state(self) -> np.ndarray:
        """Hand position and finger distance in metres, float32 `(4,)`."""
        obs = self._require_started()
        return np.array([*obs[:3], obs[3] * FINGER_SPAN_M], np.float32)

    def distances(self) -> dict[str, float]:
        """Between the hand, the task's first object and its goal; reaching has no object."""
        obs = self._require_started()
        hand, item, goal = obs[:3], obs[4:7], np.asarray(self._env._target_pos)
        pairs = {"hand to goal": (hand, goal)}
        if self.name not in ("reach", "reach-wall"):
            pairs |= {HAND_TO_OBJECT: (hand, item), OBJECT_TO_GOAL: (item, goal)}
        return {name: float(np.linalg.norm(here - there)) for name, (here, there) in pairs.items()}

    def expert_action(self) -> np.ndarray:
        obs = self._require_started()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "constants may be too high": the command is cut to [-1, 1] here
            command = self._expert.get_action(obs)
        return (np.clip(command, -1.0, 1.0) * self.action_limits).astype(np.float32)

    @property
    def success(self) -> bool:
        return self._success

    @property
    def steps(self) -> int:
        return self._steps

    def close(self) -> None:
        self._env.close()
        if self._owns_renderer and self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _require_started(self) -> np.ndarray:
        if self._obs is None:
            raise RuntimeError(f"start the episode of task {self.name!r} with start(seed) or reset(seed) first")
        return self._obs

    def _share_layout(self, scene: str) -> None:
        """Draw object positions from another task's distribution; both must use one model file."""
        other, _ = _make_environment(scene)
        if other.model_name != self._env.model_name:
            raise UserError(f"tasks {scene!r} and {self.name!r} are built from different models; they share no scene")
        self._env._random_reset_space = other._random_reset_space
        other.close()


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
