"""Documents are read into typed objects or refused in one line that names the file, the field and what came."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from repvitok.runtime.documents import parse, read_json, read_json_lines
from repvitok.runtime.errors import UserError


@dataclass(frozen=True)
class Column:
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Info:
    fps: Annotated[float, msgspec.Meta(gt=0)]
    action: Column
    episodes: int = 1

    def __post_init__(self) -> None:
        if self.episodes == 13:
            raise UserError("episodes must not be 13")


GOOD = {"fps": 30, "action": {"dtype": "float32", "shape": [7]}, "episodes": 2}


def test_a_good_document_becomes_its_object():
    assert parse(GOOD, Info, "info.json") == Info(30.0, Column("float32", (7,)), 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fps": 0}, ["'fps'", "> 0", "(0)"]),
        ({"fps": None}, ["'fps'", "float", "null"]),
        ({"fps": "30"}, ["'fps'", "float", '"30"']),
        ({"fps": True}, ["'fps'", "bool"]),
        ({"fps": float("nan")}, ["'fps'", "finite", "nan"]),
        ({"action": {"dtype": "float32"}}, ["'action'", "missing", "shape"]),
        ({"action": {"dtype": "float32", "shape": [7, 1.5]}}, ["'action.shape[1]'", "int", "1.5"]),
        ({"episodes": 13}, ["must not be 13"]),
        ({"speed": 3}, ["'speed'"]),
        ({"fps": "\ud800"}, ["'fps'", "half a character"]),
        ({"action": "\ud800"}, ["'action'", "half a character"]),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], words: list[str]):
    with pytest.raises(UserError, match=r"^info\.json: ") as refused:
        parse(GOOD | change, Info, "info.json")
    for word in words:
        assert word in str(refused.value)


def test_keys_that_nobody_asked_for_pass_when_allowed():
    assert parse(GOOD | {"robot": "g1"}, Info, "info.json", unknown=True).fps == 30


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(["fps", "action", "x"]), values),
        max_leaves=8,
    )
)
def test_any_document_is_an_object_or_one_error(document: Any):
    said = ""
    try:
        parse(document, Info, "info.json")
    except UserError as error:
        said = str(error)
    assert not said or said.startswith("info.json: ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "whole JSON"),
        (b'{"fps": 30', "whole JSON"),
        (b"\xff\xfe", "UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    ],
)
def test_files_that_hold_no_document_are_named(content: bytes, words: str, tmp_path: Path):
    path = tmp_path / "info.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as refused:
        read_json(path, Info)
    assert str(path) in str(refused.value)


def test_a_line_of_many_is_named(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | {"fps": -1}) + "\n")
    with pytest.raises(UserError, match=r"line 3.*'fps'"):
        read_json_lines(path, Info)
    path.write_text(json.dumps(GOOD, indent=2))
    with pytest.raises(UserError, match=r"line 1.*whole JSON"):
        read_json_lines(path, Info)
