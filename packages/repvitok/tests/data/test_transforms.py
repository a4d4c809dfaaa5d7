"""Pixels keep their meaning between uint8 frames and the floats models take, one frame like many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from repvitok.data.transforms import prepare_frames, resize_frames, to_frames, to_uint8, to_unit


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_every_byte_survives_the_way_to_unit_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(values)
    assert (unit[0], unit[255]) == (-1.0, 1.0)
    assert torch.equal(to_uint8(unit), values)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(8, 80),
    width=st.integers(8, 80),
    size=st.tuples(st.integers(4, 48), st.integers(4, 48)),
    count=st.integers(1, 5),
)
def test_each_frame_is_resized_on_its_own(height, width, size, count):
    frames = noise(count, height, width, 3, seed=height)
    together = resize_frames(frames, size)
    assert together.shape == (count, *size, 3)
    alone = np.concatenate([resize_frames(frame[None], size) for frame in frames])
    np.testing.assert_array_equal(together, alone)
    reordered = resize_frames(frames[::-1], size)
    np.testing.assert_array_equal(reordered, together[::-1])


@pytest.mark.parametrize("size", [(24, 32), (64, 64), (100, 20)])
def test_agrees_with_pillow(size):
    frames = noise(3, 48, 64, 3)
    expected = [Image.fromarray(frame).resize(size[::-1], Image.Resampling.BILINEAR) for frame in frames]
    assert np.abs(resize_frames(frames, size).astype(int) - np.stack(expected)).max() <= 1


def test_flat_frames_stay_flat_and_right_sized_ones_untouched():
    flat = np.full((2, 40, 60, 3), 77, dtype=np.uint8)
    assert (resize_frames(flat, (16, 16)) == 77).all()
    frames = noise(2, 16, 16, 3)
    np.testing.assert_array_equal(resize_frames(frames, (16, 16)), frames)
    assert resize_frames(frames[:0], (8, 8)).shape == (0, 8, 8, 3)


def test_prepared_frames_are_resized_bytes_in_unit_range():
    frames = noise(5, 30, 40, 3)
    frames.flags.writeable = False  # as policy servers hand them over
    video = prepare_frames(frames, (16, 32))
    assert (video.shape, video.dtype, video.is_contiguous()) == ((3, 5, 16, 32), torch.float32, True)
    expected = resize_frames(frames, (16, 32)).astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(video.permute(1, 2, 3, 0).numpy(), expected, atol=1e-6)
    np.testing.assert_array_equal(to_frames(video), resize_frames(frames, (16, 32)))
    np.testing.assert_array_equal(to_frames(prepare_frames(frames, (30, 40))), frames)


def test_sizes_that_are_none_are_refused():
    with pytest.raises(ValueError, match="size must be"):
        resize_frames(noise(1, 8, 8, 3), (0, 8))
