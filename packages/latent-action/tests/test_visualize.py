"""Pictures: heat where the action acts, arrows the way content moves, drawings of the right size."""

import numpy as np
import pytest
import torch
from latent_action.cli import main
from latent_action.visualize import action_effect_map, draw_transition, side_by_side, transport_arrows
from PIL import Image
from repvitok.data.lerobot.writer import LeRobotWriter


@torch.no_grad()
def test_heat_is_where_decoding_depends_on_the_action(lat):
    z = torch.randn(24, 8)
    heat = action_effect_map(lat, z, torch.tensor([1.0, -1.0, 0.5, 2.0]), (2, 3, 4))
    assert heat.shape == (2, 3, 4)
    assert heat.min() >= 0
    assert heat.max() > 0
    loud = action_effect_map(lat, z, torch.full((4,), 50.0), (2, 3, 4))
    assert loud.max() == pytest.approx(1)


@torch.no_grad()
def test_no_heat_where_nothing_happens(lat):
    z = torch.randn(1, 16, 8)
    nothing = lat.encode(torch.stack([z, z], dim=1))[0, 0]
    assert action_effect_map(lat, z[0], nothing).max() == 0


@torch.no_grad()
def test_arrows_point_the_way_content_moves(lat):
    """Every token gathers from one token to its left, so content moves right by one."""
    head = lat.forward_dynamics.mlp.last
    head.weight.zero_()
    head.bias.zero_()
    head.bias[8 + 1] = -1.0  # the displacement's column, in quarters of a view of four tokens
    head.bias[8 + 2] = 20.0  # sharpness
    arrows = transport_arrows(lat, torch.randn(16, 8), torch.zeros(4))
    assert arrows.shape == (1, 4, 4, 2)
    np.testing.assert_allclose(arrows[0, :, 1:, 0], 0, atol=1e-3)
    np.testing.assert_allclose(arrows[0, :, 1:, 1], 1, atol=1e-3)
    np.testing.assert_allclose(arrows[0, :, 0, 1], 0, atol=1e-3)  # nothing lies left of the first column


def test_drawing():
    image = np.full((64, 128, 3), 100, np.uint8)
    heat = np.zeros((2, 4, 4), np.float32)
    still = np.zeros((2, 4, 4, 2), np.float32)
    calm = draw_transition(image, heat, still)
    assert calm.shape == (256, 512, 3)
    assert calm.dtype == np.uint8
    assert len(np.unique(calm)) == 1
    heat[1] = 1
    warm = draw_transition(image, heat, still)
    assert (warm[128, 400] != calm[128, 400]).any()
    np.testing.assert_array_equal(warm[128, 64], calm[128, 64])
    still[0, 1, 1] = (0, 1)
    assert (draw_transition(image, heat, still) != warm).any()
    written = draw_transition(image, heat, still, "1.5 s") != draw_transition(image, heat, still)
    assert written[224:, :128].any()
    assert not written[:224].any()
    assert not written[:, 128:].any()


def test_bad_drawings_are_refused():
    image, heat, arrows = np.zeros((8, 8, 3), np.uint8), np.zeros((1, 2, 2), np.float32), np.zeros((1, 2, 2, 2))
    arrows = arrows.astype(np.float32)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        draw_transition(image, heat + 2, arrows)
    with pytest.raises(ValueError, match="no transition"):
        side_by_side([], 3)


def test_sheets():
    pictures = [np.full((4, 6, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet = side_by_side(pictures, 2)
    assert sheet.shape == (4 + 4 + 4, 6 + 4 + 6, 3)
    assert [sheet[0, 0, 0], sheet[0, -1, 0], sheet[-1, 0, 0], sheet[-1, -1, 0]] == [10, 20, 30, 255]


def test_visualize_verb_draws_an_episode(fitted_lat, blobs, tmp_path, capsys):
    frames = np.random.default_rng(0).integers(0, 255, (97, 48, 64, 3), dtype=np.uint8)
    writer = LeRobotWriter(
        tmp_path / "data",
        version="v2.1",
        fps=10,
        cameras={"camera": (48, 64)},
        state_names=("s",),
        action_names=("a",),
        robot_type="blob",
    )
    writer.add_episode(
        0,
        frames={"camera": frames},
        state=np.zeros((97, 1), np.float32),
        action=np.zeros((97, 1), np.float32),
        task="move",
    )
    writer.finalize()
    fitted_lat.save_pretrained(tmp_path / "lat")
    out = tmp_path / "pictures" / "episode.png"
    arguments = ["visualize", "--lat", str(tmp_path / "lat"), "--latents", str(blobs), "--out", str(out)]
    assert main([*arguments, "--dataset", str(tmp_path / "data"), "--transitions", "5"]) == 0
    height, width = 48 * 5, 64 * 5
    assert Image.open(out).size == (4 * width + 3 * 4, 2 * height + 4)
    assert main([*arguments, "--dataset", str(tmp_path / "data"), "--episode", "999"]) == 2
    assert "no episode 999" in capsys.readouterr().err
    assert main([*arguments, "--dataset", str(tmp_path)]) == 2
