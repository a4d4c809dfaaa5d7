"""The two losses of RepWAM Eq. (4)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from latent_action.grid import Grid
from latent_action.model import LatentActionTokenizer


class TransitionLosses(NamedTuple):
    """Both losses of a batch of transitions, and the latent actions that gave them.

    Attributes:
        forward: mean squared error of z_hat_{t+1}.
        consistency: mean squared error of z_hat_t, rebuilt from the reversed pair.
        latent_actions: l_t = q(z_t, z_{t+1}).
        reversed_actions: q(z_{t+1}, z_t).
    """

    forward: Float[Tensor, ""]
    consistency: Float[Tensor, ""]
    latent_actions: Float[Tensor, "b action"]
    reversed_actions: Float[Tensor, "b action"]


def transition_losses(
    lat: LatentActionTokenizer,
    z_t: Float[Tensor, "b tokens d"],
    z_next: Float[Tensor, "b tokens d"],
    grid: Grid | None = None,
) -> TransitionLosses:
    """L_fwd and L_cons of RepWAM Eq. (4), for standardised latents.

        L_fwd  = |K_t z_t + d_t - z_{t+1}|^2          with K_t, d_t = f(z_t, q(z_t, z_{t+1}))
        L_cons = |K'_t z_{t+1} + d'_t - z_t|^2        with K'_t, d'_t = f(z_{t+1}, q(z_{t+1}, z_t))

    The paper sums over t, tokens and channels; here both are means over all elements, so that the values do not
    depend on clip length, resolution or d, and 1 is the variance of a standardised latent. Both directions run
    as one batch.
    """
    latent_actions, reversed_actions = lat.encode_both_ways(z_t, z_next, grid)
    source, target = torch.cat([z_t, z_next]), torch.cat([z_next, z_t])
    predicted = lat.decode(source, torch.cat([latent_actions, reversed_actions]), grid)
    forward, backward = (predicted - target).square().chunk(2)
    return TransitionLosses(forward.mean(), backward.mean(), latent_actions, reversed_actions)


def copy_loss(z_t: Float[Tensor, "b tokens d"], z_next: Float[Tensor, "b tokens d"]) -> Float[Tensor, ""]:
    """Mean squared error of the copy baseline z_hat_{t+1} = z_t."""
    return (z_t - z_next).square().mean()
