"""Columns are read as their table stores them, in any storage, or refused by name; nothing else is read."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from repvitok.data.lerobot.format import NUMBER_DTYPES
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.data.lerobot.tables import robot_numbers
from repvitok.runtime.errors import UserError

ACTION = [[0, 0], [1, -1], [2, -2], [3, -3]]  # of `plain`'s episode 0
ROBOT = ["action", "observation.state"]


def described(data, **features: dict[str, Any]) -> None:
    info = data.described()
    for key, feature in features.items():
        info["features"].setdefault(key, {}).update(feature)
    data.write_info(info)


@pytest.fixture
def one(plain):
    """A data set of one episode."""
    return plain("v2.1", {0: 4})


def dictionary(values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(range(0, 9, 2), values.dictionary_encode())


@pytest.mark.parametrize(
    "column",
    [
        *(pa.array(ACTION, pa.list_(kind)) for kind in (pa.float32(), pa.float64(), pa.int8(), pa.int32(), pa.int64())),
        pa.array(np.array(ACTION, np.float16).tolist(), pa.list_(pa.float16())),
        pa.array(ACTION, pa.large_list(pa.float32())),
        pa.array(ACTION, pa.list_(pa.float64(), 2)),
        pa.chunked_array([pa.array(ACTION[:1], pa.list_(pa.float32())), pa.array(ACTION[1:], pa.list_(pa.float32()))]),
        dictionary(pa.array(np.ravel(ACTION), pa.float32())),
        pa.array([*ACTION, *ACTION], pa.list_(pa.float32(), 2))[:4],
        pa.array([*ACTION, *ACTION], pa.list_(pa.float32()))[4:],
    ],
    ids=lambda column: str(column.type),
)
def test_every_storage_of_numbers_is_read(one, column):
    one.set_column("action", column)
    action = LeRobotReader(one.root).episode(0, ["action"])["action"]
    assert action.dtype == np.float32
    np.testing.assert_array_equal(action, ACTION)


def test_shapes_of_any_depth_nested_or_flat(one):
    values = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    described(one, touch={"dtype": "float32", "shape": [2, 3]})
    for column in (
        pa.array(values.tolist()),
        pa.array(values.tolist(), pa.large_list(pa.list_(pa.float64(), 3))),
        pa.array(values.reshape(4, 6).tolist()),
    ):
        one.set_column("touch", column)
        np.testing.assert_array_equal(LeRobotReader(one.root).episode(0)["touch"], values)
    for wrong in (values.reshape(4, 3, 2), values.reshape(4, 1, 6), values[:, :1]):
        one.set_column("touch", pa.array(wrong.tolist()))
        with pytest.raises(UserError, match=r"column 'touch' should hold \[2, 3\] numbers a row"):
            LeRobotReader(one.root).episode(0)


@pytest.mark.parametrize(
    ("key", "column", "words"),
    [
        ("action", [[1.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], "episode 0, row 1.*one length"),
        ("action", [[1.0, 2.0], [1.0, 2.0], [1.0], [1.0, 2.0, 3.0]], "episode 0, row 2.*one length"),
        ("action", [[1.0, 2.0, 3.0]] * 4, r"should hold \[2\]"),
        ("action", [[]] * 4, r"should hold \[2\]"),
        ("action", [1.0] * 4, r"should hold \[2\]"),
        ("action", [[1.0, 2.0], None, [1.0, 2.0], [1.0, 2.0]], "episode 0, row 1.*null"),
        ("action", [[1.0, 2.0], [1.0, 2.0], [None, 2.0], [1.0, 2.0]], "episode 0, row 2.*null"),
        ("action", [None] * 4, "row 0.*null"),
        ("action", [["a", "b"]] * 4, "string"),
        ("action", [{"x": 1.0}] * 4, r"should hold \[2\]"),
        ("action", [[Decimal(1), Decimal(2)]] * 4, "decimal"),
        ("action", [[1.0, 2.0], [1.0, math.nan], [1.0, 2.0], [1.0, 2.0]], "row 1, action, channel 'y'.*finite.*nan"),
        ("action", [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [math.inf, 2.0]], "row 3, action, channel 'x'.*finite.*inf"),
        ("action", [[1.0, 1e300]] * 4, "row 0.*float32"),
        ("observation.state", [0.0, 1.0, 2.0, -math.inf], "row 3, observation.state, channel 'observation.state_0'"),
        ("frame_index", [0, 1, 2, 2], "row 3: expected frame_index 3, got 2"),
        ("frame_index", [0, 2, 1, 3], "row 1: expected frame_index 1, got 2"),
        ("frame_index", [1, 2, 3, 4], "row 0: expected frame_index 0, got 1"),
        ("frame_index", [0.0, 1.0, 1.5, 3.0], "row 2.*int64.*1.5"),
        ("episode_index", [0, 1, 0, 0], "rows of episode 0 lie apart"),
        ("episode_index", [0, 0, 0, 1], "expected 4 rows for episode 0, found 3"),
        ("episode_index", [7] * 4, "expected 4 rows for episode 0, found 0"),
        ("episode_index", [0, 0, None, 0], "row 2.*null"),
    ],
)
def test_wrong_columns_are_named(one, key, column, words):
    described(one, action={"names": ["x", "y"]})
    one.set_column(key, pa.array(column))
    with pytest.raises(UserError, match=rf"episode_000000\.parquet.*{words}"):
        LeRobotReader(one.root).episode(0)


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool"])
def test_floats_are_never_read_as_integers(one, dtype):
    described(one, action={"dtype": dtype})
    one.set_column("action", pa.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.5], [0.0, 0.0]]))
    with pytest.raises(UserError, match=rf"'action', episode 0, row 2: expected {dtype}.*got 0\.5 \(double\)"):
        LeRobotReader(one.root).episode(0)


def test_what_is_in_order_in_one_episode_does_not_excuse_another(plain):
    data = plain("v3.0")  # episodes of 4, 3 and 5 rows in one table
    data.set_column("frame_index", pa.array([0, 1, 2, 3, 0, 2, 1, 0, 1, 2, 3, 4]))
    data.set_column("observation.state", pa.array(np.r_[np.zeros(9), math.nan, 0, 0].astype(np.float32)))
    reader = LeRobotReader(data.root)
    assert reader.episode(0)["action"].shape == (4, 2)
    with pytest.raises(UserError, match="episode 1, row 1: expected frame_index 1, got 2; sort the rows"):
        reader.episode(1)
    with pytest.raises(UserError, match=r"episode 2, row 2, observation\.state"):
        reader.episode(2)
    assert reader.episode(2, ["action"])["action"].shape == (5, 2)


def test_a_table_without_rows_is_named(one):
    one.change(lambda table: table.slice(0, 0))
    with pytest.raises(UserError, match=r"episode_000000\.parquet: expected 4 rows for episode 0, found 0"):
        LeRobotReader(one.root)[0]


def test_missing_and_unknown_columns_are_named(one):
    reader = LeRobotReader(one.root)
    with pytest.raises(UserError, match=r"no columns \['torque'\]; there are \['action'"):
        reader.episode(0, ["action", "torque"])
    assert reader.episode(0, []) == {}
    one.change(lambda table: table.drop_columns(["episode_index"]))
    with pytest.raises(UserError, match=r"columns \['episode_index'\] are missing"):
        LeRobotReader(one.root).episode(0, ["action"])
    one.set_column("episode_index", pa.array([0] * 4))
    one.change(lambda table: table.append_column("action", table["action"]))
    with pytest.raises(UserError, match=r"columns \['action'\] are there twice"):
        LeRobotReader(one.root).episode(0, ["action"])


def test_columns_that_nobody_asked_for_stop_nothing(one):
    said = [{"role": "user", "content": "go", "tool_calls": ["{}"]}]
    others = {
        "language_events": ("language", [[], said, [], said]),
        "words": ("string", ["a", None, "c", "d"]),
        "lists": ("string", [["a"], [], ["c", "d"], None]),
        "nested": ("mystery", [[[1.0]], [[1.0, 2.0], []], [], [[3.0]]]),
        "struct": ("mystery", [{"x": 1}] * 4),
    }
    described(one, **{key: {"dtype": dtype, "shape": [1]} for key, (dtype, _) in others.items()})
    for key, (_, values) in others.items():
        one.set_column(key, pa.array(values))
    one.set_column("words", pa.array(others["words"][1]).dictionary_encode())
    described_ragged = {"dtype": "float32", "shape": [3]}
    one.set_column("ragged", pa.array([[1.0], [], None, [2.0, 3.0]]))
    one.set_column("action.joint", pa.array(["not", "a", "number", None]))  # begins like a column that is read
    reader = LeRobotReader(one.root)
    np.testing.assert_array_equal(reader.episode(0, ROBOT)["action"], ACTION)
    for row in range(4):
        for key, (_, values) in others.items():
            assert reader[row][key] == values[row]
    info = one.described()
    info["features"]["ragged"] = described_ragged
    one.write_info(info)
    np.testing.assert_array_equal(LeRobotReader(one.root).episode(0, ROBOT)["action"], ACTION)
    with pytest.raises(UserError, match="'ragged'"):
        LeRobotReader(one.root)[0]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_every_table_is_opened_once(plain, version, monkeypatch):
    data = plain(version, dict.fromkeys(range(20), 3))
    opened: list[str] = []

    class Counting(pq.ParquetFile):
        def __init__(self, source, **options):
            opened.append(str(source))
            super().__init__(source, **options)

    monkeypatch.setattr(pq, "ParquetFile", Counting)
    reader = LeRobotReader(data.root)
    assert sum("/data/" in path for path in opened) == 0
    for info in reader.episodes:
        assert set(reader.episode(info.index, ROBOT)) == set(ROBOT)
        assert info.task == ("open it", "close it")[info.index % 2]
    assert sum("/data/" in path for path in opened) == len(data.data_files)
    opened.clear()
    assert len({info.task for info in LeRobotReader(plain(version, tasks=("one task",)).root).episodes}) == 1
    assert sum("/data/" in path for path in opened) == 0


KINDS = {
    **{f"{s}int{b}": getattr(pa, f"{s}int{b}")() for s in ("", "u") for b in (8, 16, 32, 64)},
    **{"float16": pa.float16(), "float32": pa.float32(), "float64": pa.float64(), "bool": pa.bool_()},
}
edges = [0, 1, -1, 2, 127, 128, 255, 256, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 2**64 - 1]
numbers = st.sampled_from(
    [*edges, 0.5, -0.25, 65504.0, 65520.0, 1e38, 1e39, 1e308, -0.0, 2.0**63, 2.0**64]
) | st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(NUMBER_DTYPES)), st.lists(numbers, min_size=4, max_size=4)
)
def test_a_value_stays_what_it_is_or_is_refused(plain, stored, declared, values):
    kind = np.dtype(stored)
    if kind.kind == "f":
        values = np.array(values, np.float64).astype(kind)
        values[~np.isfinite(values)] = 0
    else:
        bounds = (0, 1) if kind.kind == "b" else (np.iinfo(kind).min, np.iinfo(kind).max)
        values = np.array([int(value) if bounds[0] <= value <= bounds[1] else 1 for value in values], kind)
    data = plain("v2.1", {0: 4})
    described(data, load={"dtype": declared, "shape": [1]})
    data.set_column("load", pa.array(values, KINDS[stored]))
    target = np.dtype(declared)
    with np.errstate(over="ignore"):
        if target.kind == "f" and kind.kind == "f":
            fits = np.isfinite(values.astype(target)).all()
        elif target.kind == "f":
            fits = all(math.isfinite(target.type(int(x))) and int(target.type(int(x))) == int(x) for x in values)
        else:
            low, high = (0, 1) if target.kind == "b" else (np.iinfo(target).min, np.iinfo(target).max)
            fits = all(float(x).is_integer() and low <= int(x) <= high for x in values)
    try:
        read = LeRobotReader(data.root).episode(0, ["load"])["load"]
    except UserError as error:
        assert not fits
        assert "'load', episode 0, row" in str(error)  # noqa: PT017
        return
    assert fits
    assert read.dtype == target
    if target.kind == "f":
        np.testing.assert_array_equal(read, values.astype(target))
    else:
        assert [int(value) for value in read] == [int(value) for value in values]


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int32", "int64", "uint64", "float16", "float32", "float64"]
)
@settings(max_examples=25, deadline=None)
@given(values=st.lists(numbers, min_size=3, max_size=3))
def test_actions_are_learned_as_they_are_or_refused(dtype, values):
    with np.errstate(all="ignore"):
        stored = np.array(values, object).astype(np.float64).astype(dtype)
        held = [math.isfinite(x) and math.isfinite(np.float32(x)) for x in stored.tolist()]
    if stored.dtype.kind in "iu":
        held = [int(np.float32(x)) == x for x in stored.tolist()]
    try:
        read = robot_numbers(stored.reshape(1, 3), "abc", "row {}".format)
    except UserError as error:
        first = held.index(False)
        assert f"row 0, channel '{'abc'[first]}'" in str(error)  # noqa: PT017
        assert str(error).endswith(f"got {stored[first]}")  # noqa: PT017
    else:
        assert all(held)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read[0], stored.astype(np.float32))
