"""How the tokenizer is trained and measured: teachers, losses, metrics, the LightningModule and its export."""

from typing import TYPE_CHECKING

from repvitok.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from repvitok.training.module import RepViTokTraining

__all__ = ["RepViTokTraining"]

__getattr__, __dir__ = lazy_exports(__name__, {"RepViTokTraining": "module"})
