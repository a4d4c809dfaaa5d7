"""Atomic writes: a crash leaves the old file or the new one, never half of it. And one writer at a time."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from repvitok.errors import UserError


def partial_path(path: Path) -> Path:
    """Where to write before the rename to `path`: beside it, hidden, with the same suffix.

    One name per path, so that a second attempt overwrites what a killed one left.
    """
    return path.with_name(f".partial-{path.name}")


def replace_durably(partial: Path, path: Path) -> None:
    """Flushes `partial` to disk, then renames it to `path`."""
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_text_atomic(path: Path, text: str) -> None:
    """Writes a small text file, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    partial.write_text(text, encoding="utf-8")
    replace_durably(partial, path)


def write_json_atomic(path: Path, document: Any) -> None:
    """Writes an indented JSON document."""
    write_text_atomic(path, json.dumps(document, indent=2))


@contextmanager
def sole_writer(folder: Path, otherwise: str) -> Iterator[None]:
    """Holds a folder for the length of a block, by a lock on its file `.lock`, which is freed with the process.

    Raises:
        UserError: `otherwise`, when another process holds it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(otherwise) from error
        yield
