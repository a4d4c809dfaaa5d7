"""What a robot's computer needs of RepWAM: numpy, msgpack, websockets; Python 3.8 and later."""

from importlib.metadata import version

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
__version__ = version("repwam-client")
