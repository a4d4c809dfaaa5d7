"""The robot's side of a served policy; it is `repwam_client.client`, under the name of version 0.1."""

from repwam_client.client import (
    MAX_ANSWER_BYTES,
    PolicyClient,
    PolicyServerError,
)

__all__ = [
    "MAX_ANSWER_BYTES",
    "PolicyClient",
    "PolicyServerError",
]
