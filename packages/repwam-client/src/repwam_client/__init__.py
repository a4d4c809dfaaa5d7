"""What a robot's computer needs of RepWAM: numpy, msgpack, websockets; Python 3.8 and later."""

from .client import PolicyClient, PolicyServerError
from .errors import UserError
from .execution import ChunkedPolicy
from .interface import ActionChunk, BasePolicy, Embodiment, Observation

__all__ = [
    "ActionChunk",
    "BasePolicy",
    "ChunkedPolicy",
    "Embodiment",
    "Observation",
    "PolicyClient",
    "PolicyServerError",
    "UserError",
]
__version__ = "0.1.0"
