"""A suite that fits the tests' policy folder: two cameras that show where the arm was sent, and nothing to solve."""

from dataclasses import dataclass

import numpy as np
from repwam_core.interface import Embodiment, Observation
from repwam_core.sim.base import SimSettings, SimTask

CAMERAS = ("observation.images.left", "observation.images.right")


@dataclass(frozen=True)
class BlindSettings(SimSettings):
    """Episodes of so many steps."""

    suite = "blind"
    tasks = ("go",)

    size: tuple[int, int] = (32, 16)
    max_steps: int = 22

    @property
    def embodiment(self) -> Embodiment:
        return Embodiment.from_names("arm", ["x", "y", "z"], ["px", "py"], CAMERAS, 20.0, ["m", "m", "1"])

    def instruction(self, task: str, seed: int) -> str:
        return "go left"

    def make_task(self, name: str, renderer: None = None) -> SimTask:
        return BlindTask(self)


class BlindTask(SimTask):
    """Moves by what it is told."""

    name = "go"

    def __init__(self, settings: BlindSettings) -> None:
        self.embodiment, self.max_steps, self.size = settings.embodiment, settings.max_steps, settings.size
        self.action_limits = np.ones(3)

    def start(self, seed: int) -> None:
        self.at, self.steps = np.zeros(3), 0

    def advance(self, action_si: np.ndarray) -> None:
        self.at, self.steps = self.at + action_si, self.steps + 1

    def observe(self) -> Observation:
        images = {camera: np.full((*self.size, 3), int(abs(self.at[0]) * 20) % 256, np.uint8) for camera in CAMERAS}
        return Observation(images, self.at[:2].astype(np.float32))
