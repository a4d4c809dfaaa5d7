"""Loss curves on disk: one append-only CSV per run, readable while the run goes on and after it was resumed."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np

CURVES_FILE = "metrics.csv"
_COLUMNS = ["step", "name", "value"]


def append_curves(folder: str | Path, rows: list[tuple[int, str, float]]) -> None:
    """Appends (step, name, value) rows to a run's metrics.csv, with a header when the file is new."""
    path = Path(folder) / CURVES_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(_COLUMNS)
        writer.writerows(rows)


def read_curves(folder: str | Path) -> Mapping[str, np.ndarray]:
    """Reads a run's curves.

    A run that was killed and resumed logs some steps twice: the later value counts. A last line cut short by the
    kill is left out.

    Returns:
        name -> float64 (n, 2) with columns step and value, sorted by step.

    Raises:
        FileNotFoundError: if the folder holds no metrics.csv.
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
