"""Floating-point operations of RepViTok, counted from its config: the yardstick of throughput and scaling."""

from __future__ import annotations

from repvitok.config import RepViTokConfig
from repvitok.interface import num_latent_frames, token_grid
from repvitok.nn.attention import visible_frames

_CHANNELS = 3


def encode_flops(config: RepViTokConfig, frames: int, size: tuple[int, int]) -> int:
    """Operations of `encode` on one clip of `frames` x `size`: two per multiplication of a matrix product.

    Norms, rotations and softmax are left out (under 2 % at the paper's size). A training step costs about three times
    the sum of both directions, four with recomputed activations.

    Raises:
        ValueError: the clip does not fit the config.
    """
    latent_frames, tokens, pairs = _tokens_and_pairs(config, frames, size)
    width, n = config.width, latent_frames * tokens
    attention = 4 * n * width * width + 2 * pairs * width
    projection = 3 * n * width * width + 2 * pairs * width + 2 * n * width * config.latent_dim
    blocks = config.depth * (attention + 2 * n * width * config.mlp_width)
    return 2 * (_patch_products(config, latent_frames, tokens) + blocks + projection)


def decode_flops(config: RepViTokConfig, frames: int, size: tuple[int, int]) -> int:
    """Operations of `decode` to one clip of `frames` x `size`; see `encode_flops`."""
    latent_frames, tokens, pairs = _tokens_and_pairs(config, frames, size)
    width, n = config.width, latent_frames * tokens
    attention = 4 * n * width * width + 2 * pairs * width
    blocks = config.depth * (attention + 2 * n * width * config.mlp_width)
    return 2 * (n * config.latent_dim * width + blocks + _patch_products(config, latent_frames, tokens))


def _tokens_and_pairs(config: RepViTokConfig, frames: int, size: tuple[int, int]) -> tuple[int, int, int]:
    """Latent frames, tokens in each, and pairs of a query and a key it sees."""
    latent_frames = num_latent_frames(frames, config.tubelet_frames)
    rows, columns = token_grid(*size, config.patch_size)
    seen = sum(len(visible_frames(frame, config.window)) for frame in range(latent_frames))
    return latent_frames, rows * columns, seen * (rows * columns) ** 2


def _patch_products(config: RepViTokConfig, latent_frames: int, tokens: int) -> int:
    """Multiplications between pixels and tokens."""
    pixels = _CHANNELS * config.patch_size**2
    return tokens * config.width * (pixels + (latent_frames - 1) * pixels * config.tubelet_frames)
