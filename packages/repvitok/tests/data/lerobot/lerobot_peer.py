"""Runs where lerobot is installed and nothing of ours: `python lerobot_peer.py write|read|convert|version ...`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

FPS, SIZE = 20, (32, 48)
EPISODES = ((9, "open the window"), (14, "close the door"), (5, "open the window"))


def open_data_set(root: Path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset("local/peer", root=root, video_backend="pyav")


def write(root: Path) -> None:
    """Records a data set: one camera as video, one as pictures, numbers of several types and shapes; where this lerobot
    knows them, a depth map."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata

    axes = ["height", "width", "channels"]
    features = {
        "action": {"dtype": "float32", "shape": (2,), "names": ["dx", "dy"]},
        "observation.state": {"dtype": "float64", "shape": (3,), "names": {"motors": ["x", "y", "z"]}},
        "observation.contact": {"dtype": "float32", "shape": (2, 2), "names": None},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
        "observation.count": {"dtype": "int64", "shape": (1,), "names": None},
        "observation.images.video": {"dtype": "video", "shape": (*SIZE, 3), "names": axes},
        "observation.images.picture": {"dtype": "image", "shape": (*SIZE, 3), "names": axes},
    }
    knows_depth = hasattr(LeRobotDatasetMetadata, "depth_keys")
    if knows_depth:
        depth = {"dtype": "video", "shape": (*SIZE, 1), "names": axes, "info": {"is_depth_map": True}}
        features["observation.images.depth"] = depth
        features["observation.images.deep_picture"] = {**depth, "dtype": "image"}
    data_set = LeRobotDataset.create("local/peer", FPS, features, root=root, robot_type="arm", use_videos=True)
    for episode, (length, task) in enumerate(EPISODES):
        for row in range(length):
            number = 100 * episode + row
            picture = np.full((*SIZE, 3), 10 * row + 20, np.uint8)
            picture[: SIZE[0] // 2, :, 0] = 200 - 60 * episode
            frame = {
                "action": np.array([number, -number], np.float32),
                "observation.state": np.array([number, number / 7, -number], np.float64),
                "observation.contact": np.array([[number, 1], [2, 3]], np.float32),
                "next.success": np.array([row == length - 1]),
                "observation.count": np.array([number], np.int64),
                "observation.images.video": picture,
                "observation.images.picture": picture,
                "task": task,
            }
            if knows_depth:
                frame["observation.images.depth"] = np.full((*SIZE, 1), 1000 + 100 * row, np.uint16)
                frame["observation.images.deep_picture"] = np.full((*SIZE, 1), 1000 + 100 * row, np.uint16)
            data_set.add_frame(frame)
        data_set.save_episode()
    data_set.finalize()


def read(root: Path, out: Path) -> None:
    """Every key of every row, as LeRobot's loader gives it; pictures as (H, W, C)."""
    data_set = open_data_set(root)
    rows = [data_set[index] for index in range(len(data_set))]
    arrays = {}
    for key in rows[0]:
        values = [row[key] if isinstance(row[key], str) else row[key].numpy() for row in rows]
        is_picture = key in data_set.meta.camera_keys
        arrays[key] = np.stack([value.transpose(1, 2, 0) for value in values] if is_picture else values)
    np.savez(out, **arrays)


def convert(root: Path) -> None:
    """Takes a data set of version 2.1 to 3.0 in place, by LeRobot's own converter."""
    try:
        from lerobot.scripts.convert_dataset_v21_to_v30 import convert_dataset
    except ImportError:  # 0.4: `root` is the folder of all data sets there
        from lerobot.datasets.v30.convert_dataset_v21_to_v30 import convert_dataset

        convert_dataset(root.name, root=root.parent, push_to_hub=False)
    else:
        convert_dataset("local/peer", root=root, push_to_hub=False)


def version() -> None:
    """Prints lerobot's version."""
    from importlib.metadata import version

    print(version("lerobot"))


if __name__ == "__main__":
    globals()[sys.argv[1]](*map(Path, sys.argv[2:]))
