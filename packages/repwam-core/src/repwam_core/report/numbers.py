"""A report's numbers: ReportData to strict JSON, without its pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from repwam_core.report.data import Curve, ReportData, as_curve
from repwam_core.sim.results import SuccessRate

FORMAT, FORMAT_VERSION = "repwam-report", 1
ELSEWHERE = ("run", "curves", "success", "groups", "endings", "likeness", "protocol")
"""Fields of `ReportData` that are no sections as they are: the run's stand beside the format, from the success on all
are in `closed_loop`."""
PICTURES = ("np.ndarray", "np.ndarray | None")  #: the types of fields that hold pictures
CURVES = ("by_horizon", "distances")


def report_numbers(data: ReportData) -> dict[str, Any]:
    """All that the page says but its pictures, as JSON values; docs/quickstart.md tells the fields.

    Sections are the fields of `ReportData`, null or empty where the run had none. A number that is not finite, or was
    not measured, is null.
    """
    sections = [field.name for field in fields(data) if field.name not in ELSEWHERE]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **plain(data.run),
        "closed_loop": closed_loop(data) if data.success else None,
        **{name: plain(getattr(data, name)) for name in sections},
        "curves": {stage: _curves(curves) for stage, curves in data.curves.items()},
    }


def closed_loop(data: ReportData) -> dict[str, Any]:
    """The success tables, with the protocol under which they were measured."""
    methods = {}
    for row in data.success:
        methods[row.method] = {
            "note": row.note,
            "all episodes": plain(row.total),
            "groups": {name: pooled.rate for name, tasks in data.groups.items() if (pooled := row.over(tasks))},
            "mean of the groups": row.mean_of(data.groups),
            "tasks": {task: [count.successes, count.episodes] for task, count in row.counts.items()},
            "intervals": {task: list(count.interval) for task, count in row.counts.items()},
        }
    return {
        "protocol": plain(data.protocol),
        "commit": data.run.commit,
        "seed": next(iter(data.run.seeds), None),
        "methods": methods,
        "endings of failed episodes": plain(data.endings),
        "mixed up": [plain(pair) for pair in data.likeness.mix_ups] if data.likeness else [],
    }


def _curves(curves: Mapping[str, Any]) -> dict[str, Any]:
    return {name: plain(as_curve(curve)) for name, curve in curves.items()}


def plain(value: Any) -> Any:
    """JSON values: dataclasses as objects without their pictures, numbers that are not finite as null."""
    if isinstance(value, SuccessRate):
        return {name: plain(getattr(value, name)) for name in ("successes", "episodes", "crashed", "rate", "interval")}
    if is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in fields(value) if field.type not in PICTURES}
        return {name: (_curves if name in CURVES else plain)(part) for name, part in parts.items()}
    if isinstance(value, Curve):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
