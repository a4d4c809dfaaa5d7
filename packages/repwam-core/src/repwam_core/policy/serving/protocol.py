"""Messages and their bytes; it is `repwam_client.protocol`, under the name of version 0.1."""

from repwam_client.protocol import (
    FORMAT,
    FORMAT_VERSION,
    MAX_DIMS,
    MAX_IMAGE_SIDE,
    MAX_ITEMS,
    MAX_SEED,
    Request,
    ServerMetadata,
    chunk_from_message,
    chunk_to_message,
    pack,
    unpack,
)

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MAX_DIMS",
    "MAX_IMAGE_SIDE",
    "MAX_ITEMS",
    "MAX_SEED",
    "Request",
    "ServerMetadata",
    "chunk_from_message",
    "chunk_to_message",
    "pack",
    "unpack",
]
