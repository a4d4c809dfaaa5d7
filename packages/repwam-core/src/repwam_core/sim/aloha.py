"""gym-aloha's two arms (MuJoCo, two ViperX 300s) behind the simulator interface, and a scripted expert of them.

The model, the layouts, the control and the success are gym-aloha's own; what is left out is that it draws three
pictures of 640 x 480 pixels in every step.

The expert says where each hand should go next, and which joint angles take it there. It remembers nothing: what it
wants follows from where the arms and the cube are now. So it recovers from disturbances, and a policy that sees the
present alone can learn it.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from repwam_core.interface import ActionChannel, Embodiment
from repwam_core.sim.base import HAND_TO_OBJECT, OBJECT_TO_GOAL
from repwam_core.sim.mujoco import CameraView, FrameRenderer, MujocoSettings, MujocoTask, import_mujoco, not_installed

__path__: list[str] = []  # until version 0.3: the modules it was made of are found by their names (runtime/moved.py)
JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
CHANNELS = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in JOINTS)
CAMERAS = {
    "top": CameraView("top", fovy_deg=78.0),
    "top_close": CameraView("top", fovy_deg=45.0),
    **{name: CameraView(name) for name in ("left_wrist", "right_wrist", "angle", "front_close")},
}
"""Camera names a user may give, all in gym-aloha's model. `top_close` is its `top` with a longer lens: the whole of the
work, and nearly twice the pixels for the cube."""
FULL_SPEED_RAD_S = 0.8
"""Of a joint that is pushed."""
SOLVED = 4
"""gym-aloha's reward for the cube that the left gripper touches while it does not lie on the table."""
SENTENCES = {
    "transfer-cube": (
        "hand the red cube from the right arm to the left arm",
        "pick up the cube with the right gripper and pass it to the left one",
        "take the red block and give it to the other hand",
        "lift the cube on the right and hand it over to the left gripper",
        "pass the cube over to the left arm",
        "grab the red cube with the right hand, then let the left hand take it",
    )
}


@dataclass(frozen=True)
class AlohaSettings(MujocoSettings):
    """How the two arms are driven and seen, see `MujocoSettings`; an `act_repeat` of 2 gives 25 Hz."""

    suite = "aloha"
    title = "gym-aloha"
    tasks = tuple(SENTENCES)
    action_kind = "absolute"
    packages = ("gym-aloha", "dm-control", "mujoco")
    views, environment_rate_hz, most_env_steps = CAMERAS, 50, 1_000

    cameras: tuple[str, ...] = ("top", "left_wrist", "right_wrist")
    max_env_steps: int = 400

    @property
    def embodiment(self) -> Embodiment:
        """The two arms as the model meets them."""
        channels = tuple(ActionChannel(name, "1" if name.endswith("gripper") else "rad") for name in CHANNELS)
        return Embodiment("aloha-two-viperx", channels, CHANNELS, self.camera_keys, self.rate_hz)

    def instruction(self, task: str, seed: int) -> str:
        rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
        return SENTENCES[task][int(rng.integers(len(SENTENCES[task])))]

    def make_task(self, name: str, renderer: FrameRenderer | None = None) -> AlohaTask:
        return AlohaTask(name, self, renderer)


class AlohaTask(MujocoTask):
    """One of gym-aloha's tasks.

    An action is where the joints should be at the end of the control step: six angles in radians and the opening of
    the gripper, 0 closed to 1 open, for the left and for the right arm. With `act_repeat` above 1 the targets move
    there in equal parts. The state is where the joints are, in the same 14 channels. Arguments as of `MujocoTask`.
    """

    def __init__(self, task: str, settings: AlohaSettings | None = None, renderer: FrameRenderer | None = None) -> None:
        super().__init__(task, settings or AlohaSettings(), renderer)
        self._env, self._sample_layout, self._layout = _make_environment(self.name)
        self._physics = self._env.physics
        model = self._physics.model.ptr
        self._arms = Arm(model, "left"), Arm(model, "right")
        angle = np.array(self.embodiment.action_units) == "rad"
        joints = [*range(6), 6, *range(8, 14), 14]  # of the actuators; each gripper's second finger mirrors the first
        low, high = model.actuator_ctrlrange[joints].T
        self._low, self._high = np.where(angle, low, 0.0), np.where(angle, high, 1.0)
        self.action_limits = np.maximum(np.abs(self._low), np.abs(self._high))
        self.step_limits = np.where(angle, FULL_SPEED_RAD_S, 0.0) / self.settings.rate_hz
        self._target = np.zeros(len(CHANNELS))

    def start(self, seed: int) -> None:
        self._layout[0] = self._sample_layout(seed)
        self._env.reset()
        self._target = self._state()
        self._started, self.success, self.steps = True, False, 0

    def advance(self, action_si: np.ndarray) -> None:
        before, self._target = self._target, np.clip(self._checked(action_si), self._low, self._high)
        for part in range(1, self.settings.act_repeat + 1):
            now = self._env.step(before + (self._target - before) * part / self.settings.act_repeat)
            self.success = self.success or now.reward == SOLVED
        self.steps += 1

    @property
    def state(self) -> np.ndarray:
        """Joint angles in radians and the openings of the grippers, float32 `(14,)`."""
        self._require_started()
        return self._state().astype(np.float32)

    def distances(self) -> dict[str, float]:
        """Between the right hand and the cube, and between the cube and the left hand, its goal."""
        left, right = self._hands()
        cube_m = self._cube_m()
        return {
            HAND_TO_OBJECT: float(np.linalg.norm(right.pos_m - cube_m)),
            OBJECT_TO_GOAL: float(np.linalg.norm(cube_m - left.pos_m)),
        }

    def expert_action(self) -> np.ndarray:
        hands = self._hands()
        goals = transfer_cube(*hands, self._cube_m())
        seconds = 1 / self.settings.rate_hz
        joints = [
            arm.joints(toward(hand, goal, seconds)) for arm, hand, goal in zip(self._arms, hands, goals, strict=True)
        ]
        return np.clip(np.concatenate(joints), self._low, self._high).astype(np.float32)

    def random_action(self, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(self._low, self._high).astype(np.float32)

    def close(self) -> None:
        self._env.close()
        super().close()

    def _drawn(self) -> tuple[str, Any, Any]:
        return self.name, self._physics.model.ptr, self._physics.data.ptr

    def _state(self) -> np.ndarray:
        return self._env.task.get_qpos(self._physics)

    def _hands(self) -> tuple[Hand, Hand]:
        self._require_started()
        state, (left, right) = self._state(), self._arms
        return left.hand(self._physics.data.ptr, state[6]), right.hand(self._physics.data.ptr, state[13])

    def _cube_m(self) -> np.ndarray:
        return self._env.task.get_env_state(self._physics)[:3]


def _make_environment(name: str) -> tuple[Any, Any, Any]:
    """gym-aloha's environment without its pictures; what draws a layout from a seed; and where it looks for that."""
    import_mujoco("aloha")
    try:
        from dm_control.rl.control import Environment
        from gym_aloha.constants import DT
        from gym_aloha.tasks.sim import BOX_POSE, TransferCubeTask
        from gym_aloha.utils import sample_box_pose
    except ModuleNotFoundError as error:
        raise not_installed("aloha") from error
    unseen = type("Unseen", (TransferCubeTask,), {"get_observation": lambda _self, _physics: OrderedDict()})
    physics = _compiled(name).copy(share_model=True)
    environment = Environment(physics, unseen(), float("inf"), control_timestep=DT, flat_observation=False)
    return environment, sample_box_pose, BOX_POSE


@lru_cache(maxsize=2)
def _compiled(name: str) -> Any:
    from dm_control.mujoco import Physics
    from gym_aloha.constants import ASSETS_DIR

    return Physics.from_xml_path(str(ASSETS_DIR / f"bimanual_viperx_{name.replace('-', '_')}.xml"))


# -- expert -----------------------------------------------------------------------------------------------------------

GRASP_M = 0.14
"""From the link of a gripper to the point between its fingertips where it holds things."""
SPEED_M_S, SPEED_RAD_S, LAG_S, GAIN = 0.25, 2.0, 0.04, 0.8
"""A hand is sent GAIN of its way, and never farther ahead of where it is than it should go in a control step and the
lag of the joints behind their targets."""
OPEN, SHUT = 1.0, 0.3
"""Gripper commands. Fingers on the cube stand at 0.6, so that shut ones press on it."""
HOLDING = 0.68
"""Fingers nearer to each other than this hold the cube, if it is between them."""
DOWN_RAD = 1.05
"""How far the right hand points down when it picks the cube up, and from then on."""
ABOVE_M, AWAY_M = np.array([0.0, 0.0, 0.08]), np.array([0.12, 0.0, 0.06])
"""From the cube to the place from which the hand comes down on it; from the meeting to where the hand draws back to."""
MEETING_M = np.array([0.0, 0.5, 0.25])
"""Where the hands meet, in the world: between the arms, above the table."""


@dataclass(frozen=True)
class Hand:
    """Where a hand is or should be.

    Attributes:
        pos_m: The point between its fingertips in the world, `(3,)` in metres.
        turn_rad: `(3,)`: yaw, 0 straight ahead of its arm; pitch, how far it points down; roll, 0 where the fingers
            close sideways.
        gripper: 0 closed to 1 open.
        pace: Share of full speed at which to go there.
    """

    pos_m: np.ndarray
    turn_rad: np.ndarray
    gripper: float
    pace: float = 1.0


class Arm:
    """One arm's geometry, read from the model. Lengths in metres, angles in radians.

    Args:
        model: `MjModel`.
        side: "left" or "right".
    """

    def __init__(self, model: Any, side: str) -> None:
        def offset(link: str) -> np.ndarray:
            return model.body(f"vx300s_{side}/{link}").pos

        self._link = model.body(f"vx300s_{side}/gripper_link").id
        w, _, _, z = model.body(f"vx300s_{side}").quat
        self._facing = _rotation("z", 2 * np.arctan2(z, w))
        self._shoulder = model.body(f"vx300s_{side}").pos + offset("shoulder_link") + offset("upper_arm_link")
        elbow = offset("upper_forearm_link")
        self._upper, self._upper_angle = np.hypot(elbow[0], elbow[2]), np.arctan2(elbow[2], elbow[0])
        self._forearm = offset("lower_forearm_link")[0] + offset("wrist_link")[0]
        self._hand = offset("gripper_link")[0] + GRASP_M

    def hand(self, data: Any, gripper: float) -> Hand:
        """Where the hand is in `data`, `MjData`."""
        world = data.xmat[self._link].reshape(3, 3)
        turned = self._facing.T @ world
        yaw = np.arctan2(turned[1, 0], turned[0, 0])
        pitch = np.arctan2(-turned[2, 0], np.hypot(turned[2, 1], turned[2, 2]))
        roll = np.arctan2(turned[2, 1], turned[2, 2])
        return Hand(data.xpos[self._link] + GRASP_M * world[:, 0], np.array([yaw, pitch, roll]), gripper)

    def joints(self, hand: Hand) -> np.ndarray:
        """The joint positions and the gripper, `(7,)`, that bring the hand there; the nearest where it is out of reach.

        Waist, shoulder and elbow put the wrist in its place, with the elbow up. There the axes of the last three joints
        meet, so that those turn the hand alone.
        """
        yaw, pitch, roll = hand.turn_rad
        turned = _rotation("z", yaw) @ _rotation("y", pitch) @ _rotation("x", roll)
        x, y, height = self._facing.T @ (hand.pos_m - self._shoulder) - self._hand * turned[:, 0]
        waist, reach = np.arctan2(y, x), np.hypot(x, y)
        # the triangle of upper arm, forearm and the line from shoulder to wrist
        far = np.clip(np.hypot(reach, height), 1e-6, self._upper + self._forearm)
        cosine = (self._upper**2 + far**2 - self._forearm**2) / (2 * self._upper * far)
        raised = np.arctan2(height, reach) + np.arccos(np.clip(cosine, -1, 1))
        shoulder = self._upper_angle - raised
        fallen = np.arctan2(self._upper * np.sin(raised) - height, reach - self._upper * np.cos(raised))
        # what is left for the hand: rotations about x, y and x again
        left = (_rotation("z", waist) @ _rotation("y", fallen)).T @ turned
        sign = 1.0 if left[2, 0] <= 0 else -1.0  # of the wrist's angle; so the forearm rolls by less than a right angle
        forearm_roll = np.arctan2(sign * left[1, 0], -sign * left[2, 0])
        wrist_angle = sign * np.arccos(np.clip(left[0, 0], -1, 1))
        wrist_roll = np.arctan2(sign * left[0, 1], sign * left[0, 2])
        return np.array([waist, shoulder, fallen - shoulder, forearm_roll, wrist_angle, wrist_roll, hand.gripper])


def transfer_cube(left: Hand, right: Hand, cube_m: np.ndarray) -> tuple[Hand, Hand]:
    """Where the hands should go now, for the right one to take the cube and pass it to the left one.

    Asked from the last stage to the first: is the cube passed over, is it in the right hand, is it between the fingers?
    """
    level, down = np.array([0.0, 0.0, np.pi / 2]), np.array([0.0, DOWN_RAD, 0.0])
    waiting = Hand(MEETING_M - [0.08, 0, 0], level, OPEN)
    meeting = Hand(MEETING_M, down, SHUT)
    to_left, to_right = (np.linalg.norm(cube_m - hand.pos_m) for hand in (left, right))
    lifted = cube_m[2] > 0.1
    if lifted and to_left < 0.025 and left.gripper < HOLDING:  # passed over: the right hand lets go, then draws back
        away = MEETING_M + AWAY_M if right.gripper > 0.75 else right.pos_m
        return Hand(MEETING_M, level, SHUT), Hand(away, down, OPEN)
    if to_right < 0.03 and right.gripper < HOLDING:  # picked up: to the meeting, where the left hand comes straight on
        if np.linalg.norm(right.pos_m - MEETING_M) > 0.015:
            return waiting, meeting
        beside_m = np.hypot(*(cube_m - left.pos_m)[1:])
        before = cube_m - [0.06 if beside_m > 0.008 and to_left > 0.03 else 0.0, 0, 0]
        return Hand(before, level, SHUT if to_left < 0.012 else OPEN, pace=0.5), meeting
    if to_right < 0.012:  # around it: close
        return waiting, Hand(cube_m, down, SHUT)
    aside_m = np.hypot(*(cube_m - right.pos_m)[:2])
    return waiting, Hand(cube_m + (ABOVE_M if aside_m > 0.012 else 0.0), down, OPEN)


def toward(hand: Hand, goal: Hand, seconds: float) -> Hand:
    """The next place on the way from `hand` to `goal`, for a control step of so many seconds."""
    leash_m = goal.pace * SPEED_M_S * (seconds + LAG_S)
    near = hand.pos_m + np.clip(GAIN * (goal.pos_m - hand.pos_m), -leash_m, leash_m)
    leash_rad = SPEED_RAD_S * (seconds + LAG_S)
    turn = np.clip(GAIN * (goal.turn_rad - hand.turn_rad), -leash_rad, leash_rad)
    return Hand(near, hand.turn_rad + turn, goal.gripper)


def _rotation(axis: str, angle: float) -> np.ndarray:
    """The matrix `(3, 3)` of a rotation about x, y or z."""
    cosine, sine = np.cos(angle), np.sin(angle)
    one, two = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[[one, two, one, two], [one, two, two, one]] = cosine, cosine, -sine, sine
    return matrix
