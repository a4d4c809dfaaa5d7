"""Channels to attention heads and back: split, RMS norm and rotary turn of queries and keys, join."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from repvitok.nn.rope import Rotary
from torch import Tensor

EPSILON = 1e-6

Stream = Float[Tensor, "b n width"]
Heads = Float[Tensor, "b heads n c"]


class Turn(NamedTuple):
    """A rotary table as two factors per channel: y = x * along + swap(x * across), where swap exchanges the halves."""

    along: Float[Tensor, "n 1 c"]
    across: Float[Tensor, "n 1 c"]

    @classmethod
    def of(cls, rotary: Rotary) -> Turn:
        """The turn (a, b) -> (a cos - b sin, b cos + a sin) of the channel halves a and b."""
        cos, sin = rotary.cos[:, None], rotary.sin[:, None]
        return cls(torch.cat([cos, cos], dim=-1), torch.cat([sin, -sin], dim=-1))

    def tokens(self, start: int, stop: int) -> Turn:
        """The turn of some of the tokens."""
        return Turn(self.along[start:stop], self.across[start:stop])


def split_heads(x: Stream, head_dim: int) -> Heads:
    """Channels to heads, heads before tokens."""
    return rearrange(x, "b n (heads c) -> b heads n c", c=head_dim)


def join_heads(x: Heads) -> Stream:
    """The inverse of `split_heads`."""
    return rearrange(x, "b heads n c -> b n (heads c)")


def normalised_heads(x: Stream, scale: Float[Tensor, " c"], turn: Turn | None = None) -> Heads:
    """Heads divided by their root mean square, times a scale that all heads share, turned to where their token stands.

    Computed in float32 at least; the result has the type of `x`.
    """
    by_head = x.unflatten(-1, (-1, scale.shape[0]))
    y = _NormaliseAndTurn.apply(by_head, scale, *(turn or (None, None)))
    return y.to(x.dtype).transpose(1, 2)


class _NormaliseAndTurn(torch.autograd.Function):
    """y = R (scale * x) / rms(x) over the last axis, where R is the turn; gradients for x and scale.

    Written out because autograd's own chain of rms_norm, products and concatenation reads and writes these tensors
    about three times as often, and on a CPU that is what a training step of a small model waits for.

    With r = (mean x^2 + eps)^(-1/2) and h = R^T g:  dx = r scale h - x r^3 mean(scale x h),  dscale = sum r x h.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, along: Tensor | None, across: Tensor | None) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        r = torch.rsqrt(norm.square() / x.shape[-1] + EPSILON)
        if along is None or across is None:
            y = wide * scale
        else:
            y = _turned(wide, along * scale, across * scale)
        ctx.save_for_backward(x, scale, r, along, across)
        return y.mul_(r)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, scale, r, along, across = ctx.saved_tensors
        h = grads[0] if along is None else _turned(grads[0], along, -across)
        products = x * h
        scale_grad = r.flatten() @ products.flatten(0, -2)
        mean = (products @ scale.to(products.dtype))[..., None] / x.shape[-1]
        x_grad = (h * scale).mul_(r).addcmul_(x, mean * r**3, value=-1)
        return x_grad.to(x.dtype), scale_grad.to(scale.dtype), None, None


def _turned(x: Tensor, along: Tensor, across: Tensor) -> Tensor:
    """x * along + swap(x * across)."""
    y, half = x * along, x.shape[-1] // 2
    y[..., :half].addcmul_(x[..., half:], across[..., half:])
    y[..., half:].addcmul_(x[..., :half], across[..., :half])
    return y
