"""Bytes of a message: msgpack with numpy arrays, as openpi's clients pack them, unpacked without trust.

An array is the map `{b"__ndarray__": True, b"data": raw bytes, b"dtype": "<f4", b"shape": [..]}`, a numpy scalar
`{b"__npgeneric__": True, b"data": number, b"dtype": "<f4"}`; all else is plain msgpack. No pickle anywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
from repvitok.runtime.errors import UserError

from repwam_core.interface import MAX_INSTRUCTION_BYTES

__all__ = ["pack", "unpack"]

MAX_DIMS = 8
MAX_ITEMS = 4096
"""Entries of one list or map, and lists and maps in one message: a few bytes must not unfold into gigabytes."""
_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_TOO_LONG = re.compile(r"(\d+) exceeds max_str_len")
_ARRAY_KEYS = {b"__ndarray__", b"data", b"dtype", b"shape"}
_SCALAR_KEYS = {b"__npgeneric__", b"data", b"dtype"}


def pack(message: Mapping[str, Any]) -> bytes:
    """Pack a message of numbers, strings, lists, maps and numpy arrays.

    Raises:
        ValueError: for an array of objects, complex numbers or records, which have no place in a message.
        TypeError: for any other thing that msgpack cannot hold.
    """
    packed: Any = msgpack.packb(dict(message), default=_plain)
    return packed


def unpack(data: bytes) -> dict[str, Any]:
    """Invert `pack`; arrays come out writable, in the machine's byte order.

    Raises:
        ValueError: when `data` is no whole message, is not a map with names as keys, holds a text longer than an
            instruction may be, or an array's bytes do not fit its dtype and shape.
    """
    counted = _Counter()
    try:
        message = msgpack.unpackb(
            data,
            object_hook=counted.map,
            list_hook=counted.list,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_str_len=MAX_INSTRUCTION_BYTES,  # the longest text of a message; refused before it is decoded
            max_ext_len=0,
            strict_map_key=True,
        )
    except (msgpack.UnpackException, ValueError, TypeError) as error:
        if too_long := _TOO_LONG.match(str(error)):
            raise UserError(
                f"expected prompts and names of at most {MAX_INSTRUCTION_BYTES} bytes, got one of {too_long[1]}"
            ) from error
        raise UserError(f"expected a whole msgpack message of at most {MAX_ITEMS} entries: {error}") from error
    if not isinstance(message, dict) or not all(isinstance(key, str) for key in message):
        raise UserError(f"expected a message that is a map with names as keys, got {type(message).__name__}")
    return message


class _Counter:
    """Builds the lists and maps of one message and gives up when there are too many."""

    def __init__(self) -> None:
        self.count = 0

    def map(self, value: dict[Any, Any]) -> Any:
        self._one_more()
        if b"__ndarray__" in value:
            return _array(value)
        if b"__npgeneric__" in value:
            return _scalar(value)
        return value

    def list(self, value: list[Any]) -> list[Any]:
        self._one_more()
        return value

    def _one_more(self) -> None:
        self.count += 1
        if self.count > MAX_ITEMS:
            raise UserError(f"more than {MAX_ITEMS} lists and maps")


def _plain(value: Any) -> Any:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"a message cannot hold a {type(value).__name__}")
    if not _DTYPE.fullmatch(value.dtype.str):
        raise UserError(f"a message holds arrays of booleans, integers and floats, got dtype {value.dtype}")
    if isinstance(value, np.ndarray):
        seen = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data  # no copy: it takes twenty times as long
        return {b"__ndarray__": True, b"data": seen, b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def _array(value: dict[Any, Any]) -> np.ndarray:
    if set(value) != _ARRAY_KEYS:
        raise UserError(f"array with the keys {sorted(map(str, value))}")
    dtype, shape, data = _dtype(value[b"dtype"]), value[b"shape"], value[b"data"]
    if not isinstance(shape, list | tuple) or len(shape) > MAX_DIMS or not all(_is_size(size) for size in shape):
        raise UserError(f"array of shape {shape!r:.80}; expected at most {MAX_DIMS} sizes")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        size = len(data) if isinstance(data, bytes) else type(data).__name__
        raise UserError(f"array of shape {tuple(shape)} and dtype {dtype} with {size} bytes")
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _scalar(value: dict[Any, Any]) -> np.generic:
    number = value.get(b"data")
    if set(value) != _SCALAR_KEYS or not isinstance(number, bool | int | float):
        raise UserError("numpy scalar without a number")
    try:
        return _dtype(value[b"dtype"]).newbyteorder("=").type(number)
    except OverflowError as error:
        raise UserError(f"numpy scalar {number} does not fit its dtype {value[b'dtype']}") from error


def _dtype(name: Any) -> np.dtype:
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise UserError(f"dtype {name!r:.40}; expected booleans, integers or floats such as '|u1' or '<f4'")
    return np.dtype(name)


def _is_size(size: Any) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= 0
