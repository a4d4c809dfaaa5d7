"""The model of a run where it is trained: drawn anew or pretrained, whole or cut up among ranks, and its checkpoints.

FSDP2, one unit per layer. With several nodes the parameters are sharded inside a node and replicated across nodes
(HSDP): the traffic of every layer stays inside, and only gradients cross.

A checkpoint is a folder of every rank's parts that any number of ranks can read:

    last.ckpt -> last.ckpt-000120     a link, replaced in one step once the folder is whole
    last.ckpt-000120/                 __0_0.distcp ... and .metadata (torch.distributed.checkpoint), meta.pt
    last.ckpt-000060/                 the generation before

Tensors (parameters, moments, averages) are in the parts; everything else, plain values, is in meta.pt, with the sizes
of the parts. A run that is killed while it writes leaves the link on the last whole folder.
"""

from __future__ import annotations

import glob
import io
import os
import pickle
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from repvitok.runtime.checkpointing import PART_BYTES, SHARDED_META, generations_of, read_checkpoint, sharded_folders
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import WriteError, sync_file, sync_folder, translated
from repvitok.runtime.training import copy_whole
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method as unsharded_method

from repwam_core.model.blocks import WAMLayer
from repwam_core.model.config import ActionSpace, Recompute, WAMConfig
from repwam_core.model.wam import WorldActionModel, compile_layers, initial_draws
from repwam_core.training.finetuning import LORA, FineTuning

if TYPE_CHECKING:
    from repwam_core.data.packing import Mixture
    from repwam_core.training.module import WAMTraining

EMA = "ema"
_INDEX = (
    "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)  # fmt: skip
_PLAIN = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _INDEX),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
    *(("torch", name) for name in ("float64", "float32", "bfloat16", "float16", "int64", "int32", "bool")),
}


def build_wam(training: WAMTraining, mixture: Mixture) -> WorldActionModel:
    """Build the model that `training` asks for, sized by the data; or load a pretrained one and add the space.

    It is made where the strategy will train it; every parameter is drawn there, once.
    """
    space = _space(training, mixture)
    torch_seed = int(np.random.SeedSequence((training.seed, 1)).generate_state(1, np.uint64)[0] >> 1)
    strategy = training.trainer.strategy
    device = torch.device("cpu") if strategy is None else strategy.root_device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(torch_seed)
        if training.init_from is None:
            config, by_name = _config(training, mixture, space), training.scale.init == "per_parameter"
            with torch.device("meta") if by_name else device:
                wam = WorldActionModel(config)
            if by_name:
                wam.to_empty(device=device)
                initialise(wam, training.seed)
        else:
            wam = _pretrained(training, device)
            known = wam.config
            if training.space not in wam.config.spaces:
                wam.add_action_space(training.space, space)
            wam.set_look_ahead(training.loss_settings.look_ahead)
            training.finetuning = _finetuning(training, known)
            if training.finetuning:
                training.finetuning.apply(wam)
                initialise(wam, training.seed, LORA)
    _check_fit(wam.config, mixture, training.space, space)
    return wam.train()


def build_sharded_wam(
    training: WAMTraining, mixture: Mixture, strategy: ShardedStrategy, layer_dtype: torch.dtype | None
) -> WorldActionModel:
    """The model of `build_wam`, of which each rank holds its part alone; the same weights as in one process."""
    if training.scale.init != "per_parameter":
        raise UserError("model.scale.init: a sharded model is drawn with init 'per_parameter', got 'stream'")
    if strategy.sharding_mesh is None:
        raise RuntimeError("the strategy has not laid out its ranks yet")
    space = _space(training, mixture)
    pretrained = None if training.init_from is None else _pretrained(training, torch.device("cpu"))
    config = _config(training, mixture, space) if pretrained is None else pretrained.config
    if pretrained is not None:
        training.finetuning = _finetuning(training, config)
    config = replace(config, look_ahead=training.loss_settings.look_ahead)
    if training.space not in config.spaces:
        config = config.with_space(training.space, space)
    _check_fit(config, mixture, training.space, space)
    with torch.device("meta"):
        wam = WorldActionModel(config)
    if training.finetuning:
        training.finetuning.apply(wam)
    shard(wam, strategy.sharding_mesh, layer_dtype)
    wam.to_empty(device=strategy.root_device)
    initialise(wam, training.seed)
    if pretrained is not None:
        load_whole(wam, pretrained.state_dict())
    return wam.train()


def initialise(wam: WorldActionModel, seed: int, ending: tuple[str, ...] = ("",)) -> None:
    """Draw every parameter whose name has such an ending, sharded or not, by a generator of its own of (seed, name).

    A model that is spread over many ranks so starts from the same weights as in one process, and no rank ever holds
    more than one whole parameter (docs/decisions/031). Drawn where the parameters are: GPUs give other numbers than
    CPUs.
    """
    for name, parameter, draw in initial_draws(wam):
        if not name.endswith(ending):
            continue
        state = np.random.SeedSequence((seed, zlib.crc32(name.encode()))).generate_state(1, np.uint64)
        with parameter.device:
            generator = torch.Generator(parameter.device).manual_seed(int(state[0] >> 1))
            copy_whole(parameter, draw(tuple(parameter.shape), generator))


def load_whole(wam: WorldActionModel, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite the parameters that `tensors` has, sharded or not, by values that every rank holds whole."""
    for name, parameter in wam.named_parameters():
        if name in tensors:
            copy_whole(parameter, tensors[name])


def _pretrained(training: WAMTraining, device: torch.device) -> WorldActionModel:
    """The pretrained model; where actions have had no tokens of their own, without the head that predicted them."""
    wam = WorldActionModel.from_pretrained(training.init_from or "", device=device)
    if not wam.config.joint_actions or training.space in wam.config.spaces:
        return wam
    with torch.device("meta"):
        model = WorldActionModel(replace(wam.config, joint_actions=0))
    kept = {name: value for name, value in wam.state_dict().items() if not name.startswith("joint_")}
    model.load_state_dict(kept, strict=True, assign=True)
    return model


def _finetuning(training: WAMTraining, known: WAMConfig) -> FineTuning:
    """What the run trains of a pretrained model of the config `known`; what that lacks is drawn anew, and trained."""
    new = [] if training.space in known.spaces else [f"spaces.{training.space}."]
    return replace(training.finetuning, anew=(*new, "look_ahead."))


def _space(training: WAMTraining, mixture: Mixture) -> ActionSpace:
    return ActionSpace(
        channels=len(mixture.action_channels),
        vectors_per_transition=mixture.vectors_per_transition,
        state_channels=len(mixture.state_channels) if training.use_state else 0,
    )


def _config(training: WAMTraining, mixture: Mixture, space: ActionSpace) -> WAMConfig:
    sizes = {"latent_dim": mixture.latent_dim, "text_dim": mixture.text_dim}
    by_training = {"look_ahead": training.loss_settings.look_ahead, "spaces": {training.space: space}}
    return WAMConfig.preset(training.preset, **{**sizes, **training.wam_fields, **by_training})


def _check_fit(config: WAMConfig, mixture: Mixture, name: str, space: ActionSpace) -> None:
    expected = {"latent_dim": config.latent_dim, "text_dim": config.text_dim, f"space {name!r}": config.space(name)}
    got = {"latent_dim": mixture.latent_dim, "text_dim": mixture.text_dim, f"space {name!r}": space}
    wrong = [f"{key}: the model has {expected[key]}, the data {got[key]}" for key in got if got[key] != expected[key]]
    if wrong:
        raise UserError("the model does not fit the data: " + "; ".join(wrong))


def save_sharded(
    checkpoint: dict[str, Any],
    path: Path,
    module: Any,
    optimizer: torch.optim.Optimizer,
    strategy: Any,
    generations: int = 1,
) -> None:
    """Write a checkpoint; every rank calls this.

    Args:
        checkpoint: what Lightning and the module want to keep; plain values.
        path: where the link is put.
        module: the LightningModule, with its `ema`.
        optimizer: whose state is written.
        strategy: Lightning's, of all ranks.
        generations: how many states are kept, this one included.

    Raises:
        WriteError: on the first rank only, if any rank could not write; the link leads where it led.
    """
    partial = path.with_name(f".{path.name}.partial")

    def begin() -> None:
        remove_unfinished(path)
        partial.mkdir(parents=True)

    def finish() -> None:
        plain = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        groups = [_settings(group) for group in optimizer.param_groups]
        sizes = {part.name: part.stat().st_size for part in partial.iterdir()}
        meta = {**plain, "optimizer_groups": groups, "ema_updates": module.ema.updates, PART_BYTES: sizes}
        torch.save(meta, partial / SHARDED_META)  # last: a folder that has it is whole
        sync_file(partial / SHARDED_META)
        sync_folder(partial)
        _publish(partial, path, generations)

    failure = strategy.broadcast(_failure(path, begin) if strategy.is_global_zero else None)
    failure = failure or _failure(path, lambda: _save_parts(_tensors(module, optimizer), partial))
    failure = failure or strategy.broadcast(_failure(path, finish) if strategy.is_global_zero else None)
    if failure is not None and strategy.is_global_zero:
        raise WriteError(failure)


def _failure(path: Path, write: Callable[[], None]) -> str | None:
    """What kept something from being written for `path`; None where it was."""
    try:
        with translated(path):
            write()
    except WriteError as error:
        return str(error)
    return None


def _save_parts(tensors: dict[str, Tensor], partial: Path) -> None:
    """Writes every rank's part; what any rank could not write is an error on all."""
    try:
        save(tensors, checkpoint_id=partial)
    except CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise reason from error


def load_sharded(path: Path, module: Any, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Overwrite the module's parameters and averages, and the optimizer's state; return what is not sharded."""
    if path.is_file():
        raise UserError(
            f"{path} is the checkpoint of a run that was not sharded: use its trainer.strategy, or start from its "
            "exported weights"
        )
    plain = read_checkpoint(path)
    stored = PlainReader(path).read_metadata().state_dict_metadata
    tensors = _tensors(module, optimizer, created=True)
    if optimizer is not None:
        for name, parameter in module.named_parameters():
            states = [f"optimizer.{name}.{key}" for key in optimizer.state[parameter]]
            if not any(state in stored for state in states):  # it had no gradient so far, as another space's weights
                del optimizer.state[parameter]
                for state in states:
                    del tensors[state]
    for name, tensor in tensors.items():
        if name not in stored:
            raise UserError(f"{path} holds no {name!r}: load a checkpoint of this model and optimizer")
        size = getattr(stored[name], "size", None)
        if size != tensor.shape:
            raise UserError(f"{path}: {name!r} has shape {tuple(size or ())}, the model's is {tuple(tensor.shape)}")
    load(tensors, storage_reader=PlainReader(path))
    module.ema.updates = plain["ema_updates"]
    if optimizer is not None:
        for group, stored in zip(optimizer.param_groups, plain["optimizer_groups"], strict=True):
            group.update(stored)
    return {**plain, "state_dict": {}, "optimizer_states": []}


def read_whole(path: str | Path) -> dict[str, Any]:
    """Read a sharded checkpoint without any other rank, as the single file of the same run would read.

    Returns:
        What is not sharded, with "state_dict" (prefix "wam.") and the averages under "ema_average".
    """
    path = Path(path)
    plain, reader = read_checkpoint(path), PlainReader(path)
    stored = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    load(tensors, storage_reader=reader, no_dist=True)
    average = {name.removeprefix(f"{EMA}."): value for name, value in tensors.items() if name.startswith(f"{EMA}.")}
    weights = {name: value for name, value in tensors.items() if not name.startswith(f"{EMA}.")}
    return {**plain, "state_dict": weights, "ema_average": average}


class PlainReader(FileSystemReader):
    """Reads parts whose index names tensors only, and runs no code that the index may contain."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The index of the parts."""
        content = (Path(self.path) / ".metadata").read_bytes()
        metadata = _PlainUnpickler(io.BytesIO(content)).load()
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise UserError(f"{self.path}: expected tensors alone, {name} is none")
        return metadata


class _PlainUnpickler(pickle.Unpickler):
    """Builds the few classes that an index is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN:
            raise UserError(f"the index of a checkpoint names {module}.{name}, which it has no use for")
        return super().find_class(module, name)


def _tensors(module: nn.Module, optimizer: torch.optim.Optimizer | None, created: bool = False) -> dict[str, Tensor]:
    """Every tensor of a run by its name; `created` makes the optimizer's states first, as a step would."""
    parameters = dict(module.named_parameters())
    tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in parameters.items()}
    average: Mapping[str, Tensor] = module.ema.average  # type: ignore[assignment]
    tensors.update({f"{EMA}.{name}": value for name, value in average.items()})
    if optimizer is not None:
        if created:
            optimizer.create_states()  # type: ignore[attr-defined]
        for name, parameter in parameters.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _publish(partial: Path, path: Path, generations: int) -> None:
    """Give the folder a name that was never used, let the link lead to it, and remove the oldest generations."""
    step = read_checkpoint(partial, mmap=True)["global_step"]
    folder, again = path.with_name(f"{path.name}-{step:06d}"), 0
    while os.path.lexists(folder):
        again += 1
        folder = path.with_name(f"{path.name}-{step:06d}-{again}")
    before = Path(os.readlink(path)).name if path.is_symlink() else None
    os.replace(partial, folder)
    sync_folder(path.parent)
    link = path.with_name(f".{path.name}.link")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, path)
    sync_folder(path.parent)
    others = [old for old in sharded_folders(path) if old.name != folder.name]
    others.sort(key=lambda old: old.name != before)  # what the link led to is the newest
    for old in others[max(0, generations - 1) :]:
        gone = path.with_name(f".{old.name}.partial")  # so that a kill leaves no half of it under its name
        os.replace(old, gone)
        shutil.rmtree(gone, ignore_errors=True)


def remove_unfinished(path: Path) -> None:
    """What killed writers left; only one run at a time writes `path`."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    path.with_name(f".{path.name}.link").unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class ScaleSettings:
    """What training trades at scale; none of it changes what is computed, beyond rounding.

    Attributes:
        recompute: what layers compute again in the backward pass: "none", "selective" (all but attention), "full", or
            "offload": full, from inputs that wait in the host's memory, two copies over its bus per layer and step.
        compile: compile what surrounds attention in every layer with torch.compile; None does so on a GPU.
        attention: see `attention.make_attention`.
        residual: type of the tokens between the layers' parts: "float32", or "bfloat16", half the memory and traffic;
            norms are computed in float32 either way.
        init: "stream" draws the initial weights one after the other; "per_parameter" each by its name, which a model
            needs that is sharded from the start.
    """

    recompute: Recompute = "none"
    compile: bool | None = None
    attention: str = "auto"
    residual: str = "float32"
    init: str = "stream"

    def __post_init__(self) -> None:
        for name, choices in (
            ("recompute", get_args(Recompute)),
            ("attention", ("auto", "flex", "blocked", "dense")),
            ("residual", ("float32", "bfloat16")),
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
    for layer in (*wam.layers, *wam.look_ahead):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(wam, mesh=mesh)
    unsharded_method(wam, "embed_text")


def gather_for_sampling(wam: WorldActionModel, gathered: bool) -> None:
    """Keep every layer's parameters whole, so that ranks may roll out by themselves; or sharded again."""
    if not isinstance(wam, FSDPModule):
        return
    # The root stays whole from its forward to its backward pass, as FSDP2 has it by default: its outputs are no plain
    # tensors, so that nothing would gather it again.
    for layer in (*wam.layers, *wam.look_ahead):
        if isinstance(layer, FSDPModule):
            layer.set_reshard_after_forward(not gathered, recurse=False)
    for module in wam.modules():
        if isinstance(module, FSDPModule):
            module.unshard() if gathered else module.reshard()


def prepare_layers(wam: WorldActionModel, scale: ScaleSettings) -> None:
    """Let all layers recompute, and be compiled, as the settings say for the device that the model is on."""
    wam.residual_dtype = torch.bfloat16 if scale.residual == "bfloat16" else None
    for layer in wam.modules():
        if isinstance(layer, WAMLayer):
            layer.recompute = scale.recompute
    if wam.video_in.weight.is_cuda if scale.compile is None else scale.compile:
        compile_layers(wam, dynamic=True)
