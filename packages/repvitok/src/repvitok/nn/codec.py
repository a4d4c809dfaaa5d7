"""Encoder and decoder: the tokenizer's two causal transformers, for whole clips and for the next frames of a stream.

Pixels become tokens, and tokens pixels, by patches of the first frame and tubelets of the later ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from repvitok.config import RepViTokConfig
from repvitok.nn.attention import ONE_CALL_KEYS, Kernel, flex_mask
from repvitok.nn.blocks import Attention, CausalTransformer, FrameLayout, KeyValues, init_transformer, whole_clip
from repvitok.nn.rope import rotary_table

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


@dataclass(frozen=True)
class CodecState:
    """Where the encoder or the decoder of a stream stands; never changed in place, so it can be kept and
    reused.

    Attributes:
        frames: latent frames processed so far, the rotary position of the next one.
        grid: (rows, columns) of tokens in each.
        layers: every attention layer's keys and values of the frames that later ones can still see.
    """

    frames: int
    grid: tuple[int, int]
    layers: tuple[KeyValues, ...]


class LatentProjection(nn.Module):
    """The attention-based projection of tokens to latents, and the layer norm that gives them unit scale.

    z = LayerNorm(W y + attention(y)) with y = LayerNorm(x): the attention, causal like the blocks', gathers
    what a latent should hold from its surroundings, and W passes its own token through. The paper names the
    layer and does not draw it. The last norm has no gain or bias: the decoder and W_align begin with linear
    layers that would absorb them, and without them a latent has mean 0 and standard deviation 1 over its channels
    whatever the optimizer does.
    """

    def __init__(self, width: int, heads: int, latent_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, latent_dim)
        self.through = nn.Linear(width, latent_dim)
        self.latent_norm = nn.LayerNorm(latent_dim, elementwise_affine=False)

    def forward(
        self, x: Float[Tensor, "b n width"], layout: FrameLayout, past: KeyValues | None = None
    ) -> tuple[Float[Tensor, "b n d"], KeyValues]:
        """Latents, and what the attention saw."""
        y = self.norm(x)
        attended, seen = self.attention(y, layout, past)
        return self.latent_norm(self.through(y) + attended), seen


class Encoder(nn.Module):
    """Pixels to latents: patches and tubelets, causal blocks, projection."""

    def __init__(self, config: RepViTokConfig) -> None:
        super().__init__()
        self.config = config
        self.patchify = Patchify(config.patch_size, config.tubelet_frames, config.width)
        self.transformer = CausalTransformer(config.width, config.depth, config.heads, config.mlp_width)
        self.project = LatentProjection(config.width, config.heads, config.latent_dim)
        init_transformer(self, config.depth)

    def forward(
        self,
        video: Float[Tensor, "b 3 T H W"],
        window: int | None,
        *,
        checkpointing: bool = False,
        compiled: bool | None = False,
        kernel: Kernel = "flex",
    ) -> Float[Tensor, "b frames tokens d"]:
        """Latents of a whole clip; the options are those of `RepViTok`."""
        x = self.patchify(video, begins=True)
        grid = (video.shape[3] // self.config.patch_size, video.shape[4] // self.config.patch_size)
        layout = frame_layout(self.config, 0, x, grid, window, compiled, kernel)
        z = whole_clip(self.project, self.transformer(x, layout, checkpointing=checkpointing), layout)
        return rearrange(z, "b (frames tokens) d -> b frames tokens d", tokens=layout.tokens_per_frame)

    def step(
        self, video: Float[Tensor, "b 3 T H W"], window: int | None, state: CodecState | None
    ) -> tuple[Float[Tensor, "b frames tokens d"], CodecState]:
        """Latents of a stream's next frames; `state` is None at its beginning."""
        x = self.patchify(video, begins=state is None)
        grid = (video.shape[3] // self.config.patch_size, video.shape[4] // self.config.patch_size)
        first_frame, layers = (0, None) if state is None else (state.frames, state.layers)
        layout = frame_layout(self.config, first_frame, x, grid, window)
        # the state's last entry is the projection's own attention
        x, kept = self.transformer.step(x, layout, None if layers is None else layers[:-1])
        z, seen = self.project(x, layout, None if layers is None else layers[-1])
        z = rearrange(z, "b (frames tokens) d -> b frames tokens d", tokens=layout.tokens_per_frame)
        return z, CodecState(first_frame + z.shape[1], grid, (*kept, layout.keep(seen)))


class Decoder(nn.Module):
    """Latents to pixels: a linear layer, causal blocks, transposed convolutions."""

    def __init__(self, config: RepViTokConfig) -> None:
        super().__init__()
        self.config = config
        self.expand = nn.Linear(config.latent_dim, config.width)
        self.transformer = CausalTransformer(config.width, config.depth, config.heads, config.mlp_width)
        self.norm = nn.LayerNorm(config.width)
        self.unpatchify = Unpatchify(config.patch_size, config.tubelet_frames, config.width)
        init_transformer(self, config.depth)

    def forward(
        self,
        z: Float[Tensor, "b frames tokens d"],
        grid: tuple[int, int],
        window: int | None,
        *,
        checkpointing: bool = False,
        compiled: bool | None = False,
        kernel: Kernel = "flex",
    ) -> Float[Tensor, "b 3 T H W"]:
        """The frames of a whole clip; the options are those of `RepViTok`."""
        x = self.expand(rearrange(z, "b frames tokens d -> b (frames tokens) d"))
        layout = frame_layout(self.config, 0, x, grid, window, compiled, kernel)
        x = self.transformer(x, layout, checkpointing=checkpointing)
        return self.unpatchify(self.norm(x), grid, begins=True)

    def step(
        self,
        z: Float[Tensor, "b frames tokens d"],
        grid: tuple[int, int],
        window: int | None,
        state: CodecState | None,
    ) -> tuple[Float[Tensor, "b 3 T H W"], CodecState]:
        """The frames of a stream's next latents; `state` is None at its beginning."""
        x = self.expand(rearrange(z, "b frames tokens d -> b (frames tokens) d"))
        first_frame, layers = (0, None) if state is None else (state.frames, state.layers)
        layout = frame_layout(self.config, first_frame, x, grid, window)
        x, kept = self.transformer.step(x, layout, layers)
        video = self.unpatchify(self.norm(x), grid, begins=state is None)
        return video, CodecState(first_frame + z.shape[1], grid, kept)


def frame_layout(
    config: RepViTokConfig,
    first_frame: int,
    x: Float[Tensor, "b n width"],
    grid: tuple[int, int],
    window: int | None,
    compiled: bool | None = False,
    kernel: Kernel = "flex",
) -> FrameLayout:
    """The layout of the tokens `x`, whose first latent frame is number `first_frame` of its clip or stream.

    `compiled` is for whole clips: a stream's frames see cached keys. None compiles on a GPU, unless the clips are so
    short that their attention is one masked call. FlexAttention wants heads of 16 channels, and on a CPU has no
    backward pass.
    """
    tokens = grid[0] * grid[1]
    frames = x.shape[1] // tokens
    rotary = rotary_table(first_frame, frames, grid, config.head_dim, config.rope_base, x.device)
    if compiled is None:
        compiled = x.is_cuda and x.shape[1] > ONE_CALL_KEYS
    if torch.compiler.is_compiling():
        compiled = False
    flexible = frames > 1 and config.head_dim >= 16 and (x.is_cuda or not torch.is_grad_enabled())
    flex = flex_mask(frames, tokens, window, x.device) if compiled and flexible and kernel == "flex" else None
    return FrameLayout(tokens, window, rotary, compiled, flex)
