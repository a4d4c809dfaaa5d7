"""Documents that people and other programs write: JSON read strictly into typed objects.

A document is described once, as a dataclass whose annotations give types and ranges
(`Annotated[float, msgspec.Meta(gt=0)]`); reading it either gives that object or one error with the file's name, the
field, what was expected and what came.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from repvitok.errors import UserError

Document = TypeVar("Document")

MAX_BYTES = 2**28
"""A document larger than this is refused unread: none of ours comes near it."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_FIELD = re.compile(r"^(?P<problem>.*?)(?: - at `(?P<kind>key in )?\$(?P<field>.*)`)?$", re.DOTALL)


def read_json(path: str | Path, kind: type[Document], *, unknown: bool = False) -> Document:
    """The JSON document in a file as a `kind`, see `parse`.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: a git-lfs pointer, no JSON, or not a `kind`.
    """
    return parse(load_json(path), kind, str(path), unknown=unknown)


def read_json_lines(path: str | Path, kind: type[Document], *, unknown: bool = False) -> list[Document]:
    """One document a line, as LeRobot's .jsonl files have them; errors name the line.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: a git-lfs pointer, or a line that is no JSON document on its own or not a `kind`.
    """
    return [parse(document, kind, source, unknown=unknown) for source, document in load_json_lines(path)]


def load_json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Of every line that is not empty, what errors call it and its document as plain values.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: a git-lfs pointer, or a line that is no JSON document on its own.
    """
    for number, line in enumerate(_read_text(Path(path)).split("\n"), 1):  # not splitlines: a text may hold U+2028
        if line.strip():
            source = f"{path}, line {number}"
            yield source, _loads(line, source, "a whole JSON document on one line")


def load_json(path: str | Path) -> Any:
    """The JSON document in a file as plain values, of no particular form.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: a git-lfs pointer, or no JSON.
    """
    return _loads(_read_text(Path(path)), str(path))


def parse(document: Any, kind: type[Document], source: str, *, unknown: bool = False) -> Document:
    """Plain values as a `kind`: a dataclass, or any type that msgspec converts to.

    Types are strict: no number is read from a string, no whole number from a fraction, no number from true or false.
    Numbers must be finite.

    Args:
        document: dictionaries, lists, strings, numbers, None.
        kind: the type, with ranges as `msgspec.Meta`; what its `__post_init__` raises is reported like the rest.
        source: what an error calls the document: a file's name, and a line where there are several.
        unknown: whether keys that no field of the outermost `kind` names are left out, unread, instead of refused.

    Raises:
        UserError: `source`, the field, what was expected and what came.
    """
    if is_dataclass(kind) and isinstance(document, Mapping):
        known = {field.name for field in fields(kind)}
        extra = sorted(str(key) for key in document if key not in known)
        if extra and not unknown:
            raise UserError(f"{source}: unknown fields {extra}; there are {sorted(known)}. Another version's file?")
        document = {key: value for key, value in document.items() if key in known}
    try:
        for place, number in _numbers(document, ""):
            if not math.isfinite(number):
                raise UserError(f"{source}: {_named(place)}expected a finite number, got {number}")
        return msgspec.convert(document, type=kind, strict=True)
    except msgspec.ValidationError as error:
        raise UserError(f"{source}: {_explained(str(error), document)}") from error
    except UnicodeEncodeError as error:  # JSON's \ud800 alone is half a character
        raise UserError(f"{source}: expected text in Unicode, got {error.object[:60]!a}") from error
    except RecursionError as error:
        raise UserError(f"{source}: nested too deeply for a document of this kind") from error


def refuse_lfs_pointer(path: str | Path) -> None:
    """Stops at a file that git-lfs has not fetched yet: a few lines of text in place of the content.

    Raises:
        UserError: says what to run.
    """
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(f'{path} is a git-lfs pointer, not the file itself; run "git lfs pull" in its repository')


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    refuse_lfs_pointer(path)
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"{path}: {size} bytes; a document of at most {MAX_BYTES} is read")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from error


def _loads(text: str, source: str, expected: str = "a whole JSON document") -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # JSONDecodeError, or Python's limit on the digits of a whole number
        raise UserError(f"{source}: not {expected} ({error})") from error
    except RecursionError as error:
        raise UserError(f"{source}: nested too deeply for a document of this kind") from error


def _numbers(value: Any, place: str) -> Iterator[tuple[str, float]]:
    """Every float in a document, with the path of its field."""
    if isinstance(value, float):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{place}[{index}]")


def _explained(message: str, document: Any) -> str:
    """msgspec's sentence with the field in front and, where one can be shown, the value that came."""
    found = _FIELD.match(message)
    assert found is not None
    problem, place = found["problem"].replace("`", ""), found["field"] or ""
    problem = problem[0].lower() + problem[1:]
    problem = re.sub("^object missing required field (.*)$", r"field '\1' is missing", problem)
    value = _value_at(document, place)
    came = "" if value is _NOTHING or value is None or "missing" in problem else f" ({_short(value)})"
    return f"{_named(place)}{problem}{came}"


_NOTHING = object()


def _value_at(document: Any, place: str) -> Any:
    """What stands at a path like `.features.action[2]`; _NOTHING where msgspec's path has no single value."""
    for key, index in re.findall(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]", place):
        try:
            document = document[key] if key else document[int(index)]
        except (KeyError, IndexError, TypeError, ValueError):
            return _NOTHING
    return document


def _named(place: str) -> str:
    return f"field {place.lstrip('.')!r}: " if place else ""


def _short(value: Any) -> str:
    try:
        text = json.dumps(value, default=str)
    except RecursionError:
        return "deeply nested"
    return text if len(text) <= 60 else text[:57] + "..."
