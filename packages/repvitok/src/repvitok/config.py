"""The shape of a RepViTok model: a validated, torch-free description that is stored beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from repvitok.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RepViTokConfig:
    """The architecture of a RepViTok; the defaults are the paper's (177 M parameters).

    Attributes:
        patch_size: side of a patch in pixels; the first frame is cut into patch_size x patch_size patches.
        tubelet_frames: frames in a tubelet; later frames are cut into tubelet_frames x patch_size x
            patch_size.
        width: channels of a token inside the encoder and inside the decoder.
        depth: transformer blocks in the encoder, and again in the decoder.
        heads: attention heads; width / heads must be even and at least 6, for rotary pairs on three axes.
        mlp_ratio: hidden size of a block's MLP, in widths.
        latent_dim: channels of a latent (the paper's d_v).
        window: latent frames a token attends back over, its own included; None is the whole prefix.
        episode_window: the window of streams over episodes longer than the training clips (the trained
            length, so that positions and prefixes look as they did in training; 5 latent frames are 17
            frames).
        rope_base: ratio of the slowest to the fastest rotary wavelength. The default 100 spreads the
            wavelengths from 6 tokens to a few hundred, the extent of a 512-pixel frame or of a long clip;
            language models' 10,000 would leave most pairs unturned over the 16 to 32 tokens of an axis.
    """

    patch_size: int = 16
    tubelet_frames: int = 4
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    latent_dim: int = 96
    window: int | None = None
    episode_window: int = 5
    rope_base: float = 100.0

    def __post_init__(self) -> None:
        """Reject what no model can be built from.

        Raises:
            ValueError: a field is out of its range; says the range and what came.
        """
        positive = ("patch_size", "tubelet_frames", "width", "depth", "heads", "latent_dim", "episode_window")
        for name in positive:
            _require_positive_int(name, getattr(self, name))
        if self.window is not None:
            _require_positive_int("window", self.window)
        if not self.mlp_ratio > 0:
            raise UserError(f"mlp_ratio must be positive, got {self.mlp_ratio!r}")
        if not self.rope_base > 1:
            raise UserError(f"rope_base must be greater than 1, got {self.rope_base!r}")
        if self.width % self.heads or self.head_dim % 2 or self.head_dim < 6:
            raise UserError(
                f"width / heads must be even and at least 6 (rotary pairs on three axes), got width {self.width} and "
                f"heads {self.heads}; for example width 128 with heads 4"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        """Hidden channels of a block's MLP."""
        return int(self.width * self.mlp_ratio)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON and YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RepViTokConfig:
        """The config that `to_dict` described; strict, so that a file of another version is noticed.

        Raises:
            ValueError: a key is unknown or missing, or a value is out of its range.
        """
        return cls(**require_exact_keys(values, {field.name for field in fields(cls)}, "RepViTokConfig"))


def require_exact_keys(values: Mapping[str, Any], expected: set[str], what: str) -> dict[str, Any]:
    """`values` as a dict, if its keys are exactly `expected`.

    Raises:
        ValueError: names the unknown and the missing keys.
    """
    unknown, missing = sorted(set(values) - expected), sorted(expected - set(values))
    if unknown or missing:
        raise UserError(
            f"{what}: unknown keys {unknown}, missing keys {missing}; expected exactly {sorted(expected)}. "
            "Was it written by another version?"
        )
    return dict(values)


def _require_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} must be a whole number of at least 1, got {value!r}")
