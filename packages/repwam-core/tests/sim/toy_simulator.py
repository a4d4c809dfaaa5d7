"""A whole simulator: a bright point on a dark line, to be moved to the end that the instruction names."""

from dataclasses import dataclass

import numpy as np
from repwam_core.interface import ActionChannel, Embodiment, Observation
from repwam_core.sim.base import SimSettings, SimTask


@dataclass(frozen=True)
class ToySettings(SimSettings):
    """What can be chosen about the toy, and its two tasks."""

    suite = "toy"
    tasks = ("go-left", "go-right")

    size: tuple[int, int] = (32, 32)
    max_steps: int = 30

    @property
    def embodiment(self) -> Embodiment:
        return Embodiment("toy", (ActionChannel("move", "m"),), ("x",), ("observation.images.top",), rate_hz=10.0)

    def instruction(self, task: str, seed: int) -> str:
        return f"{('go', 'move')[seed % 2]} {task.removeprefix('go-')}"

    def make_task(self, name: str, renderer: None = None) -> SimTask:
        return ToyTask(name, self)


class ToyTask(SimTask):
    """One metre to go, by at most 0.1 m a step."""

    def __init__(self, name: str, settings: ToySettings) -> None:
        self.name, self.size = name, settings.size
        self.embodiment, self.max_steps = settings.embodiment, settings.max_steps
        self.action_limits = np.array([0.1])
        self.goal_m = -1.0 if name == "go-left" else 1.0

    def start(self, seed: int) -> None:
        self.x_m = np.random.default_rng(seed).uniform(-0.2, 0.2)
        self.steps, self.success = 0, False

    def advance(self, action_si: np.ndarray) -> None:
        self.x_m = float(np.clip(self.x_m + np.clip(action_si[0], -0.1, 0.1), -1.0, 1.0))
        self.steps, self.success = self.steps + 1, self.success or abs(self.x_m - self.goal_m) < 0.01

    def observe(self) -> Observation:
        image = np.zeros((*self.size, 3), np.uint8)
        column = round((self.x_m + 1) / 2 * (self.size[1] - 5))
        image[:, column : column + 5] = 255
        return Observation({"observation.images.top": image}, np.array([self.x_m], np.float32))

    def expert_action(self) -> np.ndarray:
        return np.clip([self.goal_m - self.x_m], -0.1, 0.1).astype(np.float32)
