"""I3D: the published architecture's sizes and names, "same" padding, and what it needs of a clip."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repvitok.baselines.i3d import I3D, resized_video, same_padded


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 20), kernel=st.integers(1, 7), stride=st.integers(1, 3))
def test_same_padding_gives_one_output_per_stride(size, kernel, stride):
    if kernel < stride:
        return
    x = torch.ones(1, 1, size, size, size)
    padded = same_padded(x, (kernel,) * 3, (stride,) * 3)
    outputs = torch.nn.functional.max_pool3d(padded, kernel, stride)
    assert outputs.shape[2:] == (-(-size // stride),) * 3
    before, after = _zeros_around(padded[0, 0].amax(dim=(1, 2)))
    assert after - before in (0, 1)


def _zeros_around(line):
    ones = line.nonzero().flatten()
    return int(ones[0]), len(line) - 1 - int(ones[-1])


def test_names_and_sizes_are_the_published_files():
    with torch.device("meta"):
        network = I3D()
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert shapes["Conv3d_1a_7x7.conv3d.weight"] == (64, 3, 7, 7, 7)
    assert shapes["Mixed_3b.b1b.conv3d.weight"] == (128, 96, 3, 3, 3)
    assert shapes["Mixed_5c.b3b.bn.running_mean"] == (128,)
    assert shapes["logits.conv3d.weight"] == (400, 1024, 1, 1, 1)
    assert sum(p.numel() for p in network.parameters()) == 12_697_264


def test_short_clips_are_refused():
    with torch.device("meta"), pytest.raises(ValueError, match="9 frames or more, got 8"):
        I3D()(torch.zeros(1, 3, 8, 224, 224))


@pytest.mark.parametrize(("frames", "steps"), [(9, 1), (16, 1), (17, 2)])
def test_logits_are_averaged_over_the_time_steps_left(frames, steps):
    with torch.device("meta"):
        network, seen = I3D(7).eval(), []
        network.logits.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        assert network(torch.zeros(2, 3, frames, 224, 224)).shape == (2, 7)
    assert seen == [(2, 7, steps, 1, 1)]


def test_resizing_keeps_a_plane_a_plane():
    ramp = torch.linspace(-1, 1, 32).expand(1, 3, 2, 16, 32)
    found = resized_video(ramp, 64)
    assert found.shape == (1, 3, 2, 64, 64)
    torch.testing.assert_close(found[..., 2:-2].diff(dim=-1), torch.full((1, 3, 2, 64, 59), 1 / 31))
