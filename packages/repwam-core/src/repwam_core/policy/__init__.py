"""From observations to actions: a trained policy, and how its chunks are carried out. Imported on first use."""

from typing import TYPE_CHECKING

from repvitok.runtime.lazy import lazy_exports

if TYPE_CHECKING:
    from repwam_core.policy.chunking import ChunkedPolicy
    from repwam_core.policy.openloop import OpenLoopResult, evaluate_open_loop
    from repwam_core.policy.policy import BatchedPolicy, Policy

__all__ = ["BatchedPolicy", "ChunkedPolicy", "OpenLoopResult", "Policy", "evaluate_open_loop"]

_HOMES = {
    "BatchedPolicy": "policy",
    "ChunkedPolicy": "chunking",
    "OpenLoopResult": "openloop",
    "Policy": "policy",
    "evaluate_open_loop": "openloop",
}

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
