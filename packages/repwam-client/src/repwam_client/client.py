"""The robot's side of a served policy: a `BasePolicy` that asks a server. No torch: numpy, msgpack, websockets."""

from __future__ import annotations

import inspect
import logging
import time
from collections import deque
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from .errors import UserError
from .interface import ActionChunk, BasePolicy, CommandKind, Embodiment, Observation
from .protocol import Request, ServerMetadata, chunk_from_message, pack, unpack

log = logging.getLogger(__name__)
MAX_ANSWER_BYTES = 64 * 2**20
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
"""Between two attempts to connect; each pause is twice the one before."""
SERVICE_UNAVAILABLE = 503
_PROXY = {"proxy": None} if "proxy" in inspect.signature(connect).parameters else {}  # since websockets 15


class PolicyServerError(RuntimeError):
    """The server refused a request, or is gone; the message is the server's own. Make a new client to go on."""


class Latency:
    """How long chunks took, from the request to the answer; the first request of an episode is not counted.

    Args:
        budget_ms: a chunk that takes longer is counted, and told in the log; None: none is.

    Attributes:
        total_ms, server_ms: of the last 1,000 requests: milliseconds as the robot saw them, and those on the server.
        over_budget: requests that took longer than the budget.
    """

    def __init__(self, budget_ms: float | None = None) -> None:
        if budget_ms is not None and not budget_ms > 0:
            raise UserError(f"budget_ms: expected milliseconds above 0, or None, got {budget_ms}")
        self.budget_ms, self.over_budget = budget_ms, 0
        self.total_ms: deque[float] = deque(maxlen=1000)
        self.server_ms: deque[float] = deque(maxlen=1000)

    def add(self, total_ms: float, server_ms: float) -> None:
        """Count one request."""
        self.total_ms.append(total_ms)
        self.server_ms.append(server_ms)
        if self.budget_ms is not None and total_ms > self.budget_ms:
            self.over_budget += 1
            log.warning(
                "a chunk took %.0f ms, %.0f of them on the server; the budget is %.0f ms",
                total_ms, server_ms, self.budget_ms,
            )  # fmt: skip

    def percentiles(self, *of: float) -> dict[str, float]:
        """Of the last 1,000 requests, "p50" and so on -> milliseconds as the robot saw them; 50, 90, 99 unless named.

        Empty before the second request of an episode.
        """
        if not self.total_ms:
            return {}
        wanted = of or (50, 90, 99)
        return {f"p{p:g}": float(ms) for p, ms in zip(wanted, np.percentile(self.total_ms, wanted))}


class PolicyClient(BasePolicy):
    """A policy that runs elsewhere, for one robot at a time; the connection holds its episode.

    Args:
        host: name or address of the server, or a whole `ws://` or `wss://` address.
        port: its port; None where the address names it.
        api_key: sent as `Authorization: Api-Key KEY`.
        timeout_s: the longest wait for the connection, and for each answer.
        resize: send pictures in the policy's size, which the server would otherwise resize: fewer bytes on the network.
        reconnect_s: how long to go on trying where there is no server or no room, when the client is made and at every
            `reset` after the connection was lost. An episode cannot go on over a lost connection: the server has
            forgotten it.
        budget_ms: of one request, see `Latency`.

    Attributes:
        metadata: what the server said of its policy.
        timing: milliseconds of the last answer on the server: `infer_ms` in the policy, `total_ms` with unpacking.
        latency: how long requests took.

    Raises:
        OSError: when there is no server at that address.
        PolicyServerError: when the server turns this client away, or is of another kind.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int | None = 8000,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        resize: bool = False,
        reconnect_s: float = 0.0,
        budget_ms: float | None = None,
    ) -> None:
        address = host if host.startswith(("ws://", "wss://")) else f"ws://{host}"
        self.address = address if port is None else f"{address}:{port}"
        self.timeout_s, self.reconnect_s, self.resize = timeout_s, reconnect_s, resize
        self.timing: dict[str, float] = {}
        self.latency = Latency(budget_ms)
        self._api_key = api_key
        self._executed: np.ndarray | None = None
        self._committed: np.ndarray | None = None
        self._first = True  # the next `act` is the first of its episode
        self._to_go_on = "call reset to begin again" if reconnect_s else "make a new client"
        self._open = ExitStack()
        self.metadata = self._connect()

    @property
    def embodiment(self) -> Embodiment:
        """The robot that the policy drives."""
        return self.metadata.embodiment

    @property
    def frames_per_latent(self) -> int:
        """Camera frames of a latent frame: every `act` but the first takes a multiple of them."""
        return self.metadata.frames_per_latent

    @property
    def action_kind(self) -> CommandKind:
        """Whether an action is a target or a change; a target where the server does not say."""
        return self.metadata.action_kind or "absolute"

    def reset(self, instruction: str | None, seed: int = 0) -> None:
        """Begin an episode; None is no instruction. `seed` fixes every draw of the policy in it."""
        self._executed = self._committed = None
        self._first = True
        request = Request(prompt=instruction, reset=True, seed=seed)
        try:
            self._ask(request)
        except (PolicyServerError, TimeoutError):
            if not self.reconnect_s:
                raise
            self.close()
            metadata = self._connect()
            if metadata.embodiment != self.embodiment:
                self.close()
                raise PolicyServerError(
                    f"{self.address} serves another robot's policy now; make a new client"
                ) from None
            self.metadata = metadata
            self._ask(request)

    def record(self, actions_si: np.ndarray) -> None:
        """Tell, with the next `act`, which actions (frames, C) were carried out if not those returned."""
        self._executed = np.asarray(actions_si, np.float32)

    def commit(self, actions_si: np.ndarray) -> None:
        """Tell, with the next `act`, which actions (m, C) are carried out meanwhile; its chunk begins with them."""
        if not self.metadata.takes_committed:
            raise UserError("this server takes no committed actions; update it, or choose another execution")
        self._committed = np.asarray(actions_si, np.float32) if len(actions_si) else None

    def act(self, observation: Observation) -> ActionChunk:
        """The next actions, given every frame since the last call.

        Raises:
            PolicyServerError: when the observation does not fit the policy, or the server is gone.
            TimeoutError: when no answer came in `timeout_s`; the connection is closed then.
        """
        start_s = time.perf_counter()
        executed, committed = self._executed, self._committed
        self._executed = self._committed = None
        images = observation.images
        if self.resize:
            images = {camera: resize(image, self.metadata.image_size) for camera, image in images.items()}
        answer = self._ask(
            Request(
                images=images,
                state=observation.state,
                prompt=observation.instruction,
                time_s=observation.time_s,
                executed=executed,
                committed=committed,
            )
        )
        self.timing = dict(answer.get("server_timing", {}))
        if not self._first:
            self.latency.add(1e3 * (time.perf_counter() - start_s), self.timing.get("total_ms", 0.0))
        self._first = False
        return chunk_from_message(answer)

    def close(self) -> None:
        """End the session."""
        self._open.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: Request) -> dict[str, Any]:
        try:
            self._connection.send(pack(request.to_message()))
        except ConnectionClosed as closed:
            raise PolicyServerError(f"the connection is closed ({closed}); {self._to_go_on}") from closed
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            answer = self._connection.recv(timeout=self.timeout_s)
        except ConnectionClosed as closed:
            raise PolicyServerError(f"the server is gone: {closed}") from closed
        except TimeoutError:
            self.close()  # a late answer must not be taken for the next one
            raise TimeoutError(f"no answer in {self.timeout_s} s; the connection is closed") from None
        if isinstance(answer, str):
            self.close()
            raise PolicyServerError(answer)
        return unpack(answer)

    def _connect(self) -> ServerMetadata:
        """Connect and read what the server says of its policy; try again for `reconnect_s` where none is there."""
        until_s, pause_s = time.monotonic() + self.reconnect_s, FIRST_PAUSE_S
        while True:
            try:
                self._connection = self._connect_once()
                break
            except (OSError, InvalidStatus) as error:
                left_s = until_s - time.monotonic()
                full = isinstance(error, InvalidStatus) and error.response.status_code == SERVICE_UNAVAILABLE
                if left_s > 0 and (full or not isinstance(error, InvalidStatus)):
                    log.info("no policy at %s yet (%s)", self.address, error)
                    time.sleep(min(pause_s, left_s))
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                    continue
                if isinstance(error, InvalidStatus):
                    body = (error.response.body or b"").decode(errors="replace").strip()
                    told = f"{self.address}: HTTP {error.response.status_code}: {body}"
                    raise PolicyServerError(told) from error
                raise
        try:
            return ServerMetadata.from_message(self._receive())
        except ValueError as error:
            self.close()
            raise PolicyServerError(f"{self.address}: {error}") from error

    def _connect_once(self) -> ClientConnection:
        headers = {"Authorization": f"Api-Key {self._api_key}"} if self._api_key else None
        return self._open.enter_context(
            connect(
                self.address,
                additional_headers=headers,
                compression=None,
                max_size=MAX_ANSWER_BYTES,
                open_timeout=self.timeout_s,
                **_PROXY,
            )
        )


def resize(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pictures, uint8 (..., H, W, 3), in size (h, w): antialiased bilinear, the policy's own within 1 of 255."""
    height, width = frames.shape[-3:-1]
    if (height, width) == tuple(size):
        return frames
    rows = frames.reshape(*frames.shape[:-2], width * 3).astype(np.float32)
    low = np.matmul(_weights(height, size[0]), rows).reshape(*frames.shape[:-3], size[0], width, 3)
    return np.rint(np.matmul(_weights(width, size[1]), low)).clip(0, 255).astype(np.uint8)


@lru_cache(maxsize=32)
def _weights(before: int, after: int) -> np.ndarray:
    """(after, before): what each pixel of a row counts in the resized row's, a triangle around its centre."""
    scale = before / after
    centres = (np.arange(after) + 0.5)[:, None] * scale
    distances = np.abs(np.arange(before) + 0.5 - centres) / max(scale, 1.0)
    weights = np.clip(1 - distances, 0, None)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
