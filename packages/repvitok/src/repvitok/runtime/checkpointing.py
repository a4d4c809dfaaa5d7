"""Checkpoint files that are whole or absent: atomic writes, safe reads, the newest one to resume from.

A run keeps its last states as generations: `last.ckpt`, and before it `last.1.ckpt`, ... A state that many ranks wrote
is a folder, `last.ckpt-000120`, to which `last.ckpt` is a link.
"""

from __future__ import annotations

import os
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from repvitok.runtime.errors import UserError
from repvitok.runtime.files import atomic_file, is_running, sync_file, sync_folder
from repvitok.runtime.pretrained import fitted_weights, load_weights

Model = TypeVar("Model", bound=nn.Module)

LAST = "last.ckpt"
SHARDED_META = "meta.pt"
"""In a checkpoint that is a folder, written by many ranks: everything but the tensors."""
PART_BYTES = "part_bytes"
"""In a sharded checkpoint's meta.pt: how many bytes each of its other files has."""


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path, generations: int = 1) -> Path:
    """Writes a checkpoint so that `path` holds the old file or the new one whole, never a part.

    Args:
        checkpoint: tensors and plain values.
        path: the file, `NAME.ckpt`.
        generations: how many states to keep: the new one, and those before it as `NAME.1.ckpt`, ...

    Returns:
        The path written.

    Raises:
        WriteError: it cannot be written; all generations are as they were.
    """
    path = Path(path)
    if path.is_symlink() and path.is_dir():
        path.unlink()  # of a sharded run, whose folder stays
    path = Path(os.path.realpath(path))
    for leftover in path.parent.glob(f".{path.name}.*.partial"):  # of version 0.1, killed while it saved
        pid = leftover.name.split(".")[-2]
        if pid.isdecimal() and not is_running(int(pid)):
            leftover.unlink(missing_ok=True)
    with atomic_file(path) as partial:
        torch.save(checkpoint, partial)
        sync_file(partial)  # a full disk must be known before anything is renamed
        _age(path, generations)
    sync_folder(path.parent)
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
    except OSError:
        raise
    except Exception as error:  # damaged bytes end in any of them: IndexError, UnicodeDecodeError, struct.error, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) is not a readable checkpoint: it is truncated or was written by "
            f"something else ({reason[:120]}). Give another one"
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, expected a checkpoint written by `fit`")
    return checkpoint


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint of a run.

    Attributes:
        path: the file, or the folder of a sharded run.
        step: the training step it was taken after.
        damaged: newer ones that cannot be used, and why.
    """

    path: Path
    step: int
    damaged: dict[Path, str]


def find_checkpoint(folder: str | Path) -> Found | None:
    """The newest whole checkpoint in a run's folder, `last.ckpt` and its generations before any other .ckpt file.

    Every byte of a file is compared with its checksum; of a sharded checkpoint, the sizes of all its parts.

    Returns:
        None where the folder holds no checkpoint at all.
    """
    damaged: dict[Path, str] = {}
    for path in _candidates(Path(folder)):
        try:
            return Found(path, _require_whole(path), damaged)
        except (UserError, OSError) as error:
            damaged[path] = str(error)
    if not damaged:
        return None
    why = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
    raise UserError(f"no checkpoint in {folder} is whole ({why}). Restore one, or move them away to start at step 0")


def resume_path(folder: str | Path) -> Path | None:
    """The path of `find_checkpoint`, with a warning where a newer one is damaged."""
    found = find_checkpoint(folder)
    if found is None:
        return None
    warn_of_damaged(found)
    return found.path


def warn_of_damaged(found: Found) -> None:
    """One line on stderr for each checkpoint that was passed over."""
    for path, reason in found.damaged.items():
        print(f"warning: {path} is damaged ({reason}); using {found.path} of step {found.step}", file=sys.stderr)


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint so that nothing reads or overwrites it; returns its new place."""
    for number in range(1, 1000):
        kept = path.with_name(f"{path.name}.damaged-{number}")
        if not os.path.lexists(kept):
            os.rename(path, kept)
            return kept
    raise UserError(f"{path.parent} holds a thousand damaged checkpoints; remove some")


def resolve_checkpoint(path: str | Path) -> Path:
    """Takes a checkpoint file, or a run's folder for its newest readable one."""
    path = Path(path)
    if not path.is_dir() or is_sharded(path):
        return path
    found = resume_path(path)
    if found is None:
        raise FileNotFoundError(f"no readable checkpoint in {path}: expected the folder of a training run")
    return found


def read_section(checkpoint: Mapping[str, Any], where: str, *names: str) -> Mapping[str, Any]:
    """A part of a checkpoint by the names that lead to it."""
    found: Any = checkpoint
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{where} is damaged: expected a section {'.'.join(names)}, got {type(found).__name__}")
    return found


def stored_by(command: str, key: str, checkpoint: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """What a training module added to its checkpoint under `key`, to build the model from; refuses other checkpoints.

    Args:
        command: what should have written it, for messages.
        key: the section.
        checkpoint: as `read_checkpoint` reads it.
        where: the file, for messages.
    """
    if key not in checkpoint:
        raise UserError(
            f"{where} was not written by `{command}`: give that run's last.ckpt (keys {sorted(checkpoint)[:8]})"
        )
    return read_section(checkpoint, where, key)


def with_weights(
    model: Model,
    prefix: str,
    checkpoint: Mapping[str, Any],
    stored: Mapping[str, Any],
    where: str,
    *,
    averaged: bool = True,
) -> Model:
    """The model in evaluation mode with a checkpoint's weights, their average where the run kept one.

    Args:
        model: as it was trained, on any device, meta as well.
        prefix: of the model's own weights in the section "state_dict", such as "wam.".
        checkpoint: as `read_checkpoint` reads it.
        stored: what `stored_by` found there; "ema" is the average.
        where: the file, for messages.
        averaged: take the average; else the weights of the last step.
    """
    state = read_section(checkpoint, where, "state_dict")
    load_weights(model, {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}, where)
    if averaged and stored.get("ema", {}) is not None:  # None: the run kept no average
        expected = {name: value for name, value in model.named_parameters() if value.requires_grad}
        average = fitted_weights(read_section(stored, where, "ema", "average"), expected, f"{where}, averaged weights")
        model.load_state_dict(model.state_dict() | average, strict=True, assign=True)
    return model.eval()


def is_sharded(path: str | Path) -> bool:
    """Whether a path is a checkpoint that many ranks wrote, a folder."""
    return (Path(path) / SHARDED_META).is_file()


def sharded_folders(path: Path) -> list[Path]:
    """The folders of a sharded checkpoint's generations, `NAME.ckpt-<step>`, newest first; no others, whatever is
    called like them."""
    found = re.compile(rf"{re.escape(path.name)}-(\d+)(?:-(\d+))?")
    named = [(found.fullmatch(entry.name), entry) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    ours = [(int(match[1]), int(match[2] or 0), entry) for match, entry in named if match and is_sharded(entry)]
    return [entry for _, _, entry in sorted(ours, reverse=True)]


def generation(path: Path, number: int) -> Path:
    """The file of the state `number` saves ago: last.ckpt, last.1.ckpt, ..."""
    return path if number == 0 else path.with_name(f"{path.stem}.{number}{path.suffix}")


def _age(path: Path, generations: int) -> None:
    """Makes room for a new file at `path`: what is there becomes the generation before it, and stays there, too."""
    if not path.exists():
        return
    for number in range(generations - 1, 1, -1):
        if generation(path, number - 1).exists():
            os.replace(generation(path, number - 1), generation(path, number))
    if generations > 1:
        link = path.with_name(f".partial-{generation(path, 1).name}")
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # no second names in this file system: for a moment there is the older state alone
            link = path
        os.replace(link, generation(path, 1))
        if link != path:
            link.unlink(missing_ok=True)  # a rename onto another name of the same file does nothing


def _candidates(folder: Path) -> list[Path]:
    """All checkpoints of a run's folder, those to prefer first."""

    def preference(path: Path) -> tuple[bool, int, int]:
        found = re.fullmatch(r"last(?:\.(\d+))?\.ckpt", path.name)
        return (found is None, int(found[1] or 0) if found else 0, -path.lstat().st_mtime_ns)

    last = folder / LAST
    target, beside = Path(os.path.realpath(last)), []
    if last.is_symlink() and not target.is_dir() and target.parent != Path(os.path.realpath(folder)):
        beside = target.parent.glob("last.*.ckpt")  # the generations stand where the file is that the link leads to
    files = sorted({*folder.glob("*.ckpt"), *beside}, key=preference)
    ours = [path for path in files if not preference(path)[0]]
    linked = {Path(os.readlink(path)).name for path in ours if path.is_symlink()}
    shards = [path for path in sharded_folders(last) if path.name not in linked]
    return [*ours, *shards, *(path for path in files if preference(path)[0])]


def _require_whole(path: Path) -> int:
    """The step of a checkpoint of which every byte can be read."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"the link leads to {os.readlink(path)}, which is not there")
    checkpoint = read_checkpoint(path, mmap=not path.is_dir())
    if path.is_dir():
        for name, size in checkpoint.get(PART_BYTES, {}).items():
            found = (path / name).stat().st_size
            if found != size:
                raise UserError(f"{name} has {found} bytes, not {size}")
    file = path / SHARDED_META if path.is_dir() else path
    if zipfile.is_zipfile(file):
        try:
            with zipfile.ZipFile(file) as members:
                wrong = members.testzip()
        except OSError:
            raise
        except Exception as error:  # an archive's damaged headers: BadZipFile, UnicodeDecodeError, RuntimeError, ...
            raise UserError(f"not a whole checkpoint: {error}") from error
        if wrong is not None:
            raise UserError(f"the bytes of its {wrong.partition('/')[2]} do not fit their checksum")
    return int(checkpoint.get("global_step", 0))


def generations_of(storage_options: Any | None) -> int:
    """How many states to keep, from the one storage option that checkpoints take: {"generations": n}."""
    options = dict(storage_options or {})
    generations = options.pop("generations", 1)
    if options:
        raise UserError(f"checkpoints take no storage options but generations, got {options!r}")
    return generations
