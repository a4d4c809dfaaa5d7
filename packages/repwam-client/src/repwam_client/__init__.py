"""What a robot's computer needs of RepWAM: numpy, msgpack, websockets; Python 3.8 and later."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import PolicyClient, PolicyServerError
    from .errors import UserError
    from .execution import ChunkedPolicy
    from .interface import ActionChunk, BasePolicy, Embodiment, Observation

_HOMES = {
    "client": ("PolicyClient", "PolicyServerError"),
    "errors": ("UserError",),
    "execution": ("ChunkedPolicy",),
    "interface": ("ActionChunk", "BasePolicy", "Embodiment", "Observation"),
}
"""Module -> its public names; it is imported when one of them is first asked for, so that a policy in another package
that uses the interface alone loads no client."""

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


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
