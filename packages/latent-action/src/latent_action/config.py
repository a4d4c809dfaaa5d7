"""The settings of a latent action tokenizer, checked where they are written down."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any

import msgspec
from repvitok.data.latents import LatentMeta
from repvitok.runtime.documents import MAX_PARAMETERS, Above0, Size, check_fields, parse
from repvitok.runtime.errors import UserError

POOLINGS = ("attention", "mean")
Few = Annotated[int, msgspec.Meta(ge=1, le=1024)]
TransitionFrames = Annotated[int, msgspec.Meta(ge=1, le=64)]


@dataclass(frozen=True, kw_only=True)
class LatentActionConfig:
    """Shape of the LAT, and the latents it was trained on.

    The defaults are the paper's (Sec. 4.1): four-layer MLPs of hidden size 256, latents of 96 channels,
    latent actions of 4 numbers. What the paper leaves open (pooling, the form of K_t) is decided in
    docs/decisions/004-latent-action-pooling.md.

    Attributes:
        latent_dim: channels d of a latent token.
        action_dim: numbers per latent action, d_l.
        hidden: hidden size of both MLPs.
        layers: linear layers of both MLPs.
        pooling: how the IDM turns per-token outputs into one vector: "attention" (one learned softmax over
            the tokens for each of the action_dim numbers) or "mean".
        antisymmetric: make q(z_{t+1}, z_t) = -q(z_t, z_{t+1}) by construction (docs/decisions/021).
        transport_rank: rank of the content term in the logits of K_t; 0 leaves the soft flow alone.
        position_frequencies: octaves of the sinusoidal position features.
        max_views: cameras for which a view embedding exists.
        tokenizer_digest: identity of the visual tokenizer whose latents this LAT was trained on.
        latent_mean: channel mean those latents were standardised with, (d,).
        latent_std: channel standard deviation those latents were standardised with, (d,).
        transition_frames: latent frames from z_t to the z_{t+1} of its latent actions; that of the data trained on
            (docs/decisions/074). A config with 1 is written without it, as before there was a choice.
    """

    latent_dim: Size = 96
    action_dim: Few = 4
    hidden: Size = 256
    layers: Annotated[int, msgspec.Meta(ge=2, le=1024)] = 4
    pooling: str = "attention"
    antisymmetric: bool = True
    transport_rank: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 4
    position_frequencies: Annotated[int, msgspec.Meta(ge=0, le=64)] = 4
    max_views: Few = 4
    tokenizer_digest: str | None = None
    latent_mean: tuple[float, ...] | None = None
    latent_std: tuple[Above0, ...] | None = None
    transition_frames: TransitionFrames = 1

    def __post_init__(self) -> None:
        check_fields(self)
        if self.pooling not in POOLINGS:
            raise UserError(f"pooling: expected one of {POOLINGS}, got {self.pooling!r}.")
        parameters = 2 * self.layers * self.hidden * max(self.hidden, self.latent_dim)
        if parameters > MAX_PARAMETERS:
            raise UserError(
                f"layers {self.layers} of hidden {self.hidden}: {parameters:.0e} parameters, more than any model"
            )
        if (self.latent_mean is None) != (self.latent_std is None):
            raise UserError("latent_mean and latent_std belong together: give both, or neither.")
        for name in ("latent_mean", "latent_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.latent_dim:
                raise UserError(
                    f"{name}: expected latent_dim = {self.latent_dim} numbers, got {len(values)}. "
                    "Use the statistics stored with the latents this model is for."
                )

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON can hold it."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        if self.transition_frames == 1:
            del values["transition_frames"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LatentActionConfig":
        """The inverse of `to_dict`."""
        required = [field.name for field in fields(cls) if field.name != "transition_frames"]
        parse(values, cls, cls.__name__, required=required)
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)

    def fitted_to(self, meta: LatentMeta, transition_frames: int = 1) -> "LatentActionConfig":
        """This config with the tokenizer digest, the statistics and the transitions' length of the data to train on."""
        if self.latent_dim != meta.latent_dim:
            raise UserError(
                f"latent_dim = {self.latent_dim}, but the latents have {meta.latent_dim} channels: set it to that."
            )
        filled = replace(
            self,
            tokenizer_digest=meta.tokenizer_digest,
            latent_mean=tuple(meta.mean.tolist()),
            latent_std=tuple(meta.std.tolist()),
            transition_frames=transition_frames,
        )
        for name in ("tokenizer_digest", "latent_mean", "latent_std"):
            if getattr(self, name) not in (None, getattr(filled, name)):
                raise UserError(f"{name} is set, and is not that of the latents: leave it out of the recipe.")
        if self.transition_frames not in (1, transition_frames):
            raise UserError("lat.transition_frames is that of the data: set data.transition_frames and leave it out.")
        return filled

    def require_same(self, stored: "LatentActionConfig") -> None:
        """Check that a checkpoint was trained with these settings and on these latents."""
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(stored, field.name)
            if ours != theirs:
                difference = "" if isinstance(ours, tuple) else f": here {ours}, there {theirs}"
                raise UserError(
                    f"The checkpoint was trained with another {field.name}{difference}. Use the recipe and the latents "
                    "it was trained on."
                )
