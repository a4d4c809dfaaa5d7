"""A semantic video tokenizer: video to representation-aligned latents, and back to pixels.

Importing this package imports no torch: the names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repvitok.config import RepViTokConfig
    from repvitok.errors import UserError
    from repvitok.model import RepViTok
    from repvitok.pretrained import PretrainedModel
    from repvitok.streaming import StreamState, TokenizerStream
    from repvitok.types import Clip, VideoLatents

__version__ = version("repvitok")

_HOME = {
    "Clip": "types",
    "PretrainedModel": "pretrained",
    "RepViTok": "model",
    "RepViTokConfig": "config",
    "StreamState": "streaming",
    "TokenizerStream": "streaming",
    "UserError": "errors",
    "VideoLatents": "types",
}

__all__ = [
    "Clip",
    "PretrainedModel",
    "RepViTok",
    "RepViTokConfig",
    "StreamState",
    "TokenizerStream",
    "UserError",
    "VideoLatents",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted(__all__)
