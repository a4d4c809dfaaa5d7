"""A websocket server: every connection is a session with its own policy state, computed outside of the event loop."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, Protocol, runtime_checkable

import numpy as np
from repvitok.runtime.errors import UserError
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response

from repwam_core.interface import ActionChunk, Observation, stack_observations
from repwam_core.policy.serving.protocol import Request, ServerMetadata, chunk_to_message, pack, unpack

log = logging.getLogger(__name__)
GOING_AWAY = 1001
INTERNAL_ERROR = 1011
MAX_REASON_LENGTH = 1000
"""Characters of a mistake's text: some hold what the client sent."""
HEALTH_PATH = "/healthz"


@runtime_checkable
class ServablePolicy(Protocol):
    """What a session needs of its policy; `Policy` has it."""

    def reset(self, instruction: str | None, seed: int = 0) -> None:
        """Begin an episode."""
        ...

    def record(self, actions_si: np.ndarray) -> None:
        """Learn which actions (frames, C) were carried out since the last `act`."""
        ...

    def act(self, observation: Observation) -> ActionChunk:
        """The next actions, given every frame since the last call."""
        ...


@runtime_checkable
class TakesCommitted(Protocol):
    """What a policy has, too, that plans on from committed actions."""

    def commit(self, actions_si: np.ndarray) -> None:
        """Learn which actions (m, C) are carried out while the next `act` computes."""
        ...


class Session:
    """Answers the requests of one connection with a policy that nobody else uses.

    Args:
        policy: whose state is this session's alone; weights may be shared with other sessions' policies.
        hold_frames: an observation of one frame stands for all frames since the last answer, see `ServeSettings`.
    """

    def __init__(self, policy: ServablePolicy, hold_frames: bool = False) -> None:
        self._policy = policy
        self._begun = False
        self._hold_frames, self._rows = hold_frames, 0  # actions that were carried out since the last answer

    def answer(self, data: bytes) -> bytes:
        """Answer one request; takes as long as the policy needs."""
        start_s = time.perf_counter()
        request = Request.from_message(unpack(data))
        observation = request.observation()
        begins = request.reset or not self._begun
        if begins and request.executed is not None:
            raise UserError("executed: nothing was carried out yet in an episode that this request begins")
        if begins and request.committed is not None:
            raise UserError("committed: nothing is carried out yet in an episode that this request begins")
        if begins:
            self._policy.reset(request.prompt, request.seed)
            self._begun, self._rows = True, 0
        if request.executed is not None:
            self._policy.record(request.executed)
            self._rows = len(request.executed)
        if observation is None:
            return pack({"reset": True})
        if request.committed is not None:
            if not isinstance(self._policy, TakesCommitted):
                raise UserError("committed: this policy cannot plan on from committed actions")
            self._policy.commit(request.committed)
        if self._hold_frames and self._rows and observation.num_frames == 1:
            observation = stack_observations([observation] * self._rows)
        infer_s = time.perf_counter()
        chunk = self._policy.act(observation)
        self._rows = len(chunk)
        end_s = time.perf_counter()
        return pack(chunk_to_message(chunk, {"infer_ms": 1e3 * (end_s - infer_s), "total_ms": 1e3 * (end_s - start_s)}))


class _IdleError(Exception):
    """A client holds a session and does nothing with it."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Where to listen, and for whom.

    Attributes:
        host: address to bind to; only this machine unless told otherwise.
        port: 0 takes a free one.
        api_key: what clients must send as `Authorization: Api-Key KEY`; None lets everybody in who reaches the port.
        max_message_bytes: larger messages end their connection (close code 1009).
        max_sessions: connections at a time; each holds a policy state, and at worst two messages, in memory.
        idle_timeout_s: a session is closed when no request of its client is complete, or no answer taken, for so long.
        ping_interval_s, ping_timeout_s: a client that does not answer a ping in time has its connection closed.
        hold_frames: for clients that send the newest frame alone, as openpi's do: after the first of an episode it is
            taken for every frame since the last answer, whose actions were all carried out. The policy then sees a
            robot that stands still and jumps, which is not what it was trained on.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    max_message_bytes: int = 64 * 2**20
    max_sessions: int = 16
    idle_timeout_s: float = 600.0
    ping_interval_s: float = 20.0
    ping_timeout_s: float = 20.0
    hold_frames: bool = False

    def __post_init__(self) -> None:
        try:
            self.host.encode("idna")
        except UnicodeError as error:
            raise UserError(f"host: expected an address or a name, got {self.host!r:.80} ({error})") from error
        if not 0 <= self.port < 2**16:
            raise UserError(f"port: expected 0 to 65535, got {self.port}")
        for name in ("max_message_bytes", "max_sessions", "idle_timeout_s", "ping_interval_s", "ping_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name}: expected a finite number above 0, got {getattr(self, name)}")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError("api_key: expected one or more printable ASCII characters")


class PolicyServer:
    """Serves a policy to many clients, one policy state per connection.

    Requests are answered one after the other, in the order in which they came, by a thread beside the event loop:
    connections are accepted, pings answered and `/healthz` served while a model computes.

    Args:
        new_policy: makes a policy for one session; policies may share weights, never episode state.
        metadata: the first frame of every connection.
        settings: where to listen, and for whom.
    """

    def __init__(
        self, new_policy: Callable[[], ServablePolicy], metadata: ServerMetadata, settings: ServeSettings | None = None
    ) -> None:
        self.settings = settings or ServeSettings()
        self._new_policy = new_policy
        told = self.settings
        limits = {"max_message_bytes": told.max_message_bytes, "idle_timeout_s": told.idle_timeout_s}
        self._hello = pack(replace(metadata, **limits).to_message())
        self._sessions = 0
        self._worker: ThreadPoolExecutor | None = None

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        """Accept connections inside the block, which is given the port; close them all when it ends.

        Raises:
            OSError: when the address cannot be bound.
        """
        told = self.settings
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy") as self._worker:
            async with serve(
                self._connected,
                told.host,
                told.port,
                process_request=self._admit,
                origins=[None],  # a web page in a browser of this machine is no client
                compression=None,
                max_size=told.max_message_bytes,
                max_queue=1,
                ping_interval=told.ping_interval_s,
                ping_timeout=told.ping_timeout_s,
                close_timeout=told.ping_timeout_s,
                server_header=None,
            ) as server:
                yield next(iter(server.sockets)).getsockname()[1]

    @contextmanager
    def running(self) -> Iterator[int]:
        """Serve from a thread while the block runs, which is given the port: for tests and notebooks."""
        started: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

        async def run() -> None:
            stop = asyncio.Event()
            async with self.listening() as port:
                started.set_result((port, asyncio.get_running_loop(), stop))
                await stop.wait()

        def serve_in_thread() -> None:
            try:
                asyncio.run(run())
            except BaseException as error:
                if started.done():
                    raise
                started.set_exception(error)

        thread = threading.Thread(target=serve_in_thread, daemon=True)
        thread.start()
        port, loop, stop = started.result()
        try:
            yield port
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()

    async def _admit(self, connection: ServerConnection, request: HttpRequest) -> Response | None:
        """Answer a health check, turn away who has no key or no room; None lets the connection through."""
        if request.path == HEALTH_PATH:
            return connection.respond(HTTPStatus.OK, "ok\n")
        if not self._has_key(request):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "expected the header Authorization: Api-Key KEY\n")
        if self._sessions >= self.settings.max_sessions:
            return connection.respond(
                HTTPStatus.SERVICE_UNAVAILABLE, f"all {self.settings.max_sessions} sessions are taken\n"
            )
        return None

    def _has_key(self, request: HttpRequest) -> bool:
        if self.settings.api_key is None:
            return True
        given = request.headers.get_all("Authorization")
        expected = f"Api-Key {self.settings.api_key}"
        return len(given) == 1 and hmac.compare_digest(given[0].encode(), expected.encode())

    async def _connected(self, connection: ServerConnection) -> None:
        """One connection, from the metadata to its end; an error of one is no business of the others."""
        self._sessions += 1
        who = connection.remote_address
        try:
            await connection.send(self._hello)
            await self._converse(connection)
        except ConnectionClosed as closed:
            log.info("client %s is gone: %s", who, closed)
        except _IdleError as idle:
            log.info("client %s: %s", who, idle)
            await connection.close(GOING_AWAY, str(idle))
        except UserError as error:
            reason = " ".join(str(error)[:MAX_REASON_LENGTH].split())
            log.warning("client %s: %s", who, reason)
            await _refuse(connection, reason)
        except Exception as error:
            log.exception("client %s: the policy failed", who)
            await _refuse(connection, f"the policy failed with {type(error).__name__}; the server's log says where")
        finally:
            self._sessions -= 1

    async def _converse(self, connection: ServerConnection) -> None:
        loop, worker = asyncio.get_running_loop(), self._worker
        session = Session(await loop.run_in_executor(worker, self._new_policy), self.settings.hold_frames)
        while True:
            data = await self._in_time(connection.recv())
            if not isinstance(data, bytes):
                raise UserError("expected a binary frame with a msgpack message, got a text frame")
            await self._in_time(connection.send(await loop.run_in_executor(worker, session.answer, data)))

    async def _in_time(self, client: Awaitable[Any]) -> Any:
        """What the client is waited for; time that the policy takes is not the client's."""
        try:
            async with asyncio.timeout(self.settings.idle_timeout_s):
                return await client
        except TimeoutError as error:
            raise _IdleError(f"no request for {self.settings.idle_timeout_s:g} s") from error


async def _refuse(connection: ServerConnection, message: str) -> None:
    """Say what was wrong in a text frame, then close."""
    with suppress(ConnectionClosed):
        await connection.send(message)
        await connection.close(INTERNAL_ERROR, "the reason is in the text frame before")
