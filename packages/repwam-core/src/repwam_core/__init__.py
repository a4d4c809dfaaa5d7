"""A causal world action model over semantic visual and action tokens, and the policy that drives a robot with it.

The public names are imported on first use, so that `import repwam_core` does not import torch.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

from repvitok.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from repwam_core.embodiment import Embodiment
    from repwam_core.interface import ActionChunk, BasePolicy, Observation
    from repwam_core.model.config import ActionSpace, WAMConfig
    from repwam_core.model.wam import WorldActionModel
    from repwam_core.policy.policy import Policy
    from repwam_core.text import TextEncoder

__version__ = version("repwam-core")
__all__ = [
    "ActionChunk",
    "ActionSpace",
    "BasePolicy",
    "Embodiment",
    "Observation",
    "Policy",
    "TextEncoder",
    "WAMConfig",
    "WorldActionModel",
    "__version__",
]

_HOMES = {
    "ActionChunk": "interface",
    "ActionSpace": "model.config",
    "BasePolicy": "interface",
    "Embodiment": "embodiment",
    "Observation": "interface",
    "Policy": "policy.policy",
    "TextEncoder": "text",
    "WAMConfig": "model.config",
    "WorldActionModel": "model.wam",
}

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
