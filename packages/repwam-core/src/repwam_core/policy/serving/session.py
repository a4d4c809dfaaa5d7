"""One client's side of a served policy: bytes in, bytes out, with its own episode. Knows nothing of sockets."""

from __future__ import annotations

import time
from typing import Protocol, runtime_checkable

import numpy as np
from repvitok.runtime.errors import UserError

from repwam_core.interface import ActionChunk, Observation
from repwam_core.policy.serving.protocol import Request, chunk_to_message
from repwam_core.policy.serving.wire import pack, unpack

__all__ = ["ServablePolicy", "Session"]


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


class Session:
    """Answers the requests of one connection with a policy that nobody else uses.

    Args:
        policy: whose state is this session's alone; weights may be shared with other sessions' policies.
    """

    def __init__(self, policy: ServablePolicy) -> None:
        self._policy = policy
        self._begun = False

    def answer(self, data: bytes) -> bytes:
        """Answer one request; takes as long as the policy needs.

        Raises:
            ValueError: for a message that is damaged or does not fit the policy. The session cannot go on.
        """
        start_s = time.perf_counter()
        request = Request.from_message(unpack(data))
        observation = request.observation()
        begins = request.reset or not self._begun
        if begins and request.executed is not None:
            raise UserError("executed: nothing was carried out yet in an episode that this request begins")
        if begins:
            self._policy.reset(request.prompt, request.seed)
            self._begun = True
        if request.executed is not None:
            self._policy.record(request.executed)
        if observation is None:
            return pack({"reset": True})
        infer_s = time.perf_counter()
        chunk = self._policy.act(observation)
        end_s = time.perf_counter()
        return pack(chunk_to_message(chunk, {"infer_ms": 1e3 * (end_s - infer_s), "total_ms": 1e3 * (end_s - start_s)}))
