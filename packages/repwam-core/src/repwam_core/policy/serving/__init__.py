"""A policy behind a websocket, in openpi's protocol: what is said, who says it, who answers. No torch. On first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repwam_core.policy.serving.client import PolicyClient, PolicyServerError
    from repwam_core.policy.serving.protocol import ServerMetadata
    from repwam_core.policy.serving.server import PolicyServer, ServeSettings

__all__ = ["PolicyClient", "PolicyServer", "PolicyServerError", "ServeSettings", "ServerMetadata"]

_HOMES = {
    "PolicyClient": "client",
    "PolicyServer": "server",
    "PolicyServerError": "client",
    "ServeSettings": "server",
    "ServerMetadata": "protocol",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
