"""Eq. (4): the forward pair and the reversed pair, by hand."""

import pytest
import torch
from latent_action.model import copy_loss, transition_losses


@pytest.mark.parametrize("antisymmetric", [True, False])
def test_losses_are_eq_4_by_hand(lat, antisymmetric):
    lat.inverse_dynamics.antisymmetric = antisymmetric
    z_t, z_next = torch.randn(5, 16, 8), torch.randn(5, 16, 8)
    losses = transition_losses(lat, z_t, z_next)

    action = lat.inverse_dynamics(z_t, z_next, (1, 4, 4))
    matrix, residual = lat.transition(z_t, action)
    torch.testing.assert_close(losses.forward, (matrix @ z_t + residual - z_next).square().mean())
    torch.testing.assert_close(losses.latent_actions, action)

    reversed_action = lat.inverse_dynamics(z_next, z_t, (1, 4, 4))
    matrix, residual = lat.transition(z_next, reversed_action)
    torch.testing.assert_close(losses.consistency, (matrix @ z_next + residual - z_t).square().mean())
    torch.testing.assert_close(losses.reversed_actions, reversed_action)


def test_swapping_the_pair_swaps_the_losses(lat):
    z_t, z_next = torch.randn(5, 16, 8), torch.randn(5, 16, 8)
    one, other = transition_losses(lat, z_t, z_next), transition_losses(lat, z_next, z_t)
    torch.testing.assert_close(one.forward, other.consistency)
    torch.testing.assert_close(one.consistency, other.forward)


def test_losses_are_means_over_elements(lat):
    """Doubling the batch, or copying it, changes neither loss."""
    z_t, z_next = torch.randn(3, 16, 8), torch.randn(3, 16, 8)
    one = transition_losses(lat, z_t, z_next)
    two = transition_losses(lat, z_t.repeat(2, 1, 1), z_next.repeat(2, 1, 1))
    torch.testing.assert_close(one.forward, two.forward)
    torch.testing.assert_close(one.consistency, two.consistency)


def test_copy_loss():
    assert copy_loss(torch.zeros(2, 4, 3), torch.full((2, 4, 3), 2.0)) == 4
