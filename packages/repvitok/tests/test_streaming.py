"""Streams: equal to the whole clip however it is cut, with state that can be kept, put back and counted."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from repvitok import RepViTok, StreamState, TokenizerStream
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

MakeVideo = Callable[..., Tensor]
SIZE = (8, 12)

cuts = st.lists(st.integers(1, 3), min_size=1, max_size=5)  # latent frames per call
windows = st.one_of(st.none(), st.integers(1, 4))


def encode_in_pieces(stream: TokenizerStream, video: Tensor, pieces: list[int]) -> Tensor:
    """Encode `pieces` latent frames at a time; the first piece holds the first frame."""
    parts, start = [], 0
    for piece in pieces:
        stop = start + 4 * piece - (3 if start == 0 else 0)
        parts.append(stream.encode(video[:, :, start:stop]))
        start = stop
    return torch.cat(parts, dim=1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=cuts, window=windows)
def test_a_stream_encodes_as_the_whole_clip(
    tok: RepViTok, make_video: MakeVideo, pieces: list[int], window: int | None
) -> None:
    video = make_video(4 * sum(pieces) - 3)
    streamed = encode_in_pieces(tok.stream(2, window), video, pieces)
    torch.testing.assert_close(streamed, tok.encode(video, window), rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=cuts, window=windows)
def test_a_stream_decodes_as_the_whole_clip(
    tok: RepViTok, make_video: MakeVideo, pieces: list[int], window: int | None
) -> None:
    z = tok.encode(make_video(4 * sum(pieces) - 3))
    stream = tok.stream(2, window)
    streamed = torch.cat([stream.decode(part, SIZE) for part in z.split(pieces, dim=1)], dim=2)
    torch.testing.assert_close(streamed, tok.decode(z, SIZE, window), rtol=0, atol=1e-5)


def test_frames_of_many_tokens_stream_too(tok: RepViTok, make_video: MakeVideo) -> None:
    """64 tokens per frame: the whole clip takes the attention's path of one call per frame."""
    video = make_video(21, (32, 32), batch=1)
    streamed = encode_in_pieces(tok.stream(window=2), video, [1, 2, 3])
    torch.testing.assert_close(streamed, tok.encode(video, 2), rtol=0, atol=1e-5)


def test_the_config_gives_the_window(tok: RepViTok) -> None:
    assert tok.stream().window is None
    assert tok.stream(window=tok.config.episode_window).window == 3


def test_later_frames_change_no_latent_of_a_stream(tok: RepViTok, make_video: MakeVideo) -> None:
    video = make_video(9)
    other = video.clone()
    other[:, :, 5:] = -other[:, :, 5:]
    streams = tok.stream(2), tok.stream(2)
    first, second = (encode_in_pieces(s, v, [1, 1, 1]) for s, v in zip(streams, (video, other), strict=True))
    assert torch.equal(first[:, :2], second[:, :2])
    assert not torch.equal(first[:, 2], second[:, 2])


def test_memory_is_bounded_by_the_window(tok: RepViTok, make_video: MakeVideo) -> None:
    stream = tok.stream(2, window=3)
    lengths = []
    stream.encode(make_video(1))
    for seed in range(6):
        stream.encode(make_video(4, seed=seed))
        assert stream.state.encoder is not None
        lengths.append({layer.keys.shape[2] // 6 for layer in stream.state.encoder.layers})
    assert lengths[1:] == [{2}] * 5
    assert stream.state.encoder.frames == 7
    storages = [layer.keys.untyped_storage().nbytes() for layer in stream.state.encoder.layers]
    assert storages == [layer.keys.numel() * 4 for layer in stream.state.encoder.layers]


@torch.no_grad()
def test_work_per_latent_frame_is_bounded_by_the_window(tok: RepViTok, make_video: MakeVideo) -> None:
    """Operations grow until the window is full and then stay what they are; without one they go on growing."""

    def operations(window: int | None) -> list[tuple[int, int]]:
        stream, counted = tok.stream(2, window), []
        for frame in range(8):
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as encoding:
                latents = stream.encode(make_video(4 if frame else 1, (32, 40)))
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as decoding:
                stream.decode(latents)
            counted.append((encoding.get_total_flops(), decoding.get_total_flops()))
        return counted

    bounded, unbounded = operations(3), operations(None)
    assert len(set(bounded[2:])) == 1
    assert bounded[1] < bounded[2]
    assert all(now < later for now, later in pairwise(unbounded[1:]))


def test_a_stream_runs_in_half_precision(tok: RepViTok, make_video: MakeVideo) -> None:
    video = make_video(9)
    expected = tok.encode(video, 2)
    stream = tok.to(torch.bfloat16).stream(2, 2)
    latents = encode_in_pieces(stream, video.bfloat16(), [1, 1, 1])
    frames = stream.decode(latents)
    assert latents.dtype == frames.dtype == torch.bfloat16
    torch.testing.assert_close(latents.float(), expected, rtol=0, atol=0.15)


def test_a_kept_state_rewinds_the_stream(tok: RepViTok, make_video: MakeVideo) -> None:
    stream = tok.stream(2, window=2)
    stream.encode(make_video(5))
    kept = stream.state
    once = stream.encode(make_video(4, seed=1))
    stream.encode(make_video(4, seed=2))
    stream.state = kept
    assert torch.equal(stream.encode(make_video(4, seed=1)), once)


def test_reset_begins_a_new_clip(tok: RepViTok, make_video: MakeVideo) -> None:
    stream = tok.stream(2)
    first = stream.encode(make_video(5))
    stream.decode(first)
    stream.reset()
    assert stream.state == StreamState()
    assert torch.equal(stream.encode(make_video(5)), first)


def test_a_stream_holds_no_graph(tok: RepViTok, make_video: MakeVideo) -> None:
    stream = tok.stream(2)
    assert not stream.encode(make_video(1)).requires_grad
    assert stream.state.encoder is not None
    assert not any(layer.keys.requires_grad for layer in stream.state.encoder.layers)


def test_a_stream_refuses_what_does_not_continue_it(tok: RepViTok, make_video: MakeVideo) -> None:
    stream = tok.stream(2)
    with pytest.raises(ValueError, match=r"1 \+ 4 n frames"):
        stream.encode(make_video(4))
    with pytest.raises(ValueError, match=r"decode needs size=\(H, W\)"):
        stream.decode(torch.zeros(2, 1, 6, 6))
    with pytest.raises(ValueError, match="this stream has batch size 2, got 3"):
        stream.encode(make_video(1, batch=3))
    stream.encode(make_video(1))
    with pytest.raises(ValueError, match="a multiple of 4 frames at a time, got 5"):
        stream.encode(make_video(5))
    with pytest.raises(ValueError, match="a multiple of 4 frames at a time, got 0"):
        stream.encode(make_video(0))
    with pytest.raises(ValueError, match="began with frames of 8x12, got 12x12"):
        stream.encode(make_video(4, (12, 12)))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        tok.stream(0)
    with pytest.raises(ValueError, match="window must be at least 1"):
        tok.stream(window=0)


def test_a_refused_call_leaves_the_stream_as_it_was(tok: RepViTok, make_video: MakeVideo) -> None:
    stream, video = tok.stream(2), make_video(9)
    stream.encode(video[:, :, :5])
    with pytest.raises(ValueError, match="multiple of 4"):
        stream.encode(video[:, :, :3])
    torch.testing.assert_close(stream.encode(video[:, :, 5:]), tok.encode(video)[:, 2:], rtol=0, atol=1e-5)
