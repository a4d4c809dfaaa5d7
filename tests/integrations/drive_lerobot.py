"""Runs where LeRobot and the plug-in are installed: `python drive_lerobot.py FOLDER OUT`, FOLDER for --policy.path.

LeRobot's own programs drive the policy: `lerobot-eval` in an environment and `lerobot-rollout` on a robot, both made
here. What the policy was shown and what it answered is kept in OUT, as .npz.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.robots import Robot, RobotConfig
from lerobot.scripts import lerobot_eval, lerobot_rollout

CAMERAS = ("head_camera", "left_camera", "right_camera")
SIZE, CHANNELS, STEPS = (24, 40), 14, 13
TASKS = ("raise both arms", "lower both arms")


class StandInEnv(gym.Env):
    """Pictures of noise and a state that follows the actions; episodes of 13 steps, solved at the last."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}
    made: ClassVar[list] = []

    def __init__(self, render_mode=None):
        self.render_mode, self.task = render_mode, "stand-in"
        self.task_description = TASKS[len(self.made) % 2]
        picture = gym.spaces.Box(0, 255, (*SIZE, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Dict(dict.fromkeys(CAMERAS, picture)),
                "agent_pos": gym.spaces.Box(-100, 100, (CHANNELS,), np.float32),
            }
        )
        self.action_space = gym.spaces.Box(-100, 100, (CHANNELS,), np.float32)
        self.made.append(self)
        self.episodes = []

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.zeros(CHANNELS, np.float32)
        self.episodes.append({"seen": [], "actions": []})
        return self._seen(), {"is_success": False}

    def step(self, action):
        self.episodes[-1]["actions"].append(np.array(action))
        self.state = self.state + np.clip(action, -1, 1).astype(np.float32)
        done = len(self.episodes[-1]["actions"]) == STEPS
        return self._seen(), 0.0, done, False, {"is_success": done}

    def render(self):
        return np.zeros((*SIZE, 3), np.uint8)

    def _seen(self):
        pixels = {camera: self.np_random.integers(0, 256, (*SIZE, 3), np.uint8) for camera in CAMERAS}
        self.episodes[-1]["seen"].append((np.stack(list(pixels.values())), self.state))
        return {"pixels": pixels, "agent_pos": self.state}


@EnvConfig.register_subclass("stand_in")
@dataclass
class StandInEnvConfig(EnvConfig):
    task: str | None = "StandIn-v0"
    fps: int = 10
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (CHANNELS,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (CHANNELS,)),
            **{f"pixels/{camera}": PolicyFeature(FeatureType.VISUAL, (*SIZE, 3)) for camera in CAMERAS},
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action",
            "agent_pos": "observation.state",
            **{f"pixels/{camera}": f"observation.images.{camera}" for camera in CAMERAS},
        }
    )
    gym_kwargs: ClassVar = {}


@RobotConfig.register_subclass("stand_in")
@dataclass(kw_only=True)
class StandInRobotConfig(RobotConfig):
    pass


class StandInRobot(Robot):
    """Pictures of noise and joints that go where they are told."""

    config_class, name = StandInRobotConfig, "stand_in"
    made: ClassVar[list] = []

    def __init__(self, config):
        super().__init__(config)
        self.joints, self.rng, self.connected = np.zeros(CHANNELS, np.float32), np.random.default_rng(5), False
        self.seen, self.actions = [], []
        self.made.append(self)

    action_features = property(lambda self: {f"joint_{n}.pos": float for n in range(CHANNELS)})
    observation_features = property(lambda self: {**self.action_features, **dict.fromkeys(CAMERAS, (*SIZE, 3))})
    is_connected = property(lambda self: self.connected)
    is_calibrated = property(lambda self: True)

    def connect(self, calibrate=True):
        self.connected = True

    def calibrate(self):
        pass

    def configure(self):
        pass

    def get_observation(self):
        pixels = {camera: self.rng.integers(0, 256, (*SIZE, 3), np.uint8) for camera in CAMERAS}
        self.seen.append((np.stack(list(pixels.values())), self.joints))
        return {**{f"joint_{n}.pos": float(value) for n, value in enumerate(self.joints)}, **pixels}

    def send_action(self, action):
        self.joints = np.array([action[f"joint_{n}.pos"] for n in range(CHANNELS)], np.float32)
        self.actions.append(self.joints)
        return action

    def disconnect(self):
        self.connected = False


def keep(path, seen, actions):
    """The frames that were answered, (steps, cameras, H, W, 3), their states, and the answers."""
    count = len(actions)
    np.savez(
        path,
        pictures=np.stack([pictures for pictures, _ in seen[:count]]),
        states=np.stack([state for _, state in seen[:count]]),
        actions=np.stack(actions),
    )


def main(folder: str, out: Path) -> None:
    shared = [f"--policy.path={folder}", "--policy.device=cpu", "--policy.seed=7"]
    gym.register("gym_stand_in/StandIn-v0", StandInEnv, max_episode_steps=STEPS)
    sys.argv = ["lerobot-eval", *shared, "--env.type=stand_in", "--eval.n_episodes=4", "--eval.batch_size=2"]
    sys.argv += ["--eval.use_async_envs=false", f"--output_dir={out / 'eval'}"]
    lerobot_eval.main()
    for number, env in enumerate(StandInEnv.made):
        played = [episode for episode in env.episodes if episode["actions"]]
        for episode, kept in enumerate(played):
            keep(out / f"env-{episode}-{number}.npz", kept["seen"], kept["actions"])

    sys.argv = ["lerobot-rollout", *shared, "--robot.type=stand_in", f"--task={TASKS[1]}", "--duration=6", "--fps=10"]
    sys.argv += ["--device=cpu", "--play_sounds=false", "--return_to_initial_position=false"]
    lerobot_rollout.main()
    (robot,) = StandInRobot.made
    keep(out / "robot.npz", robot.seen[1:], robot.actions)  # the first observation is not the policy's


if __name__ == "__main__":
    sys.modules["drive_lerobot"] = sys.modules["__main__"]
    main(sys.argv[1], Path(sys.argv[2]))
