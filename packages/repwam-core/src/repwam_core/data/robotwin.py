"""RoboTwin 2.0's recorded episodes, HDF5 files with JPEG pictures, to a LeRobot data set of named channels. No torch.

RoboTwin's `collect_data.sh` and its published archives hold, for a task and a config,

    <task>/<config>/data/episode<i>.hdf5          /observation/<camera>/rgb, /joint_action/vector, ...
    <task>/<config>/instructions/episode<i>.json  {"seen": [...], "unseen": [...]}
    <task>/<config>/seed.txt                      the layout's seed of each episode

One row stands for one moment: what the cameras saw and where the joints were told to be. Nothing else is recorded as
an action, so the action of row i is the joint vector of row i + 1, which `take_action(..., "qpos")` takes to get
there; the last row has none and is left out.

Pictures are given to OpenCV as RGB, which takes them for BGR when it makes JPEG of them: any other decoder sees red and
blue exchanged, and they are exchanged back here.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from repvitok.data.lerobot.writer import LeRobotWriter
from repvitok.data.split import EpisodeNumbers, choose_episodes
from repvitok.runtime.documents import load_json, parse, require_format
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import refuse_foreign, sole_writer, write_json_atomic
from repvitok.runtime.progress import progress

from repwam_core.interface import Embodiment, two_arm_names

__all__ = ["SAVED_HZ", "Instructions", "prepare_robotwin"]

Instructions = Literal["seen", "unseen", "task"]
"""Which sentences an episode's instruction is drawn from; "task" is the task's name in words."""
SAVED_HZ = 250 / 15
"""Rows per second: the simulator's steps per second, and every 15th of them is saved (`save_freq` of the config)."""
CAMERAS = ("head_camera", "left_camera", "right_camera")
FORMAT, FORMAT_VERSION = "repwam-robotwin", 1
PLAN_FILE = "robotwin.json"
_NUMBER = re.compile(r"episode(\d+)\.hdf5")


@dataclass(frozen=True)
class _Episode:
    """Where one recording is, below the source: `folder` is "<task>/<config>" or the end of it."""

    folder: str
    number: int

    @property
    def file(self) -> Path:
        return Path(self.folder, "data", f"episode{self.number}.hdf5")


@dataclass(frozen=True)
class _Plan:
    """What all episodes of a data set share, and which they are; in robotwin.json."""

    episodes: list[_Episode]
    instructions: Instructions
    seed: int
    rate_hz: float
    cameras: list[str]


@dataclass(frozen=True)
class _Recording:
    """What one HDF5 file holds: uint8 RGB (T, H, W, 3) of each camera, joints (T, C), and how many each arm has."""

    frames: dict[str, np.ndarray]
    joints: np.ndarray
    arms: tuple[int, int]


def prepare_robotwin(
    source: Path,
    out: Path,
    *,
    instructions: Instructions = "seen",
    seed: int = 0,
    rate_hz: float = SAVED_HZ,
    cameras: Sequence[str] = CAMERAS,
    episodes: EpisodeNumbers | None = None,
) -> Embodiment:
    """Write all recordings below a folder as one LeRobot data set (v2.1), task by task; a killed run is continued.

    Args:
        source: a folder <task>/<config>, or one that holds several.
        out: folder to write; empty, or of an earlier run with the same recordings and settings.
        instructions: which of an episode's sentences it is told by, one drawn for each episode.
        seed: of that draw.
        rate_hz: rows per second, if the config's save_freq is not 15.
        cameras: RoboTwin's cameras, in the order of their tokens.
        episodes: numbers of those that are taken of every task and config; all when None.

    Returns:
        The robot that the data set is of.
    """
    source = source.parent if any(source.glob("episode*.hdf5")) else source
    found = _find(source, episodes)
    plan = _Plan(found, instructions, seed, float(rate_hz), list(cameras))
    first = _read(source / found[0].file, cameras)
    robot = _robot(first, plan)
    if not (out / PLAN_FILE).exists():
        refuse_foreign(out, (), "prepared RoboTwin episodes")
    with sole_writer(out, f"{out}: another run is preparing this folder; start this one when it has ended"):
        _hold_to(plan, out / PLAN_FILE)
        writer = LeRobotWriter(
            out,
            fps=plan.rate_hz,
            cameras={f"observation.images.{name}": first.frames[name].shape[1:3] for name in cameras},
            state_names=robot.state_channels,
            action_names=robot.action_names,
            robot_type=robot.name,
        )
        for index, episode in enumerate(progress(found, desc="prepare", unit="episode")):
            if not writer.episode_exists(index):
                _write(writer, index, source, episode, plan, first.arms)
        writer.finalize()
    return robot


def _find(source: Path, episodes: EpisodeNumbers | None) -> list[_Episode]:
    """The recordings below `source`, by folder and number."""
    folders: dict[Path, list[int]] = {}
    for path in source.rglob("episode*.hdf5"):
        if path.parent.name == "data" and (match := _NUMBER.fullmatch(path.name)):
            folders.setdefault(path.parent.parent, []).append(int(match[1]))
    if not folders:
        raise UserError(f"{source}: expected RoboTwin's episodes, data/episode0.hdf5 and so on, found none below it")
    return [
        _Episode(folder.relative_to(source).as_posix(), number)
        for folder in sorted(folders)
        for number in sorted(choose_episodes(episodes, sorted(folders[folder]), str(folder)))
    ]


def _hold_to(plan: _Plan, path: Path) -> None:
    """Note what the folder is made of, or refuse to go on with something else."""
    if path.exists():
        before = parse(require_format(load_json(path), FORMAT, FORMAT_VERSION, str(path)), _Plan, str(path))
        if before != plan:
            raise UserError(
                f"{path.parent} holds RoboTwin episodes prepared otherwise ({len(before.episodes)} of them, "
                f"instructions {before.instructions}, seed {before.seed}, {before.rate_hz:g} Hz, cameras "
                f"{before.cameras}); remove the folder or name another"
            )
    else:
        write_json_atomic(path, {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(plan)})


def _robot(recording: _Recording, plan: _Plan) -> Embodiment:
    """Two arms whose joints and grippers are named alike in actions and states."""
    names = two_arm_names(recording.arms)
    cameras = [f"observation.images.{name}" for name in plan.cameras]
    units = ["1" if name.endswith("gripper") else "rad" for name in names]
    name = "aloha-agilex" if recording.arms == (6, 6) else f"two-arms-{recording.arms[0]}-{recording.arms[1]}"
    return Embodiment.from_names(name, names, names, cameras, plan.rate_hz, units)


def _write(
    writer: LeRobotWriter, index: int, source: Path, episode: _Episode, plan: _Plan, arms: tuple[int, int]
) -> None:
    path = source / episode.file
    recording = _read(path, plan.cameras)
    if recording.arms != arms:
        raise UserError(f"{path}: expected arms of {arms} joints like the first episode, got {recording.arms}")
    joints = recording.joints.astype(np.float32)
    folder = path.parent.parent
    about: dict[str, Any] = {"robotwin": episode.folder, "robotwin_episode": episode.number}
    if (folder / "seed.txt").is_file():
        seeds = (folder / "seed.txt").read_text(encoding="utf-8").split()
        about |= {"seed": int(seeds[episode.number])} if episode.number < len(seeds) else {}
    writer.add_episode(
        index,
        frames={f"observation.images.{name}": frames[:-1] for name, frames in recording.frames.items()},
        state=joints[:-1],
        action=joints[1:],
        task=_instruction(folder, episode, plan),
        metadata=about,
    )


def _instruction(folder: Path, episode: _Episode, plan: _Plan) -> str:
    """One of the episode's sentences, drawn from seed, folder and number."""
    if plan.instructions == "task":
        return folder.resolve().parent.name.replace("_", " ")
    path = folder / "instructions" / f"episode{episode.number}.json"
    if not path.is_file():
        raise UserError(
            f"{path}: missing; RoboTwin writes it (description/gen_episode_instructions.sh), or take --instructions "
            "task for the task's name"
        )
    sentences = parse(load_json(path), dict[str, list[str]], str(path)).get(plan.instructions, [])
    if not sentences:
        raise UserError(f"{path}: expected sentences under {plan.instructions!r}, found none")
    draw = np.random.default_rng([plan.seed, zlib.crc32(episode.folder.encode()), episode.number])
    return sentences[int(draw.integers(len(sentences)))]


# -- HDF5 --------------------------------------------------------------------------------------------------------


def _read(path: Path, cameras: Sequence[str]) -> _Recording:
    with _opened(path) as file:
        joints, arms = _joints(file, path)
        frames = {camera: _frames(file, camera, path) for camera in cameras}
    lengths = {"joint_action": len(joints), **{camera: len(pictures) for camera, pictures in frames.items()}}
    if len(set(lengths.values())) != 1 or len(joints) < 2:
        raise UserError(f"{path}: expected as many pictures of each camera as joint rows, at least 2, got {lengths}")
    return _Recording(frames, joints, arms)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise UserError("reading RoboTwin's episodes needs h5py: pip install h5py") from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path}: not a whole HDF5 file ({error})") from error
    with file:
        yield file


def _joints(file: Any, path: Path) -> tuple[np.ndarray, tuple[int, int]]:
    """Joint vectors (T, C) in the order of `two_arm_names`, and how many joints each arm has."""
    parts = [f"joint_action/{side}_{part}" for side in ("left", "right") for part in ("arm", "gripper")]
    have = [part for part in parts if part in file]
    whole = np.asarray(file["joint_action/vector"]) if "joint_action/vector" in file else None
    if len(have) < len(parts) and whole is None:
        raise UserError(
            f"{path}: expected /joint_action/vector, or the arms and grippers apart, found "
            f"{sorted(file.get('joint_action', {}))}; collect with data_type qpos"
        )
    if len(have) == len(parts):
        columns = [np.asarray(file[part]) for part in parts]
        columns = [column.reshape(len(column), -1) for column in columns]
        joined, arms = np.concatenate(columns, axis=1), (columns[0].shape[1], columns[2].shape[1])
        if whole is not None and not np.array_equal(joined, whole, equal_nan=True):
            raise UserError(f"{path}: /joint_action/vector says otherwise than the arms and grippers beside it")
    else:
        assert whole is not None
        if whole.ndim != 2 or whole.shape[1] % 2 or whole.shape[1] < 4:
            raise UserError(f"{path}: /joint_action/vector: expected (T, C) of two like arms, got {whole.shape}")
        joined, arms = whole, (whole.shape[1] // 2 - 1,) * 2
    if not np.isfinite(joined).all():
        row, column = np.argwhere(~np.isfinite(joined))[0]
        raise UserError(f"{path}: joint_action, row {row}, number {column}: {joined[row, column]}")
    return joined, arms


def _frames(file: Any, camera: str, path: Path) -> np.ndarray:
    """All pictures of a camera, uint8 RGB (T, H, W, 3)."""
    key = f"observation/{camera}/rgb"
    if key not in file:
        raise UserError(f"{path}: no pictures of {camera!r}; there are cameras {sorted(file.get('observation', {}))}")
    pictures = []
    for row, stored in enumerate(file[key]):
        # The zeros that pad the shorter pictures come after JPEG's end mark; numpy has cut them off already.
        content = stored.tobytes() if isinstance(stored, np.ndarray) else bytes(stored)
        try:
            with Image.open(io.BytesIO(content)) as picture:
                pictures.append(np.asarray(picture.convert("RGB"))[..., ::-1])
        except OSError as error:
            raise UserError(f"{path}: {key}, row {row}: not a readable picture ({error})") from error
    if len({picture.shape for picture in pictures}) > 1:
        raise UserError(f"{path}: {key}: expected pictures of one size, got {sorted({p.shape for p in pictures})}")
    return np.stack(pictures) if pictures else np.zeros((0, 2, 2, 3), np.uint8)
