"""A simulator that needs no simulator, and a check that the real one can render here."""

import numpy as np
import pytest
from repvitok.runtime.errors import UserError
from repwam_core.interface import ActionChannel, Embodiment, Observation
from repwam_core.sim.base import SimTask


class PointTask(SimTask):
    """A point on a line walks to 1.0 by at most 0.1 a step; the picture's brightness is where it stands."""

    name = "reach"
    embodiment = Embodiment("point", (ActionChannel("dx", "m"), ActionChannel("grip", "1")), ("x",), ("eye",), 10.0)
    max_steps = 30

    def __init__(self, expert_speed: float = 0.1):
        self.action_limits = np.array([0.1, 1.0])
        self.expert_speed = expert_speed
        self.applied: list[np.ndarray] = []

    def start(self, seed):
        self.x = float(np.random.default_rng(seed).uniform(0, 0.3))
        self.steps, self.success, self.applied = 0, False, []

    def advance(self, action_si):
        self.applied.append(np.array(action_si))
        self.x += float(action_si[0])
        self.steps += 1
        self.success = self.success or self.x >= 1.0

    def observe(self):
        value = int(np.clip(self.x, 0, 1) * 200)
        return Observation({"eye": np.full((2, 2, 3), value, np.uint8)}, np.array([self.x], np.float32))

    def expert_action(self):
        return np.array([np.clip(1.2 - self.x, 0, self.expert_speed), 1.0], np.float32)


@pytest.fixture
def point_task():
    """Make a `PointTask`."""
    return PointTask


@pytest.fixture(scope="session")
def rendering() -> None:
    """Skips where MuJoCo is not installed or cannot render."""
    from repwam_core.sim.metaworld import MetaWorldTask

    try:
        with MetaWorldTask("reach") as task:
            task.reset(0)
    except UserError as error:
        if "install" not in str(error):
            raise
        pytest.skip(str(error))
