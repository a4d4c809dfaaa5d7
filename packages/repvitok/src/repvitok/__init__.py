"""A semantic video tokenizer: video to representation-aligned latents, and back to pixels.

Importing this package imports no torch: the names below are loaded when they are first used.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from repvitok.runtime import moved
from repvitok.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from repvitok.config import RepViTokConfig
    from repvitok.model import RepViTok, StreamState, TokenizerStream
    from repvitok.runtime.errors import UserError
    from repvitok.runtime.pretrained import PretrainedModel

__version__ = version("repvitok")

_HOMES = {
    "PretrainedModel": "runtime.pretrained",
    "RepViTok": "model",
    "RepViTokConfig": "config",
    "StreamState": "model",
    "TokenizerStream": "model",
    "UserError": "runtime.errors",
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

moved.install()
__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
