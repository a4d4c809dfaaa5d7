"""What a client and a server of a policy say to each other: checked objects, the maps that are sent, and their bytes.

One websocket connection is one session, with its own episode:

1. The server's first frame is the `ServerMetadata`.
2. Each binary frame of the client is a `Request`; the server answers it with the next actions, or with
   `{"reset": True}` where the request held no images.
3. A mistake is answered by a text frame that says what it was; then the server closes with code 1011.

The connection, the packing of arrays and the handling of errors are openpi's, so openpi's own client works. Its `reset`
says nothing to the server: a session begins an episode with its first request, and a later one where a request says
`"reset": True`.

Messages are msgpack, unpacked without trust. An array is the map
`{b"__ndarray__": True, b"data": raw bytes, b"dtype": "<f4", b"shape": [..]}`, a numpy scalar
`{b"__npgeneric__": True, b"data": number, b"dtype": "<f4"}`. No pickle anywhere.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Mapping

import msgpack
import numpy as np

from .errors import UserError
from .interface import MAX_INSTRUCTION_BYTES, ActionChunk, CommandKind, Embodiment, Observation

MAX_DIMS = 8
MAX_ITEMS = 4096
"""Entries of one list or map, and lists and maps in one message: a few bytes must not unfold into gigabytes."""
_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_TOO_LONG = re.compile(r"(\d+) exceeds max_str_len")
_ARRAY_KEYS = {b"__ndarray__", b"data", b"dtype", b"shape"}
_SCALAR_KEYS = {b"__npgeneric__", b"data", b"dtype"}
FORMAT = "repwam-serve"
FORMAT_VERSION = 1
MAX_SEED = 2**63 - 1
MAX_IMAGE_SIDE = 4096
"""No camera that a policy resizes is wider; a picture of 20,000,000 x 1 pixels would cost gigabytes and seconds."""
_OPTIONAL = (
    "max_prompt_bytes", "max_image_side", "max_message_bytes", "idle_timeout_s", "action_kind", "takes_committed",
)  # fmt: skip


def pack(message: Mapping[str, Any]) -> bytes:
    """Pack a message of numbers, strings, lists, maps and numpy arrays.

    Raises:
        ValueError: for an array of objects, complex numbers or records, which have no place in a message.
        TypeError: for any other thing that msgpack cannot hold.
    """
    packed: Any = msgpack.packb(dict(message), default=_plain)
    return packed


def unpack(data: bytes) -> dict[str, Any]:
    """Invert `pack`; arrays come out writable, in the machine's byte order."""
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
    if not isinstance(value, (np.ndarray, np.generic)):
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
    if not isinstance(shape, (list, tuple)) or len(shape) > MAX_DIMS or not all(_is_size(size) for size in shape):
        raise UserError(f"array of shape {shape!r:.80}; expected at most {MAX_DIMS} sizes")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        size = len(data) if isinstance(data, bytes) else type(data).__name__
        raise UserError(f"array of shape {tuple(shape)} and dtype {dtype} with {size} bytes")
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _scalar(value: dict[Any, Any]) -> np.generic:
    number = value.get(b"data")
    if set(value) != _SCALAR_KEYS or not isinstance(number, (bool, int, float)):
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


@dataclass(frozen=True)
class ServerMetadata:
    """What a client must know of the policy behind a server.

    Attributes:
        embodiment: the robot: action channels with units, state channels, cameras, control rate in Hz.
        image_size: height and width, in pixels, to which the policy resizes every picture; sending them so costs least.
        frames_per_latent: a request holds one frame per camera at the start of an episode, later all frames since the
            last one: a multiple of this number.
        max_frames: the most frames per camera in one request.
        policy: identity of the policy's weights.
        max_prompt_bytes: of an instruction in UTF-8; a longer one is refused unread.
        max_image_side: pixels of a picture's height, and of its width.
        max_message_bytes: of a request; so its pictures hold at most a third as many pixels together.
        idle_timeout_s: a session without a request for so long is closed, whether it answers pings or not.
        action_kind: whether actions are "absolute" targets or "relative" changes; None where the server does not say.
        takes_committed: whether a request may hold actions that the next chunk has to begin with.
    """

    embodiment: Embodiment
    image_size: tuple[int, int]
    frames_per_latent: int
    max_frames: int
    policy: str
    max_prompt_bytes: int = MAX_INSTRUCTION_BYTES
    max_image_side: int = MAX_IMAGE_SIDE
    max_message_bytes: int | None = None
    idle_timeout_s: float | None = None
    action_kind: CommandKind | None = None
    takes_committed: bool | None = None

    def to_message(self) -> dict[str, Any]:
        """The map that is sent; what is not known is left out."""
        known = {name: getattr(self, name) for name in _OPTIONAL if getattr(self, name) is not None}
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "embodiment": self.embodiment.to_dict(),
            "image_size": list(self.image_size),
            "frames_per_latent": self.frames_per_latent,
            "max_frames": self.max_frames,
            "policy": self.policy,
            **known,
        }

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> ServerMetadata:
        """Invert `to_message`."""
        found = (message.get("format"), message.get("format_version"))
        if found != (FORMAT, FORMAT_VERSION):
            raise UserError(f"expected the metadata of {FORMAT} version {FORMAT_VERSION}, got {found[0]} {found[1]}")
        height, width = message["image_size"]
        return cls(
            Embodiment.from_dict(message["embodiment"]),
            (height, width),
            message["frames_per_latent"],
            message["max_frames"],
            message["policy"],
            **{name: message[name] for name in _OPTIONAL if name in message},
        )


@dataclass(frozen=True, eq=False)
class Request:
    """What a client asks.

    Attributes:
        images: camera -> uint8 `(H, W, 3)` or `(n, H, W, 3)`, every frame since the last request; None only resets.
        state: `(S,)` or `(n, S)` in the embodiment's units; sent as any float, used as float32.
        prompt: the instruction; None keeps the one before.
        time_s: seconds since the episode began.
        reset: begin a new episode.
        seed: of the new episode's draws.
        executed: `(frames, C)` actions carried out since the last request, where they are not those returned.
        committed: `(m, C)` actions that are carried out while this request is answered; the answer begins with them.
    """

    images: Mapping[str, np.ndarray] | None = None
    state: np.ndarray | None = None
    prompt: str | None = None
    time_s: float = 0.0
    reset: bool = False
    seed: int = 0
    executed: np.ndarray | None = None
    committed: np.ndarray | None = None

    def observation(self) -> Observation | None:
        """What the policy gets; None for a request that only resets."""
        if self.images is None:
            if not self.reset:
                raise UserError("expected images, or reset: true for a request that only begins a new episode")
            if given := [name for name in ("state", "executed", "committed") if getattr(self, name) is not None]:
                raise UserError(
                    f"a request without images only begins a new episode, got {' and '.join(given)} as well"
                )
            return None
        return Observation(self.images, self.state, self.prompt, self.time_s)

    def to_message(self) -> dict[str, Any]:
        """The map that is sent: what differs from the default."""
        message: dict[str, Any] = {}
        if self.images is not None:
            message["images"] = dict(self.images)
        for name in ("state", "prompt", "executed", "committed"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        if self.time_s:
            message["time_s"] = self.time_s
        if self.reset:
            message.update(reset=True, seed=self.seed)
        return message

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Request:
        """Invert `to_message`."""
        unknown = sorted(set(message) - set(cls.__dataclass_fields__))
        if unknown:
            raise UserError(f"expected the keys {sorted(cls.__dataclass_fields__)}, got {unknown} as well")
        return cls(
            images=_images(message.get("images")),
            state=_floats("state", message.get("state")),
            prompt=_prompt(message.get("prompt")),
            time_s=_time_s(message.get("time_s", 0.0)),
            reset=_flag("reset", message.get("reset", False)),
            seed=_seed(message.get("seed", 0)),
            executed=_actions("executed", message.get("executed")),
            committed=_actions("committed", message.get("committed")),
        )


def chunk_to_message(chunk: ActionChunk, timing: Mapping[str, float]) -> dict[str, Any]:
    """The answer to a request: the actions, what they are, and how long they took on the server."""
    return {
        "actions": chunk.actions,
        "channels": list(chunk.channels),
        "rate_hz": float(chunk.rate_hz),
        "server_timing": dict(timing),
    }


def chunk_from_message(message: Mapping[str, Any]) -> ActionChunk:
    """Invert `chunk_to_message`, but for the timing."""
    missing = sorted({"actions", "channels", "rate_hz"} - set(message))
    if missing:
        raise UserError(f"expected an answer with actions, got one without {missing}")
    return ActionChunk(message["actions"], tuple(message["channels"]), message["rate_hz"])


def _images(value: Any) -> Mapping[str, np.ndarray] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise UserError(f"images: expected a map from camera names to pictures, got {type(value).__name__}")
    for camera, image in value.items():
        if not isinstance(camera, str) or not isinstance(image, np.ndarray):
            raise UserError(f"images: expected an array for camera {camera!r:.40}, got {type(image).__name__}")
        if max(image.shape[-3:-1], default=0) > MAX_IMAGE_SIDE:
            raise UserError(
                f"images: expected pictures of at most {MAX_IMAGE_SIDE} pixels a side, got shape {image.shape} from "
                f"camera {camera!r:.40}"
            )
    return value


def _floats(name: str, value: Any) -> np.ndarray | None:
    if value is None:
        return None
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        got = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise UserError(f"{name}: expected an array of floats, got {got}")
    with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite, and that is refused
        return value.astype(np.float32)


def _actions(name: str, value: Any) -> np.ndarray | None:
    actions = _floats(name, value)
    if actions is not None and (actions.ndim != 2 or not actions.size or not np.isfinite(actions).all()):
        raise UserError(f"{name}: expected one or more finite actions (frames, channels), got shape {actions.shape}")
    return actions


def _prompt(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UserError(f"prompt: expected the instruction as a string, got {type(value).__name__}")
    return value


def _time_s(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise UserError(f"time_s: expected seconds as a number, got {type(value).__name__}")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise UserError(f"{name}: expected true or false, got {type(value).__name__}")
    return bool(value)


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value <= MAX_SEED:
        raise UserError(f"seed: expected a whole number from 0 to {MAX_SEED}, got {value!r:.40}")
    return int(value)
