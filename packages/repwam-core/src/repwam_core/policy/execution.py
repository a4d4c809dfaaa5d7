"""From chunks of actions to one action at a time; it is `repwam_client.execution`, under the name of version 0.1."""

from repwam_client.execution import (
    EXECUTIONS,
    ChunkedPolicy,
    Execution,
    Handover,
    actions_to_execute,
)

__all__ = [
    "EXECUTIONS",
    "ChunkedPolicy",
    "Execution",
    "Handover",
    "actions_to_execute",
]
