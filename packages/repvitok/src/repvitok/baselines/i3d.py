"""I3D (Carreira and Zisserman 2017), Inception-v1 inflated to 3-D: the feature network of Frechet video distances."""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from repvitok.runtime.errors import UserError

# Channels of each Inception block's branches: 1x1 | 1x1 -> 3x3 | 1x1 -> 3x3 | pool -> 1x1.
BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# (kernel, stride) of the pooling before a block.
POOLS = {"Mixed_3b": ((1, 3, 3), (1, 2, 2)), "Mixed_4b": ((3, 3, 3), (2, 2, 2)), "Mixed_5b": ((2, 2, 2), (2, 2, 2))}
SIZE = 224
MIN_FRAMES = 9


def same_padded(
    x: Float[Tensor, "b c T H W"], kernel: tuple[int, int, int], stride: tuple[int, int, int]
) -> Float[Tensor, "b c T2 H2 W2"]:
    """Zeros around x so that a kernel gives ceil(size / stride) outputs per axis; an odd one goes to the end."""
    padding: list[int] = []
    for size, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max(k - (s if size % s == 0 else size % s), 0)
        padding = [total // 2, total - total // 2, *padding]
    return F.pad(x, padding)


class Unit(nn.Module):
    """Convolution with "same" padding, batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv3d.kernel_size, self.conv3d.stride
        padded = same_padded(x, (kernel[0], kernel[1], kernel[2]), (stride[0], stride[1], stride[2]))
        return F.relu(self.bn(self.conv3d(padded)))


class InceptionBlock(nn.Module):
    """Four branches side by side, stacked along the channels."""

    def __init__(self, inputs: int, channels: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        self.b0 = Unit(inputs, channels[0])
        self.b1a, self.b1b = Unit(inputs, channels[1]), Unit(channels[1], channels[2], 3)
        self.b2a, self.b2b = Unit(inputs, channels[3]), Unit(channels[3], channels[4], 3)
        self.b3b = Unit(inputs, channels[5])

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool3d(same_padded(x, (3, 3, 3), (1, 1, 1)), 3, 1)
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class _Logits(nn.Module):
    """The classifier; a module of its own so that its parameters bear the names of the published files."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(1024, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(x)


class I3D(nn.Module):
    """I3D for RGB with the parameter names of the pytorch-i3d repository, whose weight files load strictly.

    Its answer for a clip is the mean over time of its class logits: the features of that variant's FVD.
    """

    def __init__(self, classes: int = 400) -> None:
        """Builds the network with random weights; 400 classes for Kinetics-400."""
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = Unit(64, 64)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        inputs = 192
        for name, channels in BLOCKS.items():
            self.add_module(name, InceptionBlock(inputs, channels))
            inputs = channels[0] + channels[2] + channels[4] + channels[5]
        self.logits = _Logits(classes)

    def forward(self, video: Float[Tensor, "b 3 T 224 224"]) -> Float[Tensor, "b classes"]:
        """Logits averaged over time; pixels in [-1, 1], 9 frames or more."""
        if video.shape[2] < MIN_FRAMES:
            raise UserError(f"I3D needs clips of {MIN_FRAMES} frames or more, got {video.shape[2]}: set data.frames")
        x = self.Conv3d_1a_7x7(video)
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(_pooled(x, *POOLS["Mixed_3b"])))
        for name in BLOCKS:
            x = self.get_submodule(name)(_pooled(x, *POOLS[name]) if name in POOLS else x)
        x = self.logits(F.avg_pool3d(x, (2, SIZE // 32, SIZE // 32), 1))
        return reduce(x, "b classes t 1 1 -> b classes", "mean")


def resized_video(video: Float[Tensor, "b 3 T H W"], size: int = SIZE) -> Float[Tensor, "b 3 T size size"]:
    """Every frame resized bilinearly to a square, the aspect ratio not kept, as FVD implementations do."""
    frames = rearrange(video, "b c T H W -> (b T) c H W")
    frames = F.interpolate(frames, (size, size), mode="bilinear", align_corners=False)
    return rearrange(frames, "(b T) c H W -> b c T H W", b=video.shape[0])


def _pooled(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    return F.max_pool3d(same_padded(x, kernel, stride), kernel, stride)
