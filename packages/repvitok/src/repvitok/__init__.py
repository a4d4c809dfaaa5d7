"""A semantic video tokenizer: video to representation-aligned latents, and back to pixels.

Importing this package imports no torch: the names below are loaded when they are first used.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from repvitok.lazy import lazy_exports

if TYPE_CHECKING:
    from repvitok.config import RepViTokConfig
    from repvitok.errors import UserError
    from repvitok.model import RepViTok
    from repvitok.pretrained import PretrainedModel
    from repvitok.streaming import StreamState, TokenizerStream

__version__ = version("repvitok")

_HOMES = {
    "PretrainedModel": "pretrained",
    "RepViTok": "model",
    "RepViTokConfig": "config",
    "StreamState": "streaming",
    "TokenizerStream": "streaming",
    "UserError": "errors",
}

__all__ = [
    "PretrainedModel",
    "RepViTok",
    "RepViTokConfig",
    "StreamState",
    "TokenizerStream",
    "UserError",
    "__version__",
]

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
