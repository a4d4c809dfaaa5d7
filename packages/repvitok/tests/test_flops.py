"""Operations counted from the config are those that torch counts while the model runs."""

from __future__ import annotations

import pytest
import torch
from repvitok import RepViTok, RepViTokConfig
from repvitok.model import decode_flops, encode_flops
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize("window", [None, 2])
@torch.no_grad()
def test_they_are_what_torch_counts(window):
    config = RepViTokConfig(width=48, depth=3, heads=4, latent_dim=10, mlp_ratio=3.0, window=window)
    tok, video = RepViTok(config), torch.zeros(1, 3, 13, 176, 96)  # 66 tokens a frame: one call per frame
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as encoding:
        z = tok.encode(video)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as decoding:
        tok.decode(z, (176, 96))
    assert encode_flops(config, 13, (176, 96)) == encoding.get_total_flops()
    assert decode_flops(config, 13, (176, 96)) == decoding.get_total_flops()


def test_a_17_frame_clip_at_the_papers_size_by_hand():
    """1,280 tokens; 12 layers of 12 * 768^2 weights; 15 of 25 pairs of frames; patches, projection."""
    layers = 12 * (1280 * 12 * 768**2 + 2 * 15 * 256**2 * 768)
    patches = 256 * 768 * (768 + 4 * 3072)
    projection = 3 * 1280 * 768**2 + 2 * 15 * 256**2 * 768 + 2 * 1280 * 768 * 96
    assert encode_flops(RepViTokConfig(), 17, (256, 256)) == 2 * (layers + patches + projection)
