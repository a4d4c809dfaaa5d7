"""Data that tests across packages share."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def shared_video_dataset(tmp_path_factory):
    """A LeRobot v2.1 data set: 6 episodes of a bright square that its actions move about, 40 Hz, 48 x 72 pixels."""
    from repvitok.data import LeRobotWriter

    root = tmp_path_factory.mktemp("squares") / "dataset"
    writer = LeRobotWriter(
        root,
        fps=40,
        cameras={"observation.images.top": (48, 72)},
        state_names=["x", "y"],
        action_names=["x", "y", "grip"],
        robot_type="square",
    )
    for index in range(6):
        rng = np.random.default_rng(index)
        action = np.zeros((45, 3), np.float32)
        action[:, :2] = rng.uniform(-1, 1, (9, 2)).repeat(5, axis=0)
        place = np.clip(np.cumsum(action[:, :2], axis=0) + np.array([36, 24]), 6, 40).astype(int)
        frames = np.full((45, 48, 72, 3), 40, np.uint8)
        for frame, (x, y) in zip(frames, place, strict=True):
            frame[y - 5 : y + 5, x - 5 : x + 5] = (220, 60, 30)
        writer.add_episode(
            index,
            frames={"observation.images.top": frames},
            state=place.astype(np.float32),
            action=action,
            task="move the square",
        )
    writer.finalize()
    return root
