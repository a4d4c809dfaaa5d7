"""How far a command is, as a bar on a terminal and a line now and then elsewhere; and a run's loss curves on disk."""

from __future__ import annotations

import csv
import errno
import io
import os
import sys
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from repvitok.runtime.documents import load_yaml
from repvitok.runtime.files import translated

SECONDS_BETWEEN_LINES = 30.0


class ProgressLines(tqdm):
    """A bar for a file: instead of being redrawn it says every `SECONDS_BETWEEN_LINES` where it stands, on a new line.

    What ends before that says nothing.
    """

    _told_s = 0.0

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:  # noqa: ARG002
        """Write a line if it is time."""
        now_s = time.time()  # as tqdm's start_t
        if now_s - max(self.start_t, self._told_s) >= SECONDS_BETWEEN_LINES:
            self._told_s = now_s
            print(self, file=self.fp, flush=True)
        return True

    def update(self, n: int | float | None = 1) -> bool | None:
        """Count `n` more, which may be none: a line is due by the clock, also while nothing is finished."""
        return super().update(n) or self.display()

    def close(self) -> None:
        """Write the last line, if there was one before."""
        if self._told_s and not self.disable:
            print(self, file=self.fp, flush=True)
        self.delay = float("inf")  # nothing was drawn that tqdm would have to end
        super().close()


def progress(
    iterable: Iterable[Any] | None = None,
    desc: str = "",
    total: int | float | None = None,
    unit: str = "it",
    *,
    force: bool = False,
) -> tqdm:
    """How far something is, on stderr, over `iterable` or moved by `.update(n)`.

    Args:
        iterable: what to count; None for a bar that the caller moves.
        desc: what is going on, e.g. "encode".
        total: how many there will be, where the iterable cannot say.
        unit: what is counted, e.g. "clip"; the bar shows units per second.
        force: draw the bar even where stderr is no terminal, where it is `ProgressLines` otherwise.

    Returns:
        tqdm's bar: iterate over it, or use it as a context manager; `.set_postfix(loss=...)` shows numbers.
    """
    told = {"desc": desc, "total": total, "unit": unit, "leave": True, "smoothing": 0.1}
    if force or sys.stderr.isatty():
        return tqdm(iterable, **told, dynamic_ncols=True)
    form = "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} spent, {remaining} left, {rate_fmt}{postfix}"
    return ProgressLines(iterable, **told, bar_format=form, delay=1e-9)  # with a delay, nothing is drawn at once


CURVES_FILE = "metrics.csv"
_COLUMNS = ["step", "name", "value"]


Row = tuple[int, str, float]
"""Step, name, value."""


def append_curves(folder: str | Path, rows: list[Row]) -> None:
    """Appends rows to a run's metrics.csv, with a header when the file is new.

    A last line that a kill has cut short is removed first; where the disk is full the file is left as it was.
    """
    if not rows:
        return
    path = Path(folder) / CURVES_FILE
    with translated(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            start = max(0, file.seek(0, os.SEEK_END) - 2**16)  # the last line is looked for in the last 64 kB
            file.seek(start)
            length, text = start + file.read().rfind(b"\n") + 1, io.StringIO()
            csv.writer(text).writerows([_COLUMNS, *rows] if length == 0 else rows)
            file.truncate(length)
            try:
                if file.write(content := text.getvalue().encode()) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(length)
                raise


def mark_curves(folder: str | Path) -> dict[str, int]:
    """What a run's metrics.csv holds now, for `rewind_curves`: its length and checksum."""
    path = Path(folder) / CURVES_FILE
    content = path.read_bytes() if path.exists() else b""
    return {"bytes": len(content), "crc32": zlib.crc32(content)}


def rewind_curves(folder: str | Path, mark: Mapping[str, Any]) -> bool:
    """Cuts a run's metrics.csv back to what it held at a mark; returns False where it never held that."""
    path = Path(folder) / CURVES_FILE
    content = path.read_bytes() if path.exists() else b""
    if len(content) < mark["bytes"] or zlib.crc32(content[: mark["bytes"]]) != mark["crc32"]:
        return False
    if len(content) > mark["bytes"]:
        with translated(path):
            os.truncate(path, mark["bytes"])
    return True


def run_record(folder: str | Path) -> tuple[dict[str, Any], dict[str, float]]:
    """What a run's folder says of it, for a model card: its configuration, and the last value of each validation curve.

    Of a checkpoint that was moved away from its run, nothing: both are empty.
    """
    config = load_yaml(path) if (path := Path(folder) / "config.yaml").is_file() else {}
    curves = read_curves(folder) if (Path(folder) / CURVES_FILE).is_file() else {}
    found = {name: float(points[-1, 1]) for name, points in curves.items() if name.startswith("val/")}
    return config if isinstance(config, dict) else {}, found


def card_head(title: str, library: str, tags: str, license: str | None) -> str:
    """The first lines of a model card: what the hub reads of it, and the title."""
    told = f"license: {license}\n" if license else ""
    return f"---\nlibrary_name: {library}\ntags: [{tags}]\n{told}---\n# {title}\n"


def training_table(
    checkpoint: Mapping[str, Any], rows: Mapping[str, object], reached: Mapping[str, float], license: str | None
) -> str:
    """A model card's table of a training: its data, its length and command, what it reached, the licence.

    Args:
        checkpoint: as `fit` wrote it; version 0.1 noted neither hours nor command.
        rows: what the stage says of its data, by name; None is left out.
        reached: the last validation, by name.
        license: as it was given.
    """
    run = checkpoint.get("run") or {}
    told: dict[str, object] = {
        **rows,
        "steps": f"{int(checkpoint.get('global_step') or 0):,}",
        "hours": f"{run['hours']:.2f}" if run.get("hours") else None,
        "command": f"`{run['command']}`" if run.get("command") else None,
        **{name: f"{value:.4g}" for name, value in reached.items()},
        "licence": license or "not stated by who exported it",
    }
    lines = [f"| {name} | {value} |" for name, value in told.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def read_curves(folder: str | Path) -> Mapping[str, np.ndarray]:
    """Reads a run's curves.

    A run that was killed and resumed logs some steps twice: the later value counts. A last line cut short by the
    kill is left out.

    Returns:
        name -> float64 (n, 2) with columns step and value, sorted by step.
    """
    path = Path(folder) / CURVES_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {CURVES_FILE} in {folder}: expected the folder of a training run")
    curves: dict[str, dict[int, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for line in file:
            row = next(csv.reader([line.rstrip("\r\n")]), [])
            if line.endswith("\n") and len(row) == 3 and row != _COLUMNS:
                curves.setdefault(row[1], {})[int(row[0])] = float(row[2])
    return {name: np.array(sorted(points.items()), dtype=np.float64) for name, points in curves.items()}
