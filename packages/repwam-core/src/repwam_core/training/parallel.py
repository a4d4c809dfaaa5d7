"""Training on many ranks: which ranks share a copy of the model, and how the model is cut up among them.

FSDP2, one unit per layer. With several nodes the parameters are sharded inside a node and replicated across nodes
(HSDP): the traffic of every layer stays inside, and only gradients cross.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from repvitok.callbacks import generations_of
from repvitok.errors import UserError
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method as unsharded_method

from repwam_core.model.blocks import WAMLayer
from repwam_core.model.config import Recompute
from repwam_core.model.wam import WorldActionModel
from repwam_core.training.distributed_checkpoint import load_sharded, save_sharded


@dataclass(frozen=True, kw_only=True)
class ScaleSettings:
    """What training trades at scale; none of it changes what is computed, beyond rounding.

    Attributes:
        recompute: what layers compute again in the backward pass: "none", "selective" (all but attention), "full", or
            "offload": full, from inputs that wait in the host's memory, two copies over its bus per layer and step.
        compile: compile what surrounds attention in every layer with torch.compile.
        attention: see `attention.make_attention`.
        init: "stream" draws the initial weights one after the other; "per_parameter" each by its name, which a model
            needs that is sharded from the start.
    """

    recompute: Recompute = "none"
    compile: bool = False
    attention: str = "auto"
    init: str = "stream"

    def __post_init__(self) -> None:
        for name, choices in (
            ("recompute", get_args(Recompute)),
            ("attention", ("auto", "flex", "blocked", "dense")),
            ("init", ("stream", "per_parameter")),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"scale.{name}: expected one of {choices}, got {getattr(self, name)!r}")


class ShardedStrategy(ModelParallelStrategy):
    """Lightning strategy for FSDP2 and HSDP, with checkpoints that any number of ranks can resume from.

    Args:
        shard_size: ranks over which a copy of the parameters is spread; None is the ranks of one node.
        process_group_backend: "nccl" or "gloo"; chosen by the device when None.
        timeout_minutes: how long a rank waits for the others.
    """

    def __init__(
        self,
        shard_size: int | None = None,
        process_group_backend: str | None = None,
        timeout_minutes: float = 30.0,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            process_group_backend=process_group_backend,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.shard_size = shard_size
        self.sharding_mesh: DeviceMesh | None = None

    def setup_environment(self) -> None:
        """Connect the ranks, and lay them out: over a copy of the model, and over copies."""
        ranks = self.num_nodes * self.num_processes
        size = self.num_processes if self.shard_size is None else self.shard_size
        if size < 1 or ranks % size:
            raise UserError(f"shard_size: expected a divisor of the {ranks} ranks, got {size}")
        self._data_parallel_size = ranks
        super().setup_environment()
        kind = self.root_device.type
        if size == ranks:
            self.sharding_mesh = init_device_mesh(kind, (ranks,), mesh_dim_names=("shard",))
        else:
            self.sharding_mesh = init_device_mesh(kind, (ranks // size, size), mesh_dim_names=("replicate", "shard"))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: `save_checkpoint` writes every rank's own part."""
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:  # noqa: ARG002
        """Nothing, as above."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a folder of every rank's parts; `filepath` leads to the old one or the new one whole."""
        module, path = self._module(), Path(self.broadcast(str(filepath)))
        with module.live_weights():
            save_sharded(checkpoint, path, module, self.optimizers[0], self, generations_of(storage_options))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:  # noqa: ARG002
        """Read every rank's parts, whatever number of ranks wrote them."""
        path = Path(self.broadcast(str(checkpoint_path)))
        return load_sharded(path, self._module(), self.optimizers[0] if self.optimizers else None)

    def _module(self) -> Any:
        if self.lightning_module is None:
            raise RuntimeError("the strategy is not connected to a module yet")
        return self.lightning_module


def shard(wam: WorldActionModel, mesh: DeviceMesh, layer_dtype: torch.dtype | None) -> None:
    """Cut a model up over a mesh, each layer a unit of its own.

    Args:
        wam: most often on the meta device; the parameters become DTensors.
        mesh: ("shard",) or ("replicate", "shard").
        layer_dtype: type in which the layers' parameters are gathered and used; the sharded ones, the gradients'
            reduction and the optimizer stay in float32. None gathers them as they are.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=layer_dtype, reduce_dtype=torch.float32 if layer_dtype else None, cast_forward_inputs=False
    )
    for layer in wam.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(wam, mesh=mesh)
    unsharded_method(wam, "embed_text")


def gather_for_sampling(wam: WorldActionModel, gathered: bool) -> None:
    """Keep every layer's parameters whole, so that ranks may roll out by themselves; or sharded again."""
    if not isinstance(wam, FSDPModule):
        return
    # The root stays whole from its forward to its backward pass, as FSDP2 has it by default: its outputs are no plain
    # tensors, so that nothing would gather it again.
    for layer in wam.layers:
        if isinstance(layer, FSDPModule):
            layer.set_reshard_after_forward(not gathered, recurse=False)
    for module in wam.modules():
        if isinstance(module, FSDPModule):
            module.unshard() if gathered else module.reshard()


def prepare_layers(wam: WorldActionModel, scale: ScaleSettings) -> None:
    """Let all layers recompute, and be compiled, as the settings say."""
    for layer in wam.layers:
        if isinstance(layer, WAMLayer):
            layer.recompute = scale.recompute
    if scale.compile:
        compile_layers(wam)


def compile_layers(wam: WorldActionModel) -> None:
    """Compile what surrounds attention in every layer, for any number of tokens.

    Attention itself depends on the packing and has kernels of its own, so that no new packing compiles anything again.
    """
    for layer in wam.layers:
        for name in ("before", "after"):
            setattr(layer, name, torch.compile(getattr(layer, name), dynamic=True))
