"""One layer of the world action model: two experts that meet in self-attention.

The video expert works at width h_v, the action expert (action and state tokens, the "side" stream) at h_a. Both are
diffusion-transformer layers: adaptive layer norm from the noise level of each token, self-attention, cross-attention
to the instruction, feed-forward. Only self-attention is common to both (RepWAM Sec. 3.3, docs/decisions/000, entry 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from repvitok.nn.rope import Rotary
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn.functional import layer_norm, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from repwam_core.model.config import Recompute, WAMConfig
from repwam_core.model.masks import Attend
from repwam_core.model.sequence import Run

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


TextKeysValues = tuple[Float[Tensor, "b documents heads s c"], Float[Tensor, "b documents heads s c"]]


@dataclass(frozen=True, eq=False)
class TextContext:
    """The embedded instructions, as one expert reads them.

    Attributes:
        tokens: for each document a learned null token, then the instruction's tokens.
        mask: which of them are attended; the null token always is.
        keys_values: of each layer, where they were computed once for many passes; else empty.
    """

    tokens: Float[Tensor, "b documents s width"]
    mask: Bool[Tensor, "b documents s"]
    keys_values: Sequence[TextKeysValues] = ()


@dataclass(frozen=True, eq=False)
class StreamContext:
    """What a layer needs to know about one stream besides its tokens.

    Attributes:
        modulation: six vectors per group of tokens of one noise level; n is a multiple of the number of groups.
        text: the instructions.
        documents: the ranges of tokens of one document, and which it is; they cover the stream in order.
    """

    modulation: Float[Tensor, "b groups 6 width"]
    text: TextContext
    documents: Sequence[tuple[Run, int]]


@dataclass(frozen=True, eq=False)
class LayerContext:
    """What all layers share in one pass: both streams' contexts, where the tokens stand, the attention."""

    video: StreamContext
    side: StreamContext
    turn: Turn
    attend: Attend


@dataclass(frozen=True, eq=False)
class Kept:
    """The tokens that leave the last layer: of the others only keys and values matter there.

    Attributes:
        runs: ranges of tokens of both streams, video first.
        video_runs, side_runs: the same of each stream.
        video, side: the contexts of those tokens alone.
    """

    runs: list[Run]
    video_runs: list[Run]
    side_runs: list[Run]
    video: StreamContext
    side: StreamContext


def take(x: Float[Tensor, "b n width"], ranges: Sequence[Run]) -> Float[Tensor, "b m width"]:
    """The tokens in `ranges`; a view if there is only one."""
    parts = [x[:, start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) if parts else x[:, :0]


def normalise(x: Stream) -> Stream:
    """Layer norm over the channels without learned scale and shift."""
    return layer_norm(x, x.shape[-1:], eps=EPSILON)


def modulate(x: Stream, shift: Float[Tensor, "b groups width"], scale: Float[Tensor, "b groups width"]) -> Stream:
    """x * (1 + scale) + shift, where each of the groups holds n / groups consecutive tokens."""
    if not x.shape[1]:
        return x
    grouped = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift[:, :, None], grouped, 1 + scale[:, :, None]).flatten(1, 2)


def add_gated(x: Stream, gate: Float[Tensor, "b groups width"], update: Stream) -> Stream:
    """x + gate * update, grouped as in `modulate`."""
    groups = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, groups), gate[:, :, None], update.unflatten(1, groups)).flatten(1, 2)


class Projections(nn.Module):
    """Queries, keys and values out of a stream, with RMS-normalised queries and keys, and the way back.

    Args:
        width: channels of the stream.
        inner: channels over all heads.
        head_dim: channels of a head.
    """

    def __init__(self, width: int, inner: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Linear(width, inner)
        self.key = nn.Linear(width, inner)
        self.value = nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)
        self.query_scale = nn.Parameter(torch.ones(head_dim))
        self.key_scale = nn.Parameter(torch.ones(head_dim))

    def queries(self, x: Stream, turn: Turn | None = None) -> Heads:
        """Normalised queries of a stream, turned to where their tokens stand."""
        return normalised_heads(self.query(x), self.query_scale, turn)

    def keys_values(self, x: Stream, turn: Turn | None = None) -> tuple[Heads, Heads]:
        """Normalised keys, turned as the queries are, and values, of a stream."""
        return normalised_heads(self.key(x), self.key_scale, turn), split_heads(self.value(x), self.head_dim)


class SharedAttention(nn.Module):
    """`attention: shared`: one q, k, v, o for all tokens; the side stream enters and leaves through adapters."""

    def __init__(self, config: WAMConfig) -> None:
        super().__init__()
        self.shared = Projections(config.width, config.width, config.head_dim)
        self.action_enter = nn.Linear(config.action_width, config.width)
        self.action_leave = nn.Linear(config.width, config.action_width)

    def enter(self, video: Tensor, side: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (b, heads, n, c) of all tokens, video first."""
        x = torch.cat([video, self.action_enter(side)], dim=1)
        return self.shared.queries(x, turn), *self.shared.keys_values(x, turn)

    def leave(self, attended: Stream, videos: int) -> tuple[Tensor, Tensor]:
        """The updates of both streams from what their tokens, of which `videos` are video, attended to."""
        video, side = self.shared.out(attended).split([videos, attended.shape[1] - videos], dim=1)
        return video, self.action_leave(side)


class PerModalityAttention(nn.Module):
    """`attention: per_modality`: each stream has its own q, k, v, o; a mixture of transformers."""

    def __init__(self, config: WAMConfig) -> None:
        super().__init__()
        self.video = Projections(config.width, config.width, config.head_dim)
        self.action = Projections(config.action_width, config.width, config.head_dim)

    def enter(self, video: Tensor, side: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (b, heads, n, c) of all tokens, video first."""
        videos, n = video.shape[1], len(turn.along)
        video_turn, side_turn = turn.tokens(0, videos), turn.tokens(videos, n)
        of_video = self.video.queries(video, video_turn), *self.video.keys_values(video, video_turn)
        of_side = self.action.queries(side, side_turn), *self.action.keys_values(side, side_turn)
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(of_video, of_side, strict=True))
        return q, k, v

    def leave(self, attended: Stream, videos: int) -> tuple[Tensor, Tensor]:
        """The updates of both streams from what their tokens, of which `videos` are video, attended to."""
        video, side = attended.split([videos, attended.shape[1] - videos], dim=1)
        return self.video.out(video), self.action.out(side)


class CrossAttention(nn.Module):
    """Attention of a stream to its documents' instructions; padding is never attended."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.projections = Projections(width, width, head_dim)

    def keys_values(self, text: TextContext) -> TextKeysValues:
        """Keys and values of this layer, for every document."""
        documents = text.tokens.shape[1]
        k, v = self.projections.keys_values(text.tokens.flatten(1, 2))
        k = rearrange(k, "b heads (docs s) c -> b docs heads s c", docs=documents)
        return k, rearrange(v, "b heads (docs s) c -> b docs heads s c", docs=documents)

    def forward(self, layer: int, x: Stream, context: StreamContext) -> Stream:
        """The update of the stream."""
        text = context.text
        k, v = text.keys_values[layer] if text.keys_values else self.keys_values(text)
        q, outputs = self.projections.queries(x), []
        for (start, stop), document in context.documents:
            mask = text.mask[:, document, None, None, :]
            part = q[:, :, start:stop]
            outputs.append(scaled_dot_product_attention(part, k[:, document], v[:, document], attn_mask=mask))
        return self.projections.out(join_heads(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)))


class Modulation(NamedTuple):
    """Shift, scale and gate of self-attention, then of the feed-forward, of each group of tokens."""

    shift: Float[Tensor, "b groups width"]
    scale: Float[Tensor, "b groups width"]
    gate: Float[Tensor, "b groups width"]
    ffn_shift: Float[Tensor, "b groups width"]
    ffn_scale: Float[Tensor, "b groups width"]
    ffn_gate: Float[Tensor, "b groups width"]


class ExpertLayer(nn.Module):
    """What one layer holds for one modality alone: modulation table, cross-attention, feed-forward."""

    def __init__(self, width: int, ffn: int, head_dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 6, width))  # in the order of `Modulation`
        self.cross_norm = nn.LayerNorm(width, eps=EPSILON)
        self.cross = CrossAttention(width, head_dim)
        self.ffn_in = nn.Linear(width, ffn)
        self.ffn_out = nn.Linear(ffn, width)

    def modulation(self, context: StreamContext) -> Modulation:
        """This layer's modulation of the stream's groups."""
        return Modulation(*(context.modulation + self.table).unbind(dim=2))

    def before_attention(self, x: Stream, modulation: Modulation) -> Stream:
        """Normalised and modulated tokens for self-attention."""
        return modulate(normalise(x), modulation.shift, modulation.scale)

    def after_attention(
        self, layer: int, x: Stream, update: Stream, modulation: Modulation, context: StreamContext
    ) -> Stream:
        """Self-attention's update added, then cross-attention and feed-forward."""
        if not x.shape[1]:
            return x
        x = add_gated(x, modulation.gate, update)
        scale, shift = self.cross_norm.weight.to(x.dtype), self.cross_norm.bias.to(x.dtype)
        x = x + self.cross(layer, layer_norm(x, x.shape[-1:], scale, shift, EPSILON), context)
        return self.feed_forward(x, modulation)

    def feed_forward(self, x: Stream, modulation: Modulation) -> Stream:
        """The feed-forward network, modulated and gated, added."""
        inner = modulate(normalise(x), modulation.ffn_shift, modulation.ffn_scale)
        return add_gated(x, modulation.ffn_gate, self.ffn_out(nn.functional.gelu(self.ffn_in(inner))))


class WAMLayer(nn.Module):
    """Both experts' layer around one self-attention; `recompute` trades memory of training for time."""

    recompute: Recompute = "none"

    def __init__(self, config: WAMConfig) -> None:
        super().__init__()
        kind = SharedAttention if config.attention == "shared" else PerModalityAttention
        self.attention = kind(config)
        self.video = ExpertLayer(config.width, config.ffn, config.head_dim)
        self.action = ExpertLayer(config.action_width, config.action_ffn, config.head_dim)

    def forward(
        self, layer: int, video: Stream, side: Tensor, context: LayerContext, kept: Kept | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both streams after this layer, or the kept tokens of them.

        Args:
            layer: number of this layer, for `context.attend` and the texts' `keys_values`.
            video: (b, n_video, width).
            side: action and state tokens, (b, n_side, action_width).
            context: the rest.
            kept: what leaves the last layer.
        """
        if self.recompute == "full":
            return _recomputed(self._layer, layer, video, side, context, kept)
        if self.recompute == "offload":
            with save_on_cpu(pin_memory=video.is_cuda):
                return _recomputed(self._layer, layer, video, side, context, kept)
        return self._layer(layer, video, side, context, kept)

    def _layer(
        self, layer: int, video: Stream, side: Tensor, context: LayerContext, kept: Kept | None
    ) -> tuple[Tensor, Tensor]:
        around = _recomputed if self.recompute == "selective" else _called
        modulations = self.video.modulation(context.video), self.action.modulation(context.side)
        q, k, v = around(self._enter, video, side, *modulations, context)
        attended = join_heads(context.attend(layer, q, k, v))
        return around(self._leave, layer, video, side, attended, *modulations, context, kept)

    def _enter(
        self, video: Stream, side: Tensor, of_video: Modulation, of_side: Modulation, context: LayerContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the tokens of both streams, video first."""
        before = self.video.before_attention(video, of_video), self.action.before_attention(side, of_side)
        return self.attention.enter(*before, context.turn)

    def _leave(
        self, layer: int, video: Stream, side: Tensor, attended: Tensor, of_video: Modulation, of_side: Modulation,
        context: LayerContext, kept: Kept | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Both streams after the layer, from what their tokens attended to, at the width of the video expert."""
        video_context, side_context = context.video, context.side
        if kept is not None:
            video, side = take(video, kept.video_runs), take(side, kept.side_runs)
            attended = take(attended, kept.runs)
            video_context, side_context = kept.video, kept.side
            of_video, of_side = self.video.modulation(kept.video), self.action.modulation(kept.side)
        updates = self.attention.leave(attended, video.shape[1])
        return (
            self.video.after_attention(layer, video, updates[0], of_video, video_context),
            self.action.after_attention(layer, side, updates[1], of_side, side_context),
        )


def _called(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's value, computed again for the backward pass; nothing random happens inside."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


class NoiseLevelEmbedding(nn.Module):
    """Embeds noise times and turns them into the modulation that all layers of one expert share.

    The layers add a table of their own, so that one projection width -> 6 width serves the whole depth.
    """

    frequencies = 128

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time_in = nn.Linear(2 * self.frequencies, width)
        self.time_out = nn.Linear(width, width)
        self.project = nn.Linear(width, 6 * width)

    def forward(
        self, times: Float[Tensor, "b levels"]
    ) -> tuple[Float[Tensor, "b levels width"], Float[Tensor, "b levels 6 width"]]:
        """The embedding of each noise time, and its modulation."""
        octaves = torch.arange(self.frequencies, device=times.device, dtype=torch.float32) / self.frequencies
        angles = 1000 * times.float()[..., None] * torch.exp(-math.log(10_000) * octaves)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.time_in.weight.dtype)
        embedding = self.time_out(nn.functional.silu(self.time_in(features)))
        modulation = self.project(nn.functional.silu(embedding))
        return embedding, rearrange(modulation, "b levels (six width) -> b levels six width", six=6)


class TextEmbedding(nn.Module):
    """Maps the text encoder's hidden states to an expert's width, after a learned null token.

    The null token is always attended: an empty instruction is an instruction, not a division by zero.
    """

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.text_in = nn.Linear(text_dim, width)
        self.text_out = nn.Linear(width, width)
        self.null = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, text: Float[Tensor, "b docs s text"], mask: Bool[Tensor, "b docs s"]) -> TextContext:
        """Null token and embedded tokens."""
        tokens = self.text_out(nn.functional.gelu(self.text_in(text)))
        null = self.null.expand(*text.shape[:2], 1, -1)
        attended = torch.cat([mask.new_ones(*mask.shape[:2], 1), mask], dim=2)
        return TextContext(torch.cat([null, tokens.to(null.dtype)], dim=2), attended)


class OutputHead(nn.Module):
    """The last norm, modulated by the noise level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 2, width))

    def forward(self, x: Stream, embedding: Float[Tensor, "b groups width"]) -> Stream:
        """Normalised tokens, ready for the linear layer that gives velocities."""
        shift, scale = (embedding[:, :, None] + self.table).unbind(dim=2)
        return modulate(normalise(x), shift, scale)
