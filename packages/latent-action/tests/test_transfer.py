"""What is borrowed, read again and cycled, by hand on models whose answer is known; strict on synthetic motion."""

import pytest
import torch
from latent_action.transfer import (
    cycle_loss,
    effective_dimensions,
    latent_actions,
    matching_transitions,
    read_again,
    reading_r2,
    transfer_losses,
)
from latent_action.transitions import TransitionTable


def table(frames, motion, episode) -> TransitionTable:
    """Clips of two frames each."""
    count = len(frames) // 2
    return TransitionTable(
        frames, 2 * torch.arange(count), torch.tensor(episode), torch.ones(count, dtype=torch.long), None, motion
    )


def test_the_partner_moves_most_alike_and_is_of_another_group():
    motion = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 0.0], [5.2, 0.0]])
    found = matching_transitions(table(torch.zeros(8, 4, 3), motion, [0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]))
    assert found.tolist() == [2, 2, 1, 1]
    found = matching_transitions(table(torch.zeros(8, 4, 3), motion, [0, 1, 2, 3]), torch.arange(4))
    assert found.tolist() == [1, 0, 3, 2]


def test_borrowing_without_motion_or_from_nobody_is_refused(lat):
    frames = torch.randn(4, 16, 8)
    with pytest.raises(ValueError, match="no robot state"):
        transfer_losses(lat, table(frames, None, [0, 1]))
    with pytest.raises(ValueError, match="one group"):
        transfer_losses(lat, table(frames, torch.zeros(2, 1), [3, 3]))


@torch.no_grad()
def test_borrowed_losses_by_hand(lat):
    """Two episodes, so each transition's only possible lender is the other."""
    frames, motion = torch.randn(4, 16, 8), torch.tensor([[0.0], [1.0]])
    losses = transfer_losses(lat, table(frames, motion, [0, 1]))
    z_t, z_next = frames[::2], frames[1::2]
    action = lat.encode(torch.stack([z_t, z_next], dim=1))[:, 0]

    def error(l):
        return float((lat.decode(z_t, l) - z_next).square().mean())

    assert losses.own == pytest.approx(error(action), rel=1e-5)
    assert losses.paired == losses.shuffled == pytest.approx(error(action.flip(0)), rel=1e-5)
    assert losses.static == pytest.approx(error(lat.encode(torch.stack([z_t, z_t], dim=1))[:, 0]), rel=1e-5)


@torch.no_grad()
def test_reading_and_cycle_are_the_models_own_calls(lat):
    z, other, l = torch.randn(3, 16, 8), torch.randn(3, 16, 8), torch.randn(3, 4)
    acted = lat.decode(z, l)
    torch.testing.assert_close(read_again(lat, z, l), lat.encode(torch.stack([z, acted], dim=1))[:, 0])
    back = lat.encode_both_ways(z, other)[1]
    torch.testing.assert_close(cycle_loss(lat, z, l, back), (lat.decode(acted, back) - z).square().mean())


def test_reading_r2():
    given = torch.randn(1000, 4) * torch.tensor([0.1, 1.0, 10.0, 100.0]) + 3
    assert reading_r2(given, given) == 1
    assert reading_r2(given.mean(dim=0).expand_as(given), given) == pytest.approx(0, abs=1e-5)
    assert reading_r2(given[torch.randperm(1000)], given) == pytest.approx(-1, abs=0.2)
    still = torch.cat([given, torch.zeros(1000, 1)], dim=1)
    assert reading_r2(still, still) == 1
    assert reading_r2(still[:, :4], still[:, 4:].expand(-1, 4)) == 0


def test_effective_dimensions():
    independent = torch.randn(20000, 3) * torch.tensor([1e-3, 1.0, 1e3])
    assert effective_dimensions(independent) == pytest.approx(3, abs=0.02)
    assert effective_dimensions(torch.cat([independent, torch.ones(20000, 1)], dim=1)) == pytest.approx(3, abs=0.02)
    assert effective_dimensions(independent[:, :1].repeat(1, 4)) == pytest.approx(1)
    assert effective_dimensions(torch.ones(10, 4)) == 0


def test_all_transitions_get_their_action(lat, monkeypatch):
    monkeypatch.setattr("latent_action.transfer._BATCH", 3)
    frames = torch.randn(14, 16, 8)
    whole = table(frames, None, list(range(7)))
    with torch.no_grad():
        expected = lat.encode(torch.stack([frames[::2], frames[1::2]], dim=1))[:, 0]
    torch.testing.assert_close(latent_actions(lat, whole), expected)
