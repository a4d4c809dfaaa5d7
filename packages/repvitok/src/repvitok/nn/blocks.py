"""Pre-norm transformer blocks over latent frames, with keys and values that a stream can carry along.

LayerNorm before attention and MLP (GELU), and layer-normalised queries and keys (as in ViT-22B: the attention
logits stay bounded, so that Muon's large steps and bf16 are safe; on a CPU the fused LayerNorm costs half of
an RMSNorm). No biases in attention.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, no_type_check

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import layer_norm
from torch.utils.checkpoint import checkpoint

from repvitok.nn.attention import block_causal_attention
from repvitok.nn.rope import Rotary, rotate

GRAPHS = 64
"""Most kinds of layers, sizes of clip and window, with or without gradients, that may be compiled in one process."""


class KeyValues(NamedTuple):
    """One attention layer's keys (already rotated) and values, oldest token first."""

    keys: Float[Tensor, "b heads m c"]
    values: Float[Tensor, "b heads m c"]

    def last(self, tokens: int) -> KeyValues:
        """A compact copy of the last `tokens` tokens (all of them where there are fewer)."""
        kept = min(tokens, self.keys.shape[-2])
        start = self.keys.shape[-2] - kept
        return KeyValues(self.keys[:, :, start:].clone(), self.values[:, :, start:].clone())


@dataclass(frozen=True)
class FrameLayout:
    """How a flat token sequence is cut into latent frames, and who sees whom.

    Attributes:
        tokens_per_frame: tokens of one latent frame.
        window: latent frames a token sees, its own included; None is the whole prefix.
        rotary: the tokens' rotary positions.
        compiled: whether `whole_clip` compiles.
        flex: the mask of FlexAttention, where that computes the attention of compiled blocks.
    """

    tokens_per_frame: int
    window: int | None
    rotary: Rotary
    compiled: bool = False
    flex: BlockMask | None = None

    def keep(self, seen: KeyValues) -> KeyValues:
        """What later frames will still see of `seen`: the last window - 1 frames, or everything."""
        if self.window is None:
            return seen
        return seen.last((self.window - 1) * self.tokens_per_frame)


class Attention(nn.Module):
    """Multi-head block-causal self-attention with rotary positions and normalised queries and keys."""

    def __init__(self, width: int, heads: int, out_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.qk_gain = nn.Parameter(torch.ones(2, width // heads))
        self.out = nn.Linear(width, out_width, bias=False)

    def forward(
        self, x: Float[Tensor, "b n width"], layout: FrameLayout, past: KeyValues | None = None
    ) -> tuple[Float[Tensor, "b n out"], KeyValues]:
        """Attend, over `past` too where a stream carries it; returns the result and all keys and values seen."""
        q, k, v = (self._fused_heads if torch.compiler.is_compiling() else self._heads)(self.qkv(x), layout.rotary)
        if past is not None:
            k, v = torch.cat([past.keys, k], dim=-2), torch.cat([past.values, v], dim=-2)
        if layout.flex is not None and torch.compiler.is_compiling():
            own = v if v.is_cuda else v.clone()  # torch's kernel for CPUs overlooks where a slice begins
            seen = flex_attention(q, k, own, block_mask=layout.flex)
        else:
            seen = block_causal_attention(q, k, v, layout.tokens_per_frame, layout.window)
        return self.out(seen.transpose(1, 2).flatten(2)), KeyValues(k, v)

    def _heads(self, qkv: Float[Tensor, "b n three_width"], rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised and turned queries and keys, and values, (b, heads, n, c) each."""
        qkv = rearrange(qkv, "b n (three h c) -> three b h n c", three=3, h=self.heads)
        gain = rearrange(self.qk_gain, "two c -> two 1 1 1 c")
        q, k = rotate(layer_norm(qkv[:2], gain.shape[-1:]) * gain, rotary).to(qkv.dtype)
        return q, k, qkv[2]

    @no_type_check
    def _fused_heads(self, qkv: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """The same for a compiler, which makes one kernel of it: x cos + (halves of x swapped) (-sin, sin).

        In memory heads stay beside each other, so that nothing is transposed before the kernel or after attention.
        """
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)  # b n h c
        cos, sin = (table.repeat(1, 2)[:, None] for table in rotary)
        half = v.shape[-1] // 2
        sin = torch.where(torch.arange(2 * half, device=v.device) < half, -sin, sin)
        turned = []
        for part, gain in zip((q, k), self.qk_gain, strict=True):
            x = layer_norm(part, gain.shape) * gain
            turned.append((x * cos + x.roll(half, -1) * sin).to(v.dtype))
        q, k, v = (part.transpose(1, 2) for part in (*turned, v))
        return q, k, v


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_width), nn.GELU(), nn.Linear(mlp_width, width))

    def forward(
        self, x: Float[Tensor, "b n width"], layout: FrameLayout, past: KeyValues | None = None
    ) -> tuple[Float[Tensor, "b n width"], KeyValues]:
        """One block; returns the tokens and what its attention saw."""
        attended, seen = self.attention(self.attention_norm(x), layout, past)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), seen


class CausalTransformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, depth: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width) for _ in range(depth))

    def forward(
        self, x: Float[Tensor, "b n width"], layout: FrameLayout, *, checkpointing: bool = False
    ) -> Float[Tensor, "b n width"]:
        """The whole clip at once; with `checkpointing`, blocks recompute their activations in the backward pass."""
        for block in self.blocks:
            if checkpointing:
                x = checkpoint(whole_clip, block, x, layout, use_reentrant=False)
            else:
                x = whole_clip(block, x, layout)
        return x

    def step(
        self, x: Float[Tensor, "b n width"], layout: FrameLayout, past: tuple[KeyValues, ...] | None
    ) -> tuple[Float[Tensor, "b n width"], tuple[KeyValues, ...]]:
        """The next frames of a stream: `past` holds each block's earlier keys and values (None at its beginning)."""
        kept = []
        for index, block in enumerate(self.blocks):
            x, seen = block(x, layout, None if past is None else past[index])
            kept.append(layout.keep(seen))
        return x, tuple(kept)


@no_type_check  # what it calls may be traced
def whole_clip(layer: nn.Module, x: Tensor, layout: FrameLayout) -> Tensor:
    """A layer's tokens (b, n, out) for the tokens x (b, n, width) of whole clips, compiled where the layout says so.

    All layers of a kind share a graph for each number of tokens, and so do all batches of two clips and more.
    """
    if not layout.compiled or torch.compiler.is_compiling():
        return _tokens_only(layer, x, layout)
    torch._dynamo.maybe_mark_dynamic(x, 0)
    # DistributedDataParallel's own splitting of graphs knows nothing of FlexAttention, and a block is no bucket
    with torch._dynamo.config.patch(recompile_limit=GRAPHS, optimize_ddp=False):
        return _compiled_tokens()(layer, x, layout)


@no_type_check
def _tokens_only(layer: nn.Module, x: Tensor, layout: FrameLayout) -> Tensor:
    return layer(x, layout)[0]


@functools.cache
def _compiled_tokens() -> Callable[..., Any]:
    return torch.compile(_tokens_only, fullgraph=True, dynamic=False)


@torch.no_grad()
def init_transformer(module: nn.Module, depth: int) -> None:
    """Give every parameter below `module` its initial value, in place.

    Weights are drawn from a normal distribution of standard deviation 0.02, truncated at twice that; in the layers that
    write into the residual stream it is 0.02 / sqrt(2 * depth), so that depth does not raise the stream's scale.
    Biases are zero, gains one. Compared with a standard deviation of 1 / sqrt(inputs), whose noisy first pictures have
    to be unlearned, the width-128 model reached 20.9 instead of 17.2 dB after 200 steps of AdamW (simulator frames, 64
    pixels).
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            std = 0.02 / math.sqrt(2 * depth) if name.endswith(("attention.out", "mlp.2")) else 0.02
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            layer.reset_parameters()
        elif isinstance(layer, Attention):
            nn.init.ones_(layer.qk_gain)
