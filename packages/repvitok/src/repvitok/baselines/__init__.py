"""What the tokenizer is compared with or measured by: Wan2.2's VAE, I3D, convolutional teachers."""

from typing import TYPE_CHECKING

from repvitok.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from repvitok.baselines.wan import WanVae

__all__ = ["WanVae"]

__getattr__, __dir__ = lazy_exports(__name__, {"WanVae": "wan"})
