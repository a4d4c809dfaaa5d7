"""Teacher features kept on disk, so that a frame is shown to the teacher once."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from repvitok.documents import Above0, check_arguments
from repvitok.errors import UserError
from repvitok.files import atomic_file
from repvitok.teacher import Teacher

log = logging.getLogger(__name__)


class CachedTeacher(Teacher):
    """Another teacher, with its features of every frame kept in a folder as float16.

    A frame is known by its pixels, so that a clip that overlaps one seen before finds the shared frames, whatever data
    set, stride or loader it came through; features are filed under the teacher's digest and the grid, so that several
    teachers can share a folder. Features are rounded to float16 on the first use too: a run does not depend on what the
    folder held. It pays where the same frames come often and the teacher is dear: small data, many steps, a CPU.
    """

    def __init__(self, teacher: Teacher, folder: str, max_gib: Above0 = 20.0) -> None:
        """Keeps the features of `teacher` in `folder`.

        Args:
            teacher: computes what is not there yet.
            folder: created if missing; can be deleted at any time.
            max_gib: once the folder holds this much nothing is added, and known frames are still read.

        Raises:
            ValueError: if max_gib is not positive.
        """
        super().__init__()
        check_arguments(CachedTeacher.__init__, locals())
        self.teacher = teacher
        self.name, self.dim = teacher.name, teacher.dim
        self._root = Path(folder).expanduser() / teacher.digest()[:16]
        self._bytes_left = int(max_gib * 2**30) - sum(path.stat().st_size for path in self._root.rglob("*.npy"))
        self._freeze()

    def frame_features(self, frames: Float[Tensor, "n 3 H W"], grid: tuple[int, int]) -> Float[Tensor, "n h w c"]:
        """Features of known frames from the folder, of the others from the teacher."""
        paths = [self._path(frame, grid) for frame in frames]
        found = {path: _read(path, (*grid, self.dim)) for path in set(paths)}
        missing = {path: i for i, path in enumerate(paths) if found[path] is None}
        if missing:
            computed = self.teacher.frame_features(frames[list(missing.values())], grid).to(torch.float16).cpu().numpy()
            for path, features in zip(missing, computed, strict=True):
                self._keep(path, features)
                found[path] = features
        stacked = np.stack([found[path] for path in paths])  # pyright: ignore[reportCallIssue, reportArgumentType]
        return torch.from_numpy(stacked).to(frames.device, torch.float32)

    def _path(self, frame: Tensor, grid: tuple[int, int]) -> Path:
        pixels = frame.detach().to("cpu", torch.float32).contiguous().numpy()
        key = hashlib.blake2b(repr((grid, pixels.shape)).encode(), digest_size=16)
        key.update(pixels.tobytes())
        name = key.hexdigest()
        return self._root / name[:2] / f"{name}.npy"

    def _keep(self, path: Path, features: np.ndarray) -> None:
        if self._bytes_left < features.nbytes:
            if self._bytes_left >= 0:
                log.warning("%s is full (max_gib): no more teacher features are kept", self._root)
            self._bytes_left = -1
            return
        self._bytes_left -= features.nbytes
        with atomic_file(path, durable=False) as partial:
            np.save(partial, features, allow_pickle=False)


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Stored features, or None where there are none.

    Raises:
        ValueError: if the file is damaged; names it.
    """
    if not path.is_file():
        return None
    try:
        features = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path}: no readable teacher features ({error}); delete the file") from error
    if features.shape != shape or features.dtype != np.float16:
        raise UserError(
            f"{path}: expected float16 features of shape {shape}, got {features.dtype} {features.shape}; delete the "
            "file"
        )
    return features
