"""LAPA's quantiser: what each part may see, strict storage, and that it learns motion from pixels."""

from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError
from latent_action.baselines.lapa import LapaConfig, LapaQuantizer, code_usage
from torch.nn import functional as F

SMALL = LapaConfig(size=(16, 24), patch=4, width=32, depth=1, heads=2, code_dim=8)


@pytest.fixture
def lapa() -> LapaQuantizer:
    torch.manual_seed(0)
    return LapaQuantizer(SMALL).eval()


def moving_square(count: int, side: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Frames with a bright square, the same with it 4 pixels to the left, right, up or down, and which of these."""
    step = torch.tensor([[0, -4], [0, 4], [-4, 0], [4, 0]])
    which = torch.randint(4, (count,))
    place = torch.randint(4, 9, (count, 2))
    frames = -torch.ones(2, count, 3, side, side)
    for i in range(count):
        for frame, (row, column) in enumerate((place[i], place[i] + step[which[i]])):
            frames[frame, i, :, row : row + 4, column : column + 4] = 1
    return frames[0], frames[1], which


def test_shapes(lapa):
    x_t, x_next = torch.randn(2, 3, 3, 16, 24)
    codes, index = lapa.latent_actions(x_t, x_next)
    assert codes.shape == (3, 4, 8)
    assert index.shape == (3, 4)
    assert index.max() < 8
    torch.testing.assert_close(codes, lapa.quantize.codebook[index])
    assert lapa.decode(x_t, codes).shape == x_t.shape


def test_the_action_is_a_difference(lapa):
    """Of two equal frames the causal encoder's two outputs differ only by what attention over time adds."""
    x = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(lapa.latent_actions(x, x)[0][0], lapa.latent_actions(x[:1], x[:1])[0][0])
    first = lapa.encode(x[:1], x[:1])
    assert (lapa.encode(x[:1], x[1:]) - first).abs().max() > 1e-3


def test_the_decoder_sees_the_next_frame_through_the_codes_alone(lapa):
    """The loss reaches the patch embedding through the encoder only: x_t's patches are behind a stop-gradient."""
    x_t = torch.randn(2, 3, 16, 24)
    codes = lapa.latent_actions(x_t, torch.randn(2, 3, 16, 24))[0].detach()
    lapa.decode(x_t, codes).sum().backward()
    assert lapa.embed.weight.grad is None
    assert lapa.cross.in_proj_weight.grad.abs().sum() > 0


def test_forward_is_the_pixel_loss(lapa):
    x_t, x_next = torch.randn(2, 3, 3, 16, 24)
    loss, index = lapa(x_t, x_next)
    codes, expected = lapa.latent_actions(x_t, x_next)
    assert (index == expected).all()
    torch.testing.assert_close(loss, (lapa.decode(x_t, codes) - x_next).square().mean())


def test_residual_adds_the_frame(lapa):
    other = LapaQuantizer(replace(SMALL, residual=True)).eval()
    other.load_state_dict(lapa.state_dict())
    x_t, codes = torch.randn(2, 3, 16, 24), torch.randn(2, 4, 8)
    torch.testing.assert_close(other.decode(x_t, codes), lapa.decode(x_t, codes) + x_t)


def test_storage_round_trip(lapa, tmp_path):
    lapa.save_pretrained(tmp_path / "lapa")
    again = LapaQuantizer.from_pretrained(tmp_path / "lapa")
    assert again.config == lapa.config
    assert again.digest() == lapa.digest()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"size": (17, 24)}, "multiples of patch"),
        ({"code_tokens": 3}, "square"),
        ({"heads": 5}, "multiple of heads"),
        ({"codes": 0}, "codes: expected int >= 1"),
        ({"code_tokens": 64}, "too few"),
    ],
)
def test_bad_sizes_are_refused(change, told):
    with pytest.raises(ValueError, match=told):
        replace(SMALL, **change)


def test_bad_frames_are_refused(lapa):
    good = torch.zeros(1, 3, 16, 24)
    for bad in (torch.zeros(1, 3, 16, 16), torch.zeros(0, 3, 16, 24)):
        with pytest.raises(ValueError, match="at least one frame"):
            lapa.encode(bad, bad)
    with pytest.raises((ValueError, TypeCheckError), match="x_next"):
        lapa.encode(good, torch.zeros(1, 3, 24, 16))
    with pytest.raises(ValueError, match="missing fields"):
        LapaConfig.from_dict({"size": [16, 16]})


@pytest.mark.slow
def test_codes_tell_four_motions_apart():
    """Codes learned from pixels alone say which way a square moved, wherever it stood; chance is one in four."""
    torch.manual_seed(0)
    lapa = LapaQuantizer(LapaConfig(size=(16, 16), patch=4, width=32, depth=1, heads=2, code_dim=8, residual=True))
    optimizer = torch.optim.AdamW(lapa.parameters(), lr=3e-3)
    used = torch.zeros(8, dtype=torch.long)
    for step in range(200):
        x_t, x_next, _ = moving_square(32)
        loss, index = lapa(x_t, x_next)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        used += code_usage(index, 8)
        if step % 20 == 19 and step < 100:
            lapa.quantize.replace_unused(used)
            used.zero_()
    lapa.eval()
    with torch.no_grad():
        (x_t, x_next, which), (y_t, y_next, other) = moving_square(512), moving_square(512)
        assert lapa(y_t, y_next)[0] < 0.5 * F.mse_loss(y_t, y_next)
        known, asked = (
            F.one_hot(lapa.latent_actions(*x)[1], 8).flatten(1).float() for x in ((x_t, x_next), (y_t, y_next))
        )
    votes = torch.stack([known[which == motion].mean(dim=0) for motion in range(4)]).clamp(min=1e-3).log()
    assert ((asked @ votes.T).argmax(dim=1) == other).float().mean() > 0.6
