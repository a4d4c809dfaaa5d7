"""Frozen features of single frames as a tokenizer: squeezed to a few channels, decoded by RepViTok's decoder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from repvitok.config import RepViTokConfig
from repvitok.model import RepViTok
from repvitok.nn.codec import CodecState, init_transformer
from repvitok.nn.features import ConvNetTeacher, Teacher, TimmTeacher
from repvitok.runtime.documents import Count
from repvitok.runtime.errors import UserError
from repvitok.runtime.pretrained import drawn_once

Squeeze = Literal["pca", "learned", "none"]
MOST_TOKENS = 2_000_000
"""A PCA takes no more tokens than these."""


@dataclass(frozen=True, kw_only=True)
class FeatureTokenizerConfig(RepViTokConfig):
    """A frozen network in the encoder's place; `width`, `depth`, `heads`, `mlp_ratio`, `window` are the decoder's.

    Attributes:
        network: timm's name of it, with the tag of its weights, which decides how pixels are normalised.
        stage: of a convolutional network, see `ConvNetTeacher`; None for a vision transformer, see `TimmTeacher`.
        squeeze: from the features of a tubelet to `latent_dim` channels: "pca" by their principal components, "learned"
            by a linear layer that begins there and is trained with the decoder, "none" for the features as they are.
    """

    network: str
    stage: Count | None = None
    squeeze: Squeeze = "pca"


class FeatureEncoder(nn.Module):
    """Pixels to latents: frozen features of every frame, those of a tubelet's f frames side by side, a linear layer.

    The first frame counts as a tubelet of f equal ones, so that all latents are in one basis. A latent depends on its
    own frames alone: there is nothing that a stream would have to remember, and no attention window.
    """

    def __init__(self, config: FeatureTokenizerConfig, features: Teacher | None = None) -> None:
        super().__init__()
        self.config = config
        self.features = _network(config) if features is None else features
        inputs = config.tubelet_frames * self.features.dim
        if config.squeeze == "none" and config.latent_dim != inputs:
            raise UserError(
                f"squeeze none: {config.tubelet_frames} frames of {self.features.dim} features are latent_dim {inputs}"
                f", got {config.latent_dim}"
            )
        if config.squeeze != "none" and config.latent_dim > inputs:
            raise UserError(f"latent_dim {config.latent_dim} is more than the {inputs} features that are squeezed")
        self.squeeze = nn.Identity() if config.squeeze == "none" else nn.Linear(inputs, config.latent_dim)
        self.squeeze.requires_grad_(config.squeeze == "learned")

    def forward(self, video: Float[Tensor, "b 3 T H W"], window: int | None, **_: Any) -> Tensor:
        """Latents (b, frames, tokens, d) of a whole clip; `window` and ways of computing attention mean nothing."""
        del window
        return self.squeeze(self.tubelets(video, begins=True))

    def step(
        self, video: Float[Tensor, "b 3 T H W"], window: int | None, state: CodecState | None
    ) -> tuple[Float[Tensor, "b frames tokens d"], CodecState]:
        """Latents of a stream's next frames; `state` is None at its beginning."""
        del window
        z = self.squeeze(self.tubelets(video, begins=state is None))
        patch, begun = self.config.patch_size, 0 if state is None else state.frames
        return z, CodecState(begun + z.shape[1], (video.shape[3] // patch, video.shape[4] // patch), ())

    def tubelets(self, video: Float[Tensor, "b 3 T H W"], *, begins: bool) -> Float[Tensor, "b frames tokens c"]:
        """The features of each tubelet's frames, one frame's behind the other's: (b, frames, tokens, f c)."""
        patch, f = self.config.patch_size, self.config.tubelet_frames
        found = self.features.features(video, (video.shape[3] // patch, video.shape[4] // patch))
        if begins:
            found = torch.cat([found[:, :1].expand(-1, f - 1, -1, -1, -1), found], dim=1)
        return rearrange(found, "b (t f) h w c -> b t (h w) (f c)", f=f)


class FeatureTokenizer(RepViTok):
    """Frozen features of images behind RepViTok's interface: what a tokenizer without training of its own is worth.

    Latents are the features of `TimmTeacher` or `ConvNetTeacher` at the tokenizer's grid, those of four frames
    together, squeezed (docs/decisions/077). The decoder is RepViTok's and is trained by `repvitok fit` with
    `model.features`; the folder holds the network's weights too and needs no other file.

    Attributes:
        config: the architecture, and which network.
    """

    format = "feature_tokenizer"
    config_class = FeatureTokenizerConfig
    config: FeatureTokenizerConfig

    @drawn_once
    def __init__(self, config: FeatureTokenizerConfig, features: Teacher | None = None) -> None:
        """Random weights, but for those of `features`, the network of `config`, where it is given."""
        super().__init__(config, FeatureEncoder(config, features))

    @classmethod
    def of(cls, features: Teacher, config: RepViTokConfig, squeeze: Squeeze = "pca") -> FeatureTokenizer:
        """A tokenizer on a network's features, its PCA not yet fitted; `config` has the decoder's sizes.

        With squeeze "none" `latent_dim` is what the features have.
        """
        if not isinstance(features, TimmTeacher | ConvNetTeacher):
            raise UserError(f"features: expected TimmTeacher or ConvNetTeacher, got {type(features).__name__}")
        known = features.network.pretrained_cfg
        sizes = asdict(config)
        if squeeze == "none":
            sizes["latent_dim"] = config.tubelet_frames * features.dim
        network = ".".join(filter(None, (known["architecture"], known.get("tag"))))
        stage = features.stage if isinstance(features, ConvNetTeacher) else None
        return cls(FeatureTokenizerConfig(**sizes, network=network, stage=stage, squeeze=squeeze), features)

    def draw(self) -> None:
        """Give every parameter its initial value, those of the frozen network too."""
        self.encoder = FeatureEncoder(self.config).to(self.decoder.expand.weight.device)
        init_transformer(self.decoder, self.config.depth)

    @torch.no_grad()
    def fit_squeeze(self, clips: Iterable[Float[Tensor, "b 3 T H W"]]) -> float:
        """Sets the linear layer to the principal components of these clips' features; returns what variance they keep.

        z = (V x - V mean) / s: V holds the eigenvectors of the covariance with the largest eigenvalues, s is one number
        for all channels, which gives z the variance 1 on average: features are as far apart as they were.
        """
        if self.config.squeeze == "none":
            return 1.0
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for clip in clips:
            x = self.encoder.tubelets(clip, begins=True).flatten(0, 2).double()
            count, total, squares = count + len(x), total.to(x) + x.sum(0), squares.to(x) + x.T @ x
            if count > MOST_TOKENS:
                break
        kept = self.config.latent_dim
        if count <= kept:
            raise UserError(f"a PCA to {kept} channels needs more than {kept} tokens, these clips have {count}")
        mean = total / count
        variances, vectors = torch.linalg.eigh(squares / count - mean.outer(mean))
        components = vectors[:, -kept:].flip(1).T  # the largest first
        components *= components.gather(1, components.abs().argmax(1, keepdim=True)).sign()  # eigenvectors have none
        share = variances[-kept:].sum() / variances.sum()
        weight = components / variances[-kept:].mean().clamp(min=1e-12).sqrt()
        self.encoder.squeeze.weight.copy_(weight)
        self.encoder.squeeze.bias.copy_(-weight @ mean)
        return share.item()


def _network(config: FeatureTokenizerConfig) -> Teacher:
    """The config's network with random weights, on the CPU: what is never saved, such as positions, has its values."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        if config.stage is None:
            return TimmTeacher(config.network, random_weights_for_tests=True)
        return ConvNetTeacher(config.network, config.stage, random_weights_for_tests=True)
