"""What stands between a policy and a robot; it is `repwam_client.interface`, under the name of version 0.1."""

from repwam_client.interface import (
    MAX_INSTRUCTION_BYTES,
    ActionChannel,
    ActionChunk,
    BasePolicy,
    BatchedBasePolicy,
    CommandKind,
    Embodiment,
    Observation,
    Units,
    channel_units,
    shared_channels,
    stack_observations,
    two_arm_names,
)

__all__ = [
    "MAX_INSTRUCTION_BYTES",
    "ActionChannel",
    "ActionChunk",
    "BasePolicy",
    "BatchedBasePolicy",
    "CommandKind",
    "Embodiment",
    "Observation",
    "Units",
    "channel_units",
    "shared_channels",
    "stack_observations",
    "two_arm_names",
]
