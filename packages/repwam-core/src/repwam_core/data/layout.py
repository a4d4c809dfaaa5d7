"""From a data set's own columns to named channels: what `repwam prepare` does, and the layouts that it knows. No torch.

A layout is a YAML file. It names an embodiment and, for `action` and `state`, the columns of the data set that are put
side by side, with a name for each of their numbers; channels of one name mean the same in every layout, so that data
sets of several robots share one order of channels (`repwam_core.embodiment.ChannelLayout`).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from repvitok.errors import UserError

from repwam_core.embodiment import Embodiment

LAYOUTS = Path(__file__).with_name("layouts")
VERSIONS = ("v2.1", "v3.0")
INDICES = ("timestamp", "frame_index", "episode_index", "index", "task_index")
STATISTICS = ("stats.json", "episodes_stats.jsonl")
"""Statistics of columns that are no longer there."""


@dataclass(frozen=True)
class Part:
    """Some numbers of one column.

    Attributes:
        column: name of the column in the data set.
        names: one per number, in order.
        units: one per number.
        select: first number and the one after the last; None is the whole column.
    """

    column: str
    names: tuple[str, ...]
    units: tuple[str, ...]
    select: tuple[int, int] | None = None


@dataclass(frozen=True)
class DatasetLayout:
    """How a data set's columns become one action and one state vector.

    Attributes:
        embodiment: what the robot is called.
        action, state: parts that are put side by side; a data set without states has none.
        cameras: the videos that are kept, in the order of their tokens.
    """

    embodiment: str
    action: tuple[Part, ...]
    state: tuple[Part, ...]
    cameras: tuple[str, ...]

    @classmethod
    def load(cls, name: str | Path) -> DatasetLayout:
        """Read a layout: one of this package's by name, or a YAML file.

        Raises:
            ValueError: for an unknown name, unknown or missing keys, or a number of names that fits no selection.
        """
        path = LAYOUTS / f"{name}.yaml" if "/" not in str(name) and not str(name).endswith(".yaml") else Path(name)
        if not path.is_file():
            raise UserError(f"no layout {str(name)!r}: expected a YAML file or one of {known_layouts()}")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or set(values) != {"embodiment", "action", "state", "cameras"}:
            raise UserError(f"{path}: expected the keys action, cameras, embodiment, state")
        action, state = (tuple(_part(path, part) for part in values[key]) for key in ("action", "state"))
        layout = cls(values["embodiment"], action, state, tuple(values["cameras"]))
        layout.robot(1.0)
        return layout

    def robot(self, rate_hz: float) -> Embodiment:
        """The embodiment that data in this layout are of."""
        return Embodiment.from_names(
            self.embodiment, _names(self.action), _names(self.state), self.cameras, rate_hz, _units(self.action)
        )


def known_layouts() -> list[str]:
    """Names of the layouts in this package."""
    return sorted(path.stem for path in LAYOUTS.glob("*.yaml"))


def prepare(source: Path, out: Path, layout: DatasetLayout) -> Embodiment:
    """Write a LeRobot data set whose `action` and `observation.state` are the layout's channels.

    Tables are rewritten, videos are linked. A folder that is there and complete is left as it is, so that the tasks of
    a job array can be run again.

    Args:
        source: LeRobot data set, v2.1 or v3.0.
        out: folder to write.
        layout: which columns become what.

    Raises:
        ValueError: when the data set lacks a column or a camera, or a column has another size than the layout says.
    """
    info = json.loads((source / "meta/info.json").read_text(encoding="utf-8"))
    if info.get("codebase_version") not in VERSIONS:
        raise UserError(f"{source}: expected a LeRobot data set {VERSIONS}, got {info.get('codebase_version')!r}")
    robot = layout.robot(float(info["fps"]))
    info["features"] = _features(source, info["features"], layout)
    info["robot_type"] = layout.embodiment
    if (out / "meta/info.json").is_file():
        if json.loads((out / "meta/info.json").read_text(encoding="utf-8")) != info:
            raise UserError(f"{out} holds data prepared otherwise; remove the folder or choose another")
        return robot
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shutil.copytree(source / "meta", partial / "meta", ignore=shutil.ignore_patterns("info.json", *STATISTICS))
    (partial / "videos").symlink_to((source / "videos").resolve())
    for path in sorted(source.glob("data/**/*.parquet")):
        _rewrite(path, partial / path.relative_to(source), layout)
    (partial / "meta/info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, out)
    return robot


def _part(path: Path, values: dict[str, Any]) -> Part:
    unknown = set(values) - {"column", "names", "unit", "units", "select"}
    if unknown or not {"column", "names"} <= set(values):
        raise UserError(f"{path}: expected a part to have column, names, unit or units, select, got {sorted(values)}")
    names = tuple(values["names"])
    units = tuple(values.get("units", [values.get("unit", "1")] * len(names)))
    select = values.get("select")
    if len(units) != len(names) or (select is not None and select[1] - select[0] != len(names)):
        raise UserError(f"{path}: {values['column']}: expected as many names as units and selected numbers")
    return Part(values["column"], names, units, None if select is None else (select[0], select[1]))


def _features(source: Path, features: dict[str, Any], layout: DatasetLayout) -> dict[str, Any]:
    """The features of the prepared data set; complains of what the source lacks."""
    missing = [camera for camera in layout.cameras if camera not in features]
    if missing:
        there = [key for key, feature in features.items() if feature["dtype"] in ("video", "image")]
        raise UserError(f"{source}: no cameras {missing}; there are {there}")
    for part in (*layout.action, *layout.state):
        if part.column not in features:
            raise UserError(f"{source}: no column {part.column!r}; there are {sorted(features)}")
        size = int(np.prod(features[part.column]["shape"]))
        stop = len(part.names) if part.select is None else part.select[1]
        if size < stop or (part.select is None and size != stop):
            raise UserError(f"{source}: {part.column} has {size} numbers, the layout expects {stop}")
    kept = {key: features[key] for key in layout.cameras} | {key: features[key] for key in INDICES if key in features}
    for key, parts in (("action", layout.action), ("observation.state", layout.state)):
        if parts:
            names = list(_names(parts))
            kept[key] = {"dtype": "float32", "shape": [len(names)], "names": names}
    return kept


def _rewrite(path: Path, out: Path, layout: DatasetLayout) -> None:
    table = pq.read_table(path)
    columns = {key: table[key] for key in INDICES if key in table.column_names}
    for key, parts in (("action", layout.action), ("observation.state", layout.state)):
        if parts:
            values = np.concatenate([_numbers(table, part, path) for part in parts], axis=1)
            flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
            columns[key] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), out)


def _numbers(table: pa.Table, part: Part, path: Path) -> np.ndarray:
    """The part's numbers, (rows, names)."""
    if part.column not in table.column_names:
        raise UserError(f"{path}: no column {part.column!r}, though info.json lists it")
    rows = table[part.column].to_pylist()
    values = np.array(rows, np.float32).reshape(len(rows), -1)
    return values if part.select is None else values[:, slice(*part.select)]


def _names(parts: tuple[Part, ...]) -> tuple[str, ...]:
    return tuple(name for part in parts for name in part.names)


def _units(parts: tuple[Part, ...]) -> tuple[str, ...]:
    return tuple(unit for part in parts for unit in part.units)
