"""LatentActionTokenizer: what changed between two latent frames, as few numbers; the losses of RepWAM Eq. (4)."""

from typing import ClassVar, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from repvitok.data.latents import Standardizer
from repvitok.runtime.errors import UserError
from repvitok.runtime.pretrained import PretrainedModel
from torch import Tensor

from latent_action.config import LatentActionConfig
from latent_action.dynamics import ForwardDynamics, Grid, InverseDynamics, resolve_grid


class LatentActionTokenizer(PretrainedModel):
    """IDM and FDM of RepWAM Eq. (3), for latents of any visual tokenizer.

        l_t = q(z_t, z_{t+1}),    K_t, d_t = f(z_t, l_t),    z_hat_{t+1} = K_t z_t + d_t

    Latents come in standardised, with the channel mean and standard deviation in `config` (`standardise` applies them);
    `grid` is (views, rows, columns) of a latent frame, camera-major, and defaults to one square view.
    """

    format: ClassVar[str] = "latent-action"
    format_version: ClassVar[int] = 1
    config_class: ClassVar[type[LatentActionConfig]] = LatentActionConfig
    config: LatentActionConfig

    def __init__(self, config: LatentActionConfig | None = None) -> None:
        super().__init__()
        self.config = config or LatentActionConfig()
        self.inverse_dynamics = InverseDynamics(self.config)
        self.forward_dynamics = ForwardDynamics(self.config)

    def encode(
        self, z: Float[Tensor, "b frames tokens d"], grid: Grid | None = None
    ) -> Float[Tensor, "b transitions action"]:
        """The latent action of every transition of a clip; transitions = frames - 1."""
        self._require_latents(z, "z", "batch frames tokens channels")
        if z.shape[1] < 2:
            raise UserError(
                f"A latent action lies between two latent frames, but z {tuple(z.shape)} (batch, frames, tokens, "
                "channels) has one frame or none. Encode a longer clip."
            )
        grid = resolve_grid(z.shape[2], grid)
        z_t, z_next = (rearrange(x, "b f l d -> (b f) l d") for x in (z[:, :-1], z[:, 1:]))
        return rearrange(self.inverse_dynamics(z_t, z_next, grid), "(b f) a -> b f a", b=z.shape[0])

    def encode_both_ways(
        self,
        z_t: Float[Tensor, "b tokens d"],
        z_next: Float[Tensor, "b tokens d"],
        grid: Grid | None = None,
    ) -> tuple[Float[Tensor, "b action"], Float[Tensor, "b action"]]:
        """The latent actions of (z_t, z_{t+1}) and of the reversed pair (z_{t+1}, z_t)."""
        self._require_latents(z_t, "z_t", "batch tokens channels")
        if z_next.shape != z_t.shape:
            raise UserError(f"z_next {tuple(z_next.shape)} and z_t {tuple(z_t.shape)} must have one shape.")
        return self.inverse_dynamics.both_ways(z_t, z_next, resolve_grid(z_t.shape[1], grid))

    def transition(
        self,
        z_t: Float[Tensor, "b tokens d"],
        l_t: Float[Tensor, "b action"],
        grid: Grid | None = None,
    ) -> tuple[Float[Tensor, "b tokens tokens"], Float[Tensor, "b tokens d"]]:
        """K_t, whose rows sum to one, and d_t. Takes L^2 memory: where only K_t z_t + d_t is needed, `decode`."""
        transport, residual = self.forward_dynamics(z_t, l_t, self._require_pair(z_t, l_t, grid))
        return transport.matrix(), residual

    def decode(
        self,
        z_t: Float[Tensor, "b tokens d"],
        l_t: Float[Tensor, "b action"],
        grid: Grid | None = None,
    ) -> Float[Tensor, "b tokens d"]:
        """z_hat_{t+1} = K_t z_t + d_t, without forming K_t."""
        transport, residual = self.forward_dynamics(z_t, l_t, self._require_pair(z_t, l_t, grid))
        return transport.apply(z_t).to(z_t.dtype) + residual.to(z_t.dtype)

    def standardise(self, latents: Float[Tensor, "*frames d"]) -> Float[Tensor, "*frames d"]:
        """(latents - mean) / std with the statistics in `config`: from a visual tokenizer's raw latents to z."""
        if self.config.latent_mean is None or self.config.latent_std is None:
            raise UserError(
                "This LAT holds no latent statistics (latent_mean, latent_std in its config). Train it with "
                "`latent-action fit`, or set both from the meta of the latents it was trained on."
            )
        self._require_latents(latents, "latents", "... channels")
        standardizer = Standardizer(np.array(self.config.latent_mean), np.array(self.config.latent_std))
        return standardizer.like(latents)(latents)

    def _require_latents(self, z: Tensor, name: str, axes: str) -> None:
        if "..." not in axes and z.ndim != len(axes.split()):
            raise UserError(f"{name}: expected the axes ({axes}), got shape {tuple(z.shape)}.")
        if z.shape[-1] != self.config.latent_dim:
            raise UserError(
                f"{name} {tuple(z.shape)} has {z.shape[-1]} channels in its last dimension, this LAT was made for "
                f"{self.config.latent_dim}: use the latents of the tokenizer it was trained on."
            )
        if z.numel() == 0:
            raise UserError(f"{name} {tuple(z.shape)} is empty: expected at least one item, frame and token.")

    def _require_pair(self, z_t: Tensor, l_t: Tensor, grid: Grid | None) -> Grid:
        self._require_latents(z_t, "z_t", "batch tokens channels")
        expected = (z_t.shape[0], self.config.action_dim)
        if l_t.shape != expected:
            raise UserError(
                f"l_t: expected shape {expected} (one latent action per item of z_t "
                f"{tuple(z_t.shape)}), got {tuple(l_t.shape)}."
            )
        return resolve_grid(z_t.shape[1], grid)


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


def composition_error(whole: Float[Tensor, "b action"], parts: Float[Tensor, "b action"]) -> Float[Tensor, ""]:
    """How far latent actions are from adding up over time: the relative error of l(a, b) + l(b, c) as l(a, c).

        mean over the numbers i of    mean_b (whole - parts)_i^2 / Var_b(whole)_i

    0 is exact, 1 no better than the mean latent action. Nothing is detached: the ratio does not change with the scale
    of any number, so that shrinking the latent actions, or one of their numbers, lowers it nowhere; what does not vary
    counts nothing, and where nothing varies it is 1 (docs/decisions/074).

    Args:
        whole: l(a, c) of triplets of frames a, b, c.
        parts: l(a, b) + l(b, c) of the same.
    """
    variance = whole.var(dim=0, correction=0)
    varies = variance.detach() > 1e-9 * variance.detach().max()
    if not varies.any():
        return whole.new_ones(())
    return ((whole - parts).square().mean(dim=0)[varies] / variance[varies]).mean()


def copy_loss(z_t: Float[Tensor, "b tokens d"], z_next: Float[Tensor, "b tokens d"]) -> Float[Tensor, ""]:
    """Mean squared error of the copy baseline z_hat_{t+1} = z_t."""
    return (z_t - z_next).square().mean()
