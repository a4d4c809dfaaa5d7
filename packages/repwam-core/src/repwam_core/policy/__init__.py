"""From observations to actions: a trained policy, and how its chunks are carried out. Imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
