"""The rows' task_index decides what an episode is told, everywhere; what contradicts it is told once."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from repvitok.data.lerobot.reader import LeRobotReader
from repvitok.runtime.errors import UserError

VERSIONS = ("v2.1", "v3.0")


def told(reader: LeRobotReader) -> dict[int, str]:
    return {info.index: info.task for info in reader.episodes}


def say(data, tasks: dict[int, object]) -> None:
    """Writes what each episode's own row says; nothing where the value is `...`."""
    if data.version == "v3.0":
        values = [None if value is ... else value for value in tasks.values()]
        data.set_column("tasks", pa.array(values), data.episode_table)
        return
    rows = [{"episode_index": e, "length": n, "tasks": tasks[e]} for e, n in data.lengths.items()]
    data.write_lines("episodes", [{k: v for k, v in row.items() if v is not ...} for row in rows])


def write_tasks(data, tasks: dict[int, str], **columns: object) -> None:
    if data.version == "v3.0":
        data.write(pa.table({"task_index": list(tasks), "task": list(tasks.values()), **columns}), "meta/tasks.parquet")
    else:
        data.write_lines("tasks", [{"task_index": number, "task": text} for number, text in tasks.items()])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_label_corrected_in_the_task_table_is_what_is_read(plain, version, caplog):
    data = plain(version, {3: 4, 4: 3, 9: 5})
    write_tasks(data, {0: "open the window", 1: "close it"})
    reader = pickle.loads(pickle.dumps(LeRobotReader(data.root)))
    assert not caplog.text
    assert told(reader) == {3: "close it", 4: "open the window", 9: "close it"}
    assert reader[5]["task"] == "open the window"
    (warning,) = caplog.messages
    assert "in 1 of 3 episodes" in warning
    assert "episode 4: rows 'open the window', its `tasks` ['open it']" in warning


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("own", ["open it", ["open it"], [0], 0, [], None, ["", "open it"], [None, 0]], ids=str)
def test_an_episode_may_say_it_in_any_form(plain, version, own, caplog):
    data = plain(version, {0: 4, 2: 3})
    say(data, {0: own, 2: own})
    assert told(LeRobotReader(data.root)) == {0: "open it", 2: "open it"}
    data.change(lambda table: table.drop_columns(["task_index"]))
    own_text = "" if own in ([], None) else "open it"
    reader = LeRobotReader(data.root)
    assert told(reader) == {0: own_text, 2: own_text}
    assert reader[0]["task"] == own_text
    assert ("2 of 2 episodes have no instruction: 0, 2" in caplog.text) == (not own_text)


@pytest.mark.parametrize("version", VERSIONS)
def test_several_tasks_of_an_episode_are_joined_as_they_come(plain, version, caplog):
    data = plain(version, {0: 4})
    data.set_column("task_index", pa.array([1, 1, 0, 1]))
    say(data, {0: ["open it", "close it"]})
    reader = LeRobotReader(data.root)
    assert told(reader) == {0: "close it; open it"}
    assert [reader[row]["task"] for row in range(4)] == ["close it", "close it", "open it", "close it"]
    assert not caplog.text


@pytest.mark.parametrize("version", VERSIONS)
def test_without_a_task_table_the_episodes_own_words_count(plain, version):
    data = plain(version, {0: 4, 1: 3})
    (data.root / "meta" / ("tasks.parquet" if version == "v3.0" else "tasks.jsonl")).unlink()
    reader = LeRobotReader(data.root)
    assert told(reader) == {0: "open it", 1: "close it"}
    assert reader[4]["task"] == "close it"
    assert reader.instruction_source == "tasks"
    say(data, {0: [], 1: ["", " "]})
    reader = LeRobotReader(data.root)
    assert told(reader) == {0: "", 1: ""}
    assert reader.instruction_source == "none"
    assert LeRobotReader(plain(version).root).instruction_source == "task_index"


@pytest.mark.parametrize("version", VERSIONS)
def test_numbers_that_the_table_lacks(plain, version, caplog):
    data = plain(version, {0: 4, 1: 3, 2: 2})
    write_tasks(data, {1: "close it", 5: ""})
    say(data, {0: ["open it"], 1: ["close it"], 2: [""]})
    reader = LeRobotReader(data.root)
    assert told(reader) == {0: "open it", 1: "close it", 2: ""}
    assert [reader[row]["task"] for row in (0, 4, 7)] == ["open it", "close it", ""]
    unknown, none = caplog.messages
    assert "in 1 of 3 episodes task_index names no task" in unknown
    assert "episode 0: 'open it'" in unknown
    assert "1 of 3 episodes have no instruction: 2" in none


@pytest.mark.parametrize("kind", ["uint8", "uint64", "int8", "float16", "float64", "dictionary", "list"])
def test_numbers_of_tasks_in_every_width(plain, kind):
    column = pa.array([0, 0, 1, 1])
    if kind == "dictionary":
        column = column.dictionary_encode()
    elif kind == "list":
        column = pa.array([[0], [0], [1], [1]])
    else:
        column = pa.array(np.array([0, 0, 1, 1], kind))
    data = plain("v2.1", {0: 4})
    write_tasks(data, {0: "open it", 1: "close it"})
    data.set_column("task_index", column)
    assert told(LeRobotReader(data.root)) == {0: "open it; close it"}
    if kind in ("uint8", "uint64", "dictionary"):  # and one of them missing
        say(data, {0: ["my own words"]})
        data.set_column("task_index", pa.array([0, None, 1, 1], column.type))
        assert told(LeRobotReader(data.root)) == {0: "my own words"}


def test_rows_without_a_number(plain):
    for column in ([0.0, None, 0.0, 0.0], [0.0, float("nan"), 0.0, 0.0], [0, None, 0, 0], [None] * 4):
        data = plain("v2.1", {0: 4})
        data.set_column("task_index", pa.array(column))
        say(data, {0: ["my own words"]})
        assert told(LeRobotReader(data.root)) == {0: "my own words"}
        say(data, {0: []})
        assert told(LeRobotReader(data.root)) == {0: "open it" if 0 in column else ""}


@pytest.mark.parametrize(
    "text_type", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
@pytest.mark.parametrize("name", ["task", "__index_level_0__", "instruction"])
def test_task_tables_in_every_form(plain, name, text_type):
    data = plain("v3.0")
    texts = pa.array(["close it", "open it"]).cast(text_type)
    table = pa.table({"weight": [0.5, 1.5], "task_index": pa.array([1, 0], pa.uint8()), name: texts})
    data.write(table, "meta/tasks.parquet")
    reader = LeRobotReader(data.root)
    assert reader.tasks == {0: "open it", 1: "close it"}
    assert told(reader) == {0: "open it", 1: "close it", 2: "open it"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"task_index": 0, "task": 3}], ["line 1", "'task'", "int"]),
        ([{"task_index": 0, "task": None}], ["line 1", "'task'", "null"]),
        ([{"task_index": 0}], ["line 1", "'task'", "missing"]),
        ([{"task": "open it"}], ["line 1", "'task_index'", "missing"]),
        ([{"task_index": "0", "task": "x"}], ["line 1", "'task_index'", "str"]),
        ([{"task_index": -1, "task": "x"}], ["line 1", "'task_index'", "(-1)"]),
        ([{"task_index": 0, "task": "x"}, {"task_index": 0, "task": "y"}], ["line 2", "'task_index'", "'x'", "'y'"]),
        ([["x"]], ["line 1", "array"]),
    ],
    ids=str,
)
def test_wrong_task_lines_are_named(plain, rows, words):
    data = plain()
    data.write_lines("tasks", rows)
    with pytest.raises(UserError, match=r"tasks\.jsonl") as error:
        LeRobotReader(data.root)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"task": ["x"]}),
        pa.table({"task_index": [0]}),
        pa.table({"task_index": [0, None], "task": ["x", "y"]}),
        pa.table({"task_index": [0, 1], "task": ["x", None]}),
        pa.table({"task_index": [0.5], "task": ["x"]}),
        pa.table({"task_index": ["0"], "task": ["x"]}),
        pa.table({"task_index": [0], "task": [7]}),
        pa.table({"split": ["train"], "task_index": [0], "task_description": ["x"]}),  # which of the two?
    ],
    ids=lambda table: str(table.to_pydict()),
)
def test_wrong_task_tables_are_named(plain, table):
    data = plain("v3.0")
    data.write(table, "meta/tasks.parquet")
    with pytest.raises(UserError, match=r"tasks\.parquet.*'task"):
        LeRobotReader(data.root)


def test_another_broken_table_does_not_stop_an_instruction(plain, caplog):
    data = plain("v2.1", {0: 4, 1: 3, 2: 2})
    say(data, {0: ["another"], 1: ["another"], 2: ["another"]})
    data.data_files[1].write_bytes(b"")
    reader = LeRobotReader(data.root)
    assert reader.episodes[0].task == "open it"
    assert "in 2 of 3 episodes" in caplog.text
    with pytest.raises(UserError, match=r"episode_000001\.parquet"):
        reader.episodes[1].task  # noqa: B018


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from(VERSIONS))
def test_the_rule_is_the_same_everywhere(plain, draws, version):
    texts = st.sampled_from(["open it", "close it", "", "öffne es"])
    table = draws.draw(st.dictionaries(st.integers(0, 2), texts, max_size=3))
    rows = draws.draw(st.lists(st.integers(0, 3), min_size=4, max_size=4))
    own = draws.draw(st.lists(texts, max_size=3) | texts)
    data = plain(version, {6: 4})
    data.set_column("task_index", pa.array(rows))
    say(data, {6: own})
    write_tasks(data, table)
    if version == "v3.0" and not table:
        data.write(
            pa.table({"task_index": pa.array([], pa.int64()), "task": pa.array([], pa.string())}), "meta/tasks.parquet"
        )
    known = {number: text for number, text in table.items() if text}
    mine = [text for text in dict.fromkeys([own] if isinstance(own, str) else own) if text]
    named = list(dict.fromkeys(known[row] for row in rows if row in known))
    complete = all(row in known for row in rows)
    expected = "; ".join(named if complete else mine or named)
    reader = LeRobotReader(data.root)
    assert reader.episodes[0].task == expected
    assert LeRobotReader(data.root).episodes == reader.episodes
    for frame, row in enumerate(rows):
        assert reader[frame]["task"] == known.get(row, expected)
    assert json.dumps(told(reader))
    assert pq.read_metadata(data.data_files[0]).num_rows == 4
