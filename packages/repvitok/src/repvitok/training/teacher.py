"""Teachers G(o) of the alignment loss (RepWAM Eq. 2): frozen features of frames on the tokenizer's grid.

Beside timm's networks (`repvitok.nn.features`): open_clip's image towers, a stand-in without weights, and features kept
on disk.
"""

from __future__ import annotations

import hashlib
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from repvitok.nn.features import (
    ConvNetTeacher,
    Teacher,
    TimmTeacher,
    no_weights,
    normalised,
    register_normalisation,
    require_one_source,
    resized,
    safetensors_file,
)
from repvitok.runtime.documents import Above0, Side, check_arguments
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import atomic_file

__all__ = ["CachedTeacher", "ConvNetTeacher", "HOGTeacher", "OpenClipTeacher", "Teacher", "TimmTeacher"]
log = logging.getLogger(__name__)


class OpenClipTeacher(Teacher):
    """The image tower of an open_clip model by name, at the model's own image size.

    Frames are resized to that size; where the tower's grid is not the tokenizer's, features are resampled to it.
    """

    def __init__(
        self,
        name: str = "PE-Core-B-16",
        weights_path: str | None = None,
        hub_tag: str | None = None,
        image_size: Side | None = None,
        random_weights_for_tests: bool = False,
    ) -> None:
        """Builds the tower with exactly one source of weights.

        Args:
            name: open_clip's model name.
            weights_path: a local .safetensors file of the whole model.
            hub_tag: open_clip's `pretrained` tag, fetched from the hub or its local cache, e.g. "meta".
            image_size: side of the square the frames are resized to; None for the model's own.
            random_weights_for_tests: random weights; nothing is learned from such a teacher.
        """
        super().__init__()
        check_arguments(OpenClipTeacher.__init__, locals())
        require_one_source(
            name, weights_path=weights_path, hub_tag=hub_tag, random_weights_for_tests=random_weights_for_tests
        )
        self.name = name + (" (random weights for tests)" if random_weights_for_tests else "")
        self.network: Any = _open_clip_tower(name, weights_path, hub_tag, image_size)
        size = self.network.image_size
        self.image_size: tuple[int, int] = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        register_normalisation(self, self.network.image_mean, self.network.image_std)
        self._freeze()
        with torch.no_grad():
            self.dim = self._tower_features(torch.zeros(1, 3, *self.image_size)).shape[1]

    def frame_features(self, frames: Float[Tensor, "n 3 H W"], grid: tuple[int, int]) -> Float[Tensor, "n h w c"]:
        """Last block's patch tokens, after the tower's final norm."""
        found = self._tower_features(normalised(self, resized(frames, self.image_size)))
        return rearrange(resized(found, grid), "n c h w -> n h w c")

    def _tower_features(self, frames: Tensor) -> Tensor:
        found = self.network.forward_intermediates(
            frames, indices=1, normalize_intermediates=True, intermediates_only=True
        )
        return found["image_intermediates"][-1]


class HOGTeacher(Teacher):
    """Histograms of oriented gradients: a stand-in where no Perception Encoder weights can be had.

    A known self-supervised target (Dalal and Triggs 2005; MaskFeat 2022) that needs no weights: per token and colour,
    2 x 2 cells of gradient magnitude by unsigned orientation, 9 bins, L2-normalised over the token. It sees edges, not
    meaning. It is NOT the paper's teacher: results with it must never be compared with the paper's.
    """

    BINS = 9
    CELLS = 2

    def __init__(self) -> None:
        """Has no settings and no weights."""
        super().__init__()
        self.name = "HOG (stand-in, not Perception Encoder)"
        self.dim = 3 * self.CELLS**2 * self.BINS
        self._freeze()

    def frame_features(self, frames: Float[Tensor, "n 3 H W"], grid: tuple[int, int]) -> Float[Tensor, "n h w c"]:
        """(n, h, w, 108), every token's vector of length one (or zero, where nothing varies)."""
        height, width = frames.shape[2:]
        if height % (grid[0] * self.CELLS) or width % (grid[1] * self.CELLS):
            raise UserError(
                f"frames of {height}x{width} pixels do not split into {self.CELLS} cells per token of {grid}"
            )
        padded = F.pad(frames, (1, 1, 1, 1), mode="replicate")
        dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
        dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
        votes = _orientation_votes(dx, dy, self.BINS)
        cells = reduce(
            votes,
            "n c bins (h ch y) (w cw x) -> n h w (c ch cw bins)",
            "mean",
            h=grid[0],
            w=grid[1],
            ch=self.CELLS,
            cw=self.CELLS,
        )
        return F.normalize(cells, dim=-1, eps=1e-6)


def _open_clip_tower(name: str, weights_path: str | None, hub_tag: str | None, image_size: int | None) -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise UserError("this teacher needs open_clip: pip install 'repvitok[train]'") from error
    if name not in open_clip.list_models():
        raise UserError(f"open_clip has no model {name!r}: see open_clip.list_models(), e.g. PE-Core-B-16")
    source = str(safetensors_file(weights_path)) if weights_path else hub_tag
    try:
        model = open_clip.create_model(
            name, pretrained=source, force_image_size=image_size, require_pretrained=source is not None
        )
    except (RuntimeError, OSError) as error:
        raise UserError(no_weights(name, weights_path, error)) from error
    return model.visual


def _orientation_votes(dx: Tensor, dy: Tensor, bins: int) -> Tensor:
    """(n, c, H, W) gradients -> (n, c, bins, H, W): magnitude, split between the two nearest unsigned orientations."""
    magnitude = (dx.square() + dy.square()).sqrt()
    position = (torch.atan2(dy, dx) % math.pi) * (bins / math.pi)
    lower = position.floor()
    share = (position - lower).unsqueeze(2)
    first = lower.long().remainder(bins).unsqueeze(2)
    votes = torch.zeros(*dx.shape[:2], bins, *dx.shape[2:], dtype=dx.dtype, device=dx.device)
    votes.scatter_add_(2, first, magnitude.unsqueeze(2) * (1 - share))
    return votes.scatter_add_(2, (first + 1).remainder(bins), magnitude.unsqueeze(2) * share)


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
    """Stored features, or None where there are none."""
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
