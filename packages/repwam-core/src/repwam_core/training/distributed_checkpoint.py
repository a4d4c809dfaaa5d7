"""Checkpoints of a sharded run: a folder of every rank's parts that any number of ranks can read.

    last.ckpt -> last.ckpt-000120     a link, replaced in one step once the folder is whole
    last.ckpt-000120/                 __0_0.distcp ... and .metadata (torch.distributed.checkpoint), meta.pt

Tensors (parameters, moments, averages) are in the parts; everything else, plain values, is in meta.pt. A run that is
killed while it writes leaves the link on the last whole folder.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from repvitok.checkpointing import SHARDED_META, read_checkpoint
from repvitok.errors import UserError
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

EMA = "ema"


def save_sharded(
    checkpoint: dict[str, Any],
    path: Path,
    module: Any,
    optimizer: torch.optim.Optimizer,
    barrier: Callable[[], None],
    is_first: bool,
) -> None:
    """Write a checkpoint; every rank calls this.

    Args:
        checkpoint: what Lightning and the module want to keep; plain values.
        path: where the link is put.
        module: the LightningModule, with its `ema`.
        optimizer: whose state is written.
        barrier: waits for all ranks.
        is_first: whether this rank writes what is not sharded.
    """
    folder = path.with_name(f"{path.name}-{checkpoint['global_step']:06d}")
    partial = folder.with_name(f".{folder.name}.partial")
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    save(_tensors(module, optimizer), checkpoint_id=partial)
    if is_first:
        plain = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        groups = [_settings(group) for group in optimizer.param_groups]
        torch.save({**plain, "optimizer_groups": groups, "ema_updates": module.ema.updates}, partial / SHARDED_META)
        _publish(partial, folder, path)
    barrier()


def load_sharded(path: Path, module: Any, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Overwrite the module's parameters and averages, and the optimizer's state; return what is not sharded.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    plain = read_checkpoint(path)
    tensors = _tensors(module, optimizer, created=True)
    _check_names(path, tensors)
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


def _check_names(path: Path, tensors: Mapping[str, Tensor]) -> None:
    stored = PlainReader(path).read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        if name not in stored:
            raise UserError(f"{path} holds no {name!r}: load a checkpoint of this model and optimizer")
        size = getattr(stored[name], "size", None)
        if size != tensor.shape:
            raise UserError(f"{path}: {name!r} has shape {tuple(size or ())}, the model's is {tuple(tensor.shape)}")


def _publish(partial: Path, folder: Path, path: Path) -> None:
    """Give the folder its name, let the link lead to it, and remove older folders."""
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    link = path.with_name(f".{path.name}.{os.getpid()}.link")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    os.replace(link, path)
    for old in path.parent.glob(f"{path.name}-*"):
        if old.name != folder.name:
            shutil.rmtree(old, ignore_errors=True)
    for leftover in path.parent.glob(f".{path.name}-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
