"""Pictures: heat where the action acts, arrows the way content moves, drawings of the right size."""

import json

import numpy as np
import pytest
import torch
from latent_action.cli import main
from latent_action.visualize import (
    action_effect_map,
    action_effects,
    check_maps,
    draw_transition,
    hand_motion,
    pixel_motion,
    shared_map,
    side_by_side,
    transport_arrows,
    without_shared,
)
from PIL import Image
from repvitok.data.lerobot.metadata import HandProjection
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


def test_visualize_verb_draws_an_episode(fitted_lat, make_blobs, tmp_path, capsys):
    frames = np.random.default_rng(0).integers(0, 255, (97, 48, 64, 3), dtype=np.uint8)
    blobs = make_blobs(tmp_path / "blobs", episodes=1)
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
    told = capsys.readouterr().out
    assert "ours: correlation of the map with pixel motion energy" in told
    assert "(22 transitions of 1 episodes" in told
    (tmp_path / "data/meta/hand_projection.json").write_text("{}")
    assert main([*arguments, "--dataset", str(tmp_path / "data")]) == 2
    assert "hand-projection" in capsys.readouterr().err
    # the blob's place, (row, column), as (x, y, 1): rows of a grid of four are down, columns right
    seen = {"camera": [[0.0, 0.25, 0.0, 0.0], [0.25, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]}
    hand = HandProjection(["row", "column", "row"], seen)
    (tmp_path / "data/meta/hand_projection.json").write_text(json.dumps(hand.to_dict()))
    assert main([*arguments, "--dataset", str(tmp_path / "data")]) == 0
    assert "with the projected hand's motion" in capsys.readouterr().out
    assert main([*arguments, "--dataset", str(tmp_path / "data"), "--episode", "999"]) == 2
    assert "no episode 999" in capsys.readouterr().err
    assert main([*arguments, "--dataset", str(tmp_path)]) == 2


def hands(count: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """How much a hand moves on a grid of 4 x 6 tokens in transitions of 12 episodes, and which each is of."""
    random = np.random.default_rng(0)
    before = random.uniform(0.1, 0.9, size=(count, 1, 2))
    after = before + random.normal(scale=0.1, size=before.shape)
    return hand_motion(before, after, (4, 6)), np.arange(count) // 10


def test_a_map_of_what_all_share_shows_nothing_however_it_correlates():
    """A bias at one place and hands that mostly work there: the map as it is correlates, shuffled or not."""
    random = np.random.default_rng(1)
    before = np.array([0.3, 0.3]) + random.normal(scale=0.05, size=(120, 1, 2))
    motions = hand_motion(before, before + random.normal(scale=0.1, size=before.shape), (4, 6))
    bias = np.exp(-np.square(np.indices((4, 6)) - np.array([1, 1.5])[:, None, None]).sum(0))
    maps = (bias * random.uniform(0.5, 2, size=(120, 1, 1, 1)) + 0.02 * random.uniform(size=(120, 1, 4, 6))).astype(
        np.float32
    )
    check = check_maps(maps, motions, np.arange(120) // 10, "the projected hand's motion")
    assert check is not None
    assert min(check.unsubtracted) > 0.5
    assert abs(check.own[0]) < 0.15
    assert not check.shows_motion
    assert "THIS MAP SHOWS NOTHING" in str(check)


def test_a_map_that_follows_the_hand_is_told_from_its_shuffled_control():
    motions, episodes = hands()
    noise = np.random.default_rng(2).uniform(size=motions.shape)
    check = check_maps(
        (motions + 0.05 * noise + 1).astype(np.float32), motions, episodes, "the projected hand's motion"
    )
    assert check is not None
    assert check.shows_motion
    assert check.own[0] > 0.5
    assert check.shuffled[1] < 0.1 < check.gain[1]
    assert (check.transitions, check.episodes) == (int((motions.std(axis=(1, 2, 3)) > 0).sum()), 12)
    assert "SHOWS NOTHING" not in str(check)
    assert check_maps(motions[:2], motions[:2], episodes[:2], "the projected hand's motion") is None


def test_what_maps_share_does_not_grow_with_a_map():
    bias = np.random.default_rng(0).uniform(0.5, 1, size=(1, 1, 3, 4)).astype(np.float32)
    maps = bias * np.array([1, 2, 7], np.float32)[:, None, None, None]
    np.testing.assert_allclose(without_shared(maps, shared_map(maps)), 0, atol=1e-6)
    assert not shared_map(np.zeros((3, 1, 2, 2), np.float32)).any()


@torch.no_grad()
def test_heat_without_a_shared_map_is_what_it_was(lat):
    z, action = torch.randn(24, 8), torch.tensor([1.0, -1.0, 0.5, 2.0])
    change = action_effects(lat, z[None], action[None], (2, 3, 4))[0]
    plain = action_effect_map(lat, z, action, (2, 3, 4))
    np.testing.assert_array_equal(plain, change / max(change.max(), 0.25))
    assert action_effect_map(lat, z, action, (2, 3, 4), change / change.mean()).max() < 1e-5


def test_a_hand_moves_where_it_is_and_not_where_it_is_not():
    motion = hand_motion(np.array([[[0.125, 0.1]]]), np.array([[[0.125, 0.9]]]), (4, 5))
    assert motion.shape == (1, 1, 4, 5)
    np.testing.assert_allclose(motion[0, 0, 0], 0.8, rtol=1e-3)  # along its whole way in the first row
    assert motion[0, 0, 3].max() < 1e-4
    assert not hand_motion(np.full((1, 1, 2), 0.5), np.full((1, 1, 2), 0.505), (4, 4)).any()
    before = np.zeros((1, 32, 32, 3), np.uint8)
    after = before.copy()
    after[:, :8, 24:] = 255
    energy = pixel_motion(before, after, (4, 4))
    assert energy[0, 0, 3] == pytest.approx(1)
    assert energy.sum() == pytest.approx(1)
