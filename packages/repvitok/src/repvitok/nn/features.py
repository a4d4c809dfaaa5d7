"""Frozen features of single frames on a tokenizer's grid: timm's vision transformers, stages of convolutional networks.

They are teachers of the alignment loss (`repvitok.training.teacher`), and encoders of a `FeatureTokenizer`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from repvitok.runtime.errors import UserError

RESIZE = {"mode": "bilinear", "align_corners": False, "antialias": True}


class Teacher(nn.Module, ABC):
    """A frozen image network, asked for one feature vector per token of the tokenizer's grid.

    Attributes:
        name: what to call it in results.
        dim: channels of a feature vector.
    """

    name: str
    dim: int

    @abstractmethod
    def frame_features(self, frames: Float[Tensor, "n 3 H W"], grid: tuple[int, int]) -> Float[Tensor, "n h w c"]:
        """Features of single frames in [-1, 1]; (h, w) is `grid`."""

    @torch.no_grad()
    def features(self, video: Float[Tensor, "b 3 T H W"], grid: tuple[int, int]) -> Float[Tensor, "b T h w c"]:
        """G(o) of every frame.

        Args:
            video: pixels in [-1, 1].
            grid: (h, w), the tokenizer's spatial grid for this size, `tokenizer.grid(H, W)`.
        """
        found = self.frame_features(rearrange(video, "b c T H W -> (b T) c H W"), grid)
        return rearrange(found, "(b T) h w c -> b T h w c", b=video.shape[0])

    def digest(self) -> str:
        """Identity of the features: sha256 over class, settings and every weight."""
        found = hashlib.sha256(type(self).__name__.encode())
        plain = {k: v for k, v in vars(self).items() if isinstance(v, (str, int, float, tuple))}
        found.update(repr(sorted(plain.items())).encode())
        for name, value in [*self.named_parameters(), *self.named_buffers()]:
            found.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def train(self, mode: bool = True) -> Teacher:  # noqa: ARG002
        """Stays in evaluation mode: a teacher is frozen."""
        return super().train(False)

    def _freeze(self) -> None:
        self.requires_grad_(False).eval()


class TimmTeacher(Teacher):
    """Any vision transformer of timm by name; the paper's teacher is Perception Encoder (`vit_pe_*`).

    A frame is resized so that the network's own patches fall on the tokenizer's grid: with 16-pixel patches on both
    sides the frame is taken as it is, one to one; a network with 14-pixel patches sees it at 14/16 of its size.
    Prefix tokens (class, registers) are dropped.
    """

    def __init__(
        self,
        name: str = "vit_pe_core_base_patch16_224",
        weights_path: str | None = None,
        hub: bool = False,
        random_weights_for_tests: bool = False,
    ) -> None:
        """Builds the network with exactly one source of weights.

        Args:
            name: timm's model name.
            weights_path: its weights, a local .safetensors file.
            hub: take timm's weights from the Hugging Face hub, or from its local cache.
            random_weights_for_tests: random weights; nothing is learned from such a teacher.
        """
        super().__init__()
        require_one_source(name, weights_path=weights_path, hub=hub, random_weights_for_tests=random_weights_for_tests)
        self.name = name + (" (random weights for tests)" if random_weights_for_tests else "")
        self.network: Any = timm_network(name, weights_path, hub, dynamic_img_size=True)
        if not hasattr(self.network, "num_prefix_tokens"):
            raise UserError(f"timm's {name!r} has no patch tokens: choose a vision transformer, or use ConvNetTeacher")
        height, width = self.network.patch_embed.patch_size
        self.patch_size = (int(height), int(width))
        self.dim = int(self.network.num_features)
        register_normalisation(self, self.network.pretrained_cfg["mean"], self.network.pretrained_cfg["std"])
        self._freeze()

    def frame_features(self, frames: Float[Tensor, "n 3 H W"], grid: tuple[int, int]) -> Float[Tensor, "n h w c"]:
        """Last layer's patch tokens, after the network's final norm."""
        size = (grid[0] * self.patch_size[0], grid[1] * self.patch_size[1])
        tokens = self.network.forward_features(normalised(self, resized(frames, size)))
        patches = tokens[:, self.network.num_prefix_tokens :]
        return rearrange(patches, "n (h w) c -> n h w c", h=grid[0], w=grid[1])


class ConvNetTeacher(Teacher):
    """One stage of a timm network with feature maps, every token's vector of length one.

    For where no Perception Encoder can be had but some trained network can: NOT the paper's teacher. A frame is resized
    so that the stage's map falls on the tokenizer's grid: a stage of reduction 16 sees frames as they are, one of
    reduction 32 at twice their size. Maps of different networks differ in scale, hence the unit length, which makes
    the alignment weight mean the same for all of them.
    """

    def __init__(
        self,
        name: str,
        stage: int = -1,
        weights_path: str | None = None,
        hub: bool = False,
        random_weights_for_tests: bool = False,
    ) -> None:
        """Builds the network with exactly one source of weights.

        Args:
            name: timm's model name, e.g. "tf_efficientnet_lite0".
            stage: index into the network's stages (timm's `feature_info`); -1 for the last.
            weights_path: its weights, a local .safetensors file.
            hub: take timm's weights from the Hugging Face hub, or from its local cache.
            random_weights_for_tests: random weights; nothing is learned from such a teacher.
        """
        super().__init__()
        require_one_source(name, weights_path=weights_path, hub=hub, random_weights_for_tests=random_weights_for_tests)
        self.network: Any = timm_network(name, weights_path, hub)
        stages = getattr(self.network, "feature_info", None)
        if not stages or not hasattr(self.network, "forward_intermediates"):
            raise UserError(f"timm's {name!r} has no feature maps; for a vision transformer use TimmTeacher")
        if not -len(stages) <= stage < len(stages):
            raise UserError(f"timm's {name!r} has stages 0 to {len(stages) - 1}, got stage {stage}")
        self.stage = stage % len(stages)
        self.dim = int(stages[self.stage]["num_chs"])
        self.reduction = int(stages[self.stage]["reduction"])
        random = " (random weights for tests)" if random_weights_for_tests else ""
        self.name = f"{name} stage {self.stage}{random} (stand-in, not Perception Encoder)"
        register_normalisation(self, self.network.pretrained_cfg["mean"], self.network.pretrained_cfg["std"])
        self._freeze()

    def frame_features(self, frames: Float[Tensor, "n 3 H W"], grid: tuple[int, int]) -> Float[Tensor, "n h w c"]:
        """The stage's map, every vector of length one."""
        size = (grid[0] * self.reduction, grid[1] * self.reduction)
        maps = self.network.forward_intermediates(
            normalised(self, resized(frames, size)), indices=[self.stage], intermediates_only=True
        )
        return F.normalize(rearrange(resized(maps[0], grid), "n c h w -> n h w c"), dim=-1, eps=1e-6)


def require_one_source(name: str, **sources: str | bool | None) -> None:
    """Checks that exactly one source of a teacher's weights was chosen."""
    chosen = [source for source, value in sources.items() if value]
    if len(chosen) != 1:
        offered = ", ".join(sources)
        raise UserError(
            f"teacher {name!r} needs its weights from exactly one of {offered}; got {chosen or 'none'}. Set hub "
            "(hub: true, or hub_tag) where the Hugging Face hub can be reached; elsewhere download the model's "
            "safetensors file (the timm or facebook organisation on the hub) and give weights_path; or name another "
            "teacher, such as repvitok.training.teacher.HOGTeacher, in the recipe"
        )


def timm_network(name: str, weights_path: str | None, hub: bool, **options: Any) -> Any:
    """timm's model `name` with its classifier, so that its weights load strictly; `options` go to timm."""
    try:
        import timm
    except ImportError as error:
        raise UserError("this teacher needs the package timm: pip install 'repvitok[train]'") from error
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}: see timm.list_models('vit_*'), e.g. vit_pe_core_base_patch16_224")
    overlay = {"file": str(safetensors_file(weights_path))} if weights_path else None
    try:
        return timm.create_model(name, pretrained=bool(weights_path or hub), pretrained_cfg_overlay=overlay, **options)
    except TypeError as error:
        raise UserError(f"timm's {name!r} is no vision transformer that takes any image size: {error}") from error
    except (RuntimeError, OSError) as error:
        raise UserError(no_weights(name, weights_path, error)) from error


def safetensors_file(weights_path: str) -> Path:
    path = Path(weights_path).expanduser()
    if not path.is_file():
        raise UserError(f"no teacher weights at {path}: download the model's safetensors file from the hub")
    if path.suffix != ".safetensors":
        raise UserError(f"expected teacher weights as .safetensors, got {path}: pickles are not loaded")
    return path


def no_weights(name: str, weights_path: str | None, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if weights_path:
        return f"{weights_path} does not hold the weights of {name!r}: {reason}"
    return (
        f"the weights of {name!r} could not be fetched from the hub ({reason}): download its safetensors file where "
        "there is a network and give weights_path, or name another teacher in the recipe"
    )


def register_normalisation(teacher: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Keeps a network's pixel mean and standard deviation, per colour in [0, 1], as buffers."""
    teacher.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
    teacher.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)


def normalised(teacher: nn.Module, frames: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1] -> the network's own normalisation."""
    return ((frames + 1) / 2 - teacher.get_buffer("pixel_mean")) / teacher.get_buffer("pixel_std")


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, c, h, w) maps at another size, antialiased; themselves where the size is theirs."""
    return maps if tuple(maps.shape[2:]) == tuple(size) else F.interpolate(maps, size, **RESIZE)
