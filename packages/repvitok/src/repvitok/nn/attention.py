"""The tokenizer's one attention operation: full within a latent frame, causal across frames.

A dense mask computes every query against every key and throws half away. Here each frame's queries meet only
the keys they may see (their own frame and the frames before it, up to a window) in plain unmasked attention,
so that causality saves the work it forbids. Only where a whole clip is so short that calls cost more than
products is one masked call made instead. The same function serves whole clips and streams, whose keys begin
with cached frames. Compiled blocks compute the same with one FlexAttention kernel under `flex_mask`, which skips
hidden blocks on a GPU (docs/decisions/010, 068).
"""

from __future__ import annotations

import functools
from typing import Literal, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention

Kernel = Literal["frames", "flex"]
"""How compiled blocks attend: a call per frame on its visible keys, or one FlexAttention call with a block mask."""

# Up to this many keys one masked call beats a call per frame: forward and backward of 3 frames of 16 tokens, 4 heads,
# batch 4 take 1.1 ms against 1.7 ms on one CPU core; at 192 keys they are even, at 1,280 the mask costs 1.7x.
ONE_CALL_KEYS = 128


def visible_frames(frame: int, window: int | None) -> range:
    """The latent frames that a token of `frame` may attend to: its own and those before it, `window` in all."""
    return range(0 if window is None else max(0, frame + 1 - window), frame + 1)


def block_causal_attention(
    q: Float[Tensor, "b heads n c"],
    k: Float[Tensor, "b heads m c"],
    v: Float[Tensor, "b heads m c"],
    tokens_per_frame: int,
    window: int | None = None,
) -> Float[Tensor, "b heads n c"]:
    """Attention of every frame's tokens over the frames that `visible_frames` gives them.

    Args:
        q: queries of the last n / tokens_per_frame frames.
        k: keys of all m / tokens_per_frame frames: those of the queries, after any cached earlier ones.
        v: values, as the keys.
        tokens_per_frame: tokens of one latent frame.
        window: frames a token sees, its own included; None is the whole prefix.
    """
    # keys begin with the cached frames: query frame f is number past + f among them
    frames, past = q.shape[-2] // tokens_per_frame, (k.shape[-2] - q.shape[-2]) // tokens_per_frame
    if frames > 1 and k.shape[-2] <= ONE_CALL_KEYS:
        mask = dense_mask(frames, tokens_per_frame, window, past, q.device)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)
    outputs = []
    for frame in range(frames):
        seen = visible_frames(past + frame, window)
        keys = slice(seen.start * tokens_per_frame, seen.stop * tokens_per_frame)
        queries = slice(frame * tokens_per_frame, (frame + 1) * tokens_per_frame)
        outputs.append(scaled_dot_product_attention(q[:, :, queries], k[:, :, keys], v[:, :, keys]))
    return outputs[0] if frames == 1 else torch.cat(outputs, dim=-2)


def dense_mask(
    frames: int,
    tokens_per_frame: int,
    window: int | None = None,
    past: int = 0,
    device: torch.device | None = None,
) -> Bool[Tensor, "n m"]:
    """The same visibility as one boolean matrix, token by token (True: may attend).

    Args:
        frames: frames of queries; n = frames * tokens_per_frame.
        tokens_per_frame: tokens of one latent frame.
        window: as for `block_causal_attention`.
        past: cached frames before them; m = (past + frames) * tokens_per_frame.
        device: where to build it.
    """
    # frame numbers of every token, (n, 1) and (1, m): their difference is how old a key is
    query = torch.arange(past, past + frames, device=device).repeat_interleave(tokens_per_frame)[:, None]
    key = torch.arange(past + frames, device=device).repeat_interleave(tokens_per_frame)[None, :]
    return _visible(query - key, window)


@functools.lru_cache(maxsize=64)
def flex_mask(frames: int, tokens_per_frame: int, window: int | None, device: torch.device) -> BlockMask:
    """The same visibility for FlexAttention, over whole clips: built once for all layers, passes and batches."""
    tokens = frames * tokens_per_frame
    with torch.inference_mode(mode=False):  # a mask that validation made is one that training can use
        return create_block_mask(
            lambda _batch, _head, query, key: _visible(query // tokens_per_frame - key // tokens_per_frame, window),
            None,
            None,
            tokens,
            tokens,
            device=device,
        )


@no_type_check  # FlexAttention traces it, and checks of types at run time cannot be traced
def _visible(age: Int[Tensor, "*shape"], window: int | None) -> Bool[Tensor, "*shape"]:
    """Whether a key that lies `age` latent frames before its query may be attended to."""
    return age >= 0 if window is None else (age >= 0) & (age < window)
