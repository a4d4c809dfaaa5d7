"""Checkpoint files that are whole or absent: atomic writes, safe reads, the newest one to resume from."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from repvitok.errors import UserError

LAST = "last.ckpt"
SHARDED_META = "meta.pt"
"""In a checkpoint that is a folder, written by many ranks: everything but the tensors."""


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> Path:
    """Writes a checkpoint so that `path` holds the old file or the new one whole, never a part.

    The bytes go to a hidden file in the same folder, are forced to disk and renamed over `path`; leftovers of
    writers that were killed are removed first.

    Returns:
        The path written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return path


def read_checkpoint(
    path: str | Path, map_location: str | torch.device | Callable[..., Any] = "cpu", mmap: bool = False
) -> dict[str, Any]:
    """Reads a checkpoint without running any code it may contain (`weights_only`).

    Of a checkpoint that is a folder, from a sharded run, everything but the tensors is read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, not a checkpoint, or holds more than tensors and plain values.
    """
    path = Path(path)
    path = path / SHARDED_META if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give the path of a .ckpt file written by `fit`")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) is not a readable checkpoint: it is truncated or was written by "
            f"something else ({reason[:120]}). Delete it, or give another one"
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, expected a checkpoint written by `fit`")
    return checkpoint


def resume_path(folder: str | Path) -> Path | None:
    """Returns the newest checkpoint in a run's folder that can be read, or None when there is none."""
    found = sorted(Path(folder).glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next((path for path in found if _is_readable(path)), None)


def resolve_checkpoint(path: str | Path) -> Path:
    """Takes a checkpoint file, or a run's folder for its newest readable one.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(path)
    if not path.is_dir() or is_sharded(path):
        return path
    found = resume_path(path)
    if found is None:
        raise FileNotFoundError(f"no readable checkpoint in {path}: expected the folder of a training run")
    return found


def is_sharded(path: str | Path) -> bool:
    """Whether a path is a checkpoint that many ranks wrote, a folder."""
    return (Path(path) / SHARDED_META).is_file()


def _is_readable(path: Path) -> bool:
    try:
        read_checkpoint(path, mmap=True)
    except (FileNotFoundError, ValueError):
        return False
    return True


def _remove_leftovers(path: Path) -> None:
    for leftover in path.parent.glob(f".{path.name}.*.partial"):
        pid = int(leftover.name.split(".")[-2])
        if not _is_running(pid):
            leftover.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Forces the rename itself to disk, where folders can be opened for that (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
