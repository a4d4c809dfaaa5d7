"""Latent actions learned from video alone: a transition between two semantic states as four numbers.

The public names are imported on first use, so that `import latent_action` does not import torch.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

from repvitok.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from latent_action.config import LatentActionConfig
    from latent_action.export import export_checkpoint
    from latent_action.labelling import label_shards
    from latent_action.model import LatentActionTokenizer, TransitionLosses, transition_losses
    from latent_action.probe import ProbeReport, probe_shards
    from latent_action.visualize import acting_map, action_effect_map, draw_transition, transport_arrows

__version__ = version("latent-action")
__all__ = [
    "LatentActionConfig",
    "LatentActionTokenizer",
    "ProbeReport",
    "TransitionLosses",
    "__version__",
    "acting_map",
    "action_effect_map",
    "draw_transition",
    "export_checkpoint",
    "label_shards",
    "probe_shards",
    "transition_losses",
    "transport_arrows",
]

_HOMES = {
    "LatentActionConfig": "config",
    "LatentActionTokenizer": "model",
    "ProbeReport": "probe",
    "TransitionLosses": "model",
    "acting_map": "visualize",
    "action_effect_map": "visualize",
    "draw_transition": "visualize",
    "export_checkpoint": "export",
    "label_shards": "labelling",
    "probe_shards": "probe",
    "transition_losses": "model",
    "transport_arrows": "visualize",
}

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
