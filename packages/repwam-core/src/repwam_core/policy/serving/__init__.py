"""A policy behind a websocket, in openpi's protocol: what is said, who says it, who answers. No torch. On first use."""

from typing import TYPE_CHECKING

from repvitok.runtime.lazy import lazy_exports

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

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
