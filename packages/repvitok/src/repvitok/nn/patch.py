"""Pixels to tokens and tokens to pixels: patches of the first frame, tubelets of the later ones."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

CHANNELS = 3


class Patchify(nn.Module):
    """Linear embedding of p x p patches (first frame) and f x p x p tubelets (later frames)."""

    def __init__(self, patch_size: int, tubelet_frames: int, width: int) -> None:
        super().__init__()
        self.patch_size, self.tubelet_frames = patch_size, tubelet_frames
        self.first = nn.Linear(CHANNELS * patch_size**2, width)
        self.later = nn.Linear(CHANNELS * tubelet_frames * patch_size**2, width)

    def forward(self, video: Float[Tensor, "b 3 T H W"], *, begins: bool) -> Float[Tensor, "b n width"]:
        """Tokens ordered frame, row, column; `begins` says whether the first frame stands alone, as a patch frame."""
        parts = []
        if begins:
            parts.append(self.first(self._cut(video[:, :, :1], 1)))
        if video.shape[2] > begins:
            parts.append(self.later(self._cut(video[:, :, int(begins) :], self.tubelet_frames)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _cut(self, video: Float[Tensor, "b 3 T H W"], frames: int) -> Float[Tensor, "b n values"]:
        p = self.patch_size
        return rearrange(video, "b c (t f) (h p) (w q) -> b (t h w) (c f p q)", f=frames, p=p, q=p)


class Unpatchify(nn.Module):
    """Transposed convolutions from tokens to pixels, with stride equal to kernel: p x p and f x p x p.

    Such a transposed convolution has no overlaps, hence is one linear map per token followed by a
    rearrangement, which is how it is computed; the tests hold it equal to `conv_transpose3d` with the same
    weights.
    """

    def __init__(self, patch_size: int, tubelet_frames: int, width: int) -> None:
        super().__init__()
        self.patch_size, self.tubelet_frames = patch_size, tubelet_frames
        self.first = nn.Linear(width, CHANNELS * patch_size**2)
        self.later = nn.Linear(width, CHANNELS * tubelet_frames * patch_size**2)

    def forward(
        self, tokens: Float[Tensor, "b n width"], grid: tuple[int, int], *, begins: bool
    ) -> Float[Tensor, "b 3 T H W"]:
        """The frames of the tokens, which are ordered frame, row, column; `begins` as for `Patchify`."""
        alone = grid[0] * grid[1] if begins else 0
        parts = []
        if begins:
            parts.append(self._join(self.first(tokens[:, :alone]), grid, 1))
        if tokens.shape[1] > alone:
            parts.append(self._join(self.later(tokens[:, alone:]), grid, self.tubelet_frames))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _join(
        self, values: Float[Tensor, "b n values"], grid: tuple[int, int], frames: int
    ) -> Float[Tensor, "b 3 T H W"]:
        p, (rows, columns) = self.patch_size, grid
        pattern = "b (t h w) (c f p q) -> b c (t f) (h p) (w q)"
        return rearrange(values, pattern, c=CHANNELS, f=frames, p=p, q=p, h=rows, w=columns)
