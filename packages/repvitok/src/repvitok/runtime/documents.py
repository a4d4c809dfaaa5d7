"""Documents that people and other programs write: JSON and YAML read strictly into typed objects.

A document is described once, as a dataclass whose annotations give types and ranges
(`Annotated[float, msgspec.Meta(gt=0)]`); reading it either gives that object or one error with the file's name, the
field, what was expected and what came; a file that is not there is a FileNotFoundError. Settings that are made in code
or by a recipe hold themselves to the same annotations by `check_fields` in their `__post_init__`, and modules their
arguments by `check_arguments`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml

from repvitok.runtime.errors import UserError

Document = TypeVar("Document")

Size = Annotated[int, msgspec.Meta(ge=1, le=2**20)]
"""Of one axis: channels, tokens, pixels."""
Layers = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Count = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
BatchSize = Annotated[int, msgspec.Meta(ge=1, le=2**16)]
MAX_STRIDE = 10_000
"""Raw frames between two that are used: minutes of video."""
Frames = Annotated[int, msgspec.Meta(ge=1, le=MAX_STRIDE)]
"""Of a clip, or from one of its frames to the next."""
MAX_SIDE = 8192
Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]
"""Pixels of a picture's side."""
Seed = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
Above0 = Annotated[float, msgspec.Meta(gt=0)]
From0 = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Decay = Annotated[float, msgspec.Meta(ge=0, lt=1)]
"""Of an average or a momentum: 1 would never move."""
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal."""
DepthRange = tuple[float | int, float | int]
"""(MIN, MAX) in the numbers that a depth map stores: MIN and below become black, MAX and above white."""

MAX_BYTES = 2**28
"""A document larger than this is refused unread: none of ours comes near it."""
MAX_PARAMETERS = 10**12
"""A model of more is refused before it is built: a thousand times the largest of ours."""
MAX_YAML_DEPTH = 100
MAX_YAML_NODES = 100_000
"""Values of a YAML document with its anchors written out: the largest recipe has a few hundred."""

_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TOO_DEEP = "nested too deeply for a document of this kind"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_FIELD = re.compile(r"^(?P<problem>.*?)(?: - at `(?P<kind>key in )?\$(?P<field>.*)`)?$", re.DOTALL)


def read_json(path: str | Path, kind: type[Document] | Any, *, unknown: bool = False) -> Document:
    """The JSON document in a file as a `kind`, see `parse`."""
    return parse(load_json(path), kind, str(path), unknown=unknown)


def read_json_lines(path: str | Path, kind: type[Document] | Any, *, unknown: bool = False) -> list[Document]:
    """One document a line, as LeRobot's .jsonl files have them; errors name the line."""
    return [parse(document, kind, source, unknown=unknown) for source, document in load_json_lines(path)]


def load_json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Of every line that is not empty, what errors call it and its document as plain values."""
    for number, line in enumerate(_read_text(Path(path)).split("\n"), 1):  # not splitlines: a text may hold U+2028
        if line.strip():
            source = f"{path}, line {number}"
            yield source, _loads(line, source, "a whole JSON document on one line")


def load_json(path: str | Path) -> Any:
    """The JSON document in a file as plain values, of no particular form."""
    return _loads(_read_text(Path(path)), str(path))


def load_yaml(path: str | Path) -> Any:
    """The YAML document in a file as plain values, of no particular form."""
    text = _read_text(Path(path))
    refuse_yaml_bomb(text, str(path))
    try:
        return yaml.load(text, Loader=_YAML_LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a YAML document ({' '.join(str(error).split())})") from error


def refuse_yaml_bomb(text: str, source: str) -> None:
    """Stops at YAML that no loader survives: nested without end, an anchor that contains itself, or anchors that are
    far more values, written out, than the document shows.
    """
    if len(text) < MAX_YAML_DEPTH and "*" not in text:
        return  # a value of the command line
    sizes: dict[str, int] = {}
    still_open: list[tuple[str | None, int]] = []
    nodes = 0
    try:
        for event in yaml.parse(text, Loader=_YAML_LOADER):
            if isinstance(event, yaml.AliasEvent):
                if any(anchor == event.anchor for anchor, _ in still_open):
                    raise UserError(f"{source}: the YAML anchor {event.anchor!r} contains itself")
                nodes += sizes.get(event.anchor, 0)
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = still_open.pop()
                sizes.update({} if anchor is None else {anchor: nodes - before})
            elif isinstance(event, yaml.NodeEvent):
                nodes += 1
                if isinstance(event, yaml.CollectionStartEvent):
                    still_open.append((event.anchor, nodes))
                elif event.anchor is not None:
                    sizes[event.anchor] = 1
            if len(still_open) > MAX_YAML_DEPTH:
                raise UserError(f"{source}: {_TOO_DEEP}")
            if nodes > MAX_YAML_NODES:
                raise UserError(f"{source}: more than {MAX_YAML_NODES} values once its YAML anchors are written out")
    except (yaml.YAMLError, RecursionError):
        return


def parse_json(text: Any, source: str) -> Any:
    """The JSON document that a string holds, as plain values; errors as of `load_json`."""
    if not isinstance(text, str):
        raise UserError(f"{source}: expected text, got {type(text).__name__}")
    return _loads(text, source)


def parse(
    document: Any, kind: type[Document] | Any, source: str, *, unknown: bool = False, required: Iterable[str] = ()
) -> Document:
    """Plain values as a `kind`: a dataclass, or any type that msgspec converts to.

    Types are strict: no number is read from a string, no whole number from a fraction, no number from true or false.
    Numbers must be finite, and strings must be text that can be written again.

    Args:
        document: dictionaries, lists, strings, numbers, None.
        kind: the type, with ranges as `msgspec.Meta`; what its `__post_init__` raises is reported like the rest.
        source: what an error calls the document: a file's name, and a line where there are several.
        unknown: whether keys that no field names are left out instead of refused, here and inside; those of the
            outermost `kind` unread.
        required: fields of the outermost `kind` that must be there although they have a default.
    """
    try:
        return _parsed(document, kind, source, unknown, set(required))
    except RecursionError as error:
        raise UserError(f"{source}: {_TOO_DEEP}") from error


def _parsed(document: Any, kind: Any, source: str, unknown: bool, required: set[str]) -> Any:
    if unknown and _is_dataclass_type(kind) and isinstance(document, Mapping):
        document = {key: value for key, value in document.items() if key in _annotations(kind)}
    for place, value in _leaves(document, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{source}: {_named(place)}expected a finite number, got {value}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"{source}: {_named(place)}expected a whole number below 2**63, got {short_json(value)}")
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            # half of a surrogate pair: JSON may hold it, UTF-8 cannot
            raise UserError(f"{source}: {_named(place)}expected text, got half a character ({value[:40]!r})")
    extra = [] if unknown else list(_strays(document, kind, ""))
    missing = sorted(required - set(document)) if isinstance(document, Mapping) else []
    if extra or missing:
        problem = f"unknown fields {extra}" if extra else ""
        problem += f"{', ' if extra else ''}missing fields {missing}" if missing else ""
        known = f"; there are {sorted(_annotations(kind))}" if _is_dataclass_type(kind) else ""
        raise UserError(f"{source}: {problem}{known}. Another version's file?")
    try:
        return msgspec.convert(document, type=kind, strict=True)
    except msgspec.ValidationError as error:
        raise UserError(f"{source}: {_explained(str(error), document, kind)}") from error


def require_format(document: Any, name: str, version: int, source: str) -> dict[str, Any]:
    """What a document holds besides "format" and "format_version", which must be these."""
    if not isinstance(document, dict):
        raise UserError(f"{source}: expected a JSON object of format {name!r}, got {short_json(document)}")
    content = dict(document)
    found = content.pop("format", None), content.pop("format_version", None)
    if found != (name, version) or isinstance(found[1], bool | float):
        raise UserError(
            f"{source}: expected format {name!r} version {version}, got {found[0]!r} version {found[1]!r}; "
            "another version's file?"
        )
    return content


def check_fields(settings: Any) -> None:
    """Holds the fields of a dataclass to their annotated types and ranges, and its numbers to finite ones."""
    for name, kind in _annotations(type(settings)).items():
        _check(name, getattr(settings, name), kind)


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """`check_fields` for a call: of its arguments, those whose annotations hold a range.

    Args:
        function: whose annotations they are; a dataclass whose other fields are of any kind, too.
        given: name -> value of all its arguments, such as `locals()` in its first line.
    """
    for name, kind in _arguments(function).items():
        _check(name, given[name], kind)


def _check(name: str, value: Any, kind: Any) -> None:
    try:
        _parsed(value, kind, name, unknown=False, required=set())
    except UserError as error:
        problem = str(error).removeprefix(f"{name}: ")
        came = "" if f"({short_json(value)})" in problem else f" ({short_json(value)})"
        raise UserError(f"{name}: {problem}{came}") from error


def checked_range(depth_range: Sequence[float | int] | None) -> tuple[float, float] | None:
    """The range as two floats."""
    if depth_range is None:
        return None
    numbers = [float(value) for value in depth_range]
    if len(numbers) != 2 or not all(map(math.isfinite, numbers)) or numbers[0] >= numbers[1]:
        raise UserError(f"a depth range is MIN MAX, two finite numbers, MIN below MAX; got {list(depth_range)}")
    return numbers[0], numbers[1]


@lru_cache(maxsize=256)
def _arguments(function: Callable[..., Any]) -> dict[str, Any]:
    hints = get_type_hints(function, include_extras=True)
    return {name: kind for name, kind in hints.items() if _has_range(kind)}


def _has_range(kind: Any) -> bool:
    return get_origin(kind) is Annotated or any(map(_has_range, get_args(kind)))


def _is_dataclass_type(kind: Any) -> TypeGuard[type]:
    return is_dataclass(kind) and isinstance(kind, type)


@lru_cache(maxsize=256)
def _annotations(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def refuse_lfs_pointer(path: str | Path, content: bytes | None = None) -> None:
    """Stops at a file that git-lfs has not fetched yet: a few lines of text in place of the content.

    Args:
        path: of the file, or what an error calls it.
        content: what it holds; None: that is read.
    """
    if content is None:
        with open(path, "rb") as file:
            content = file.read(len(_LFS_POINTER))
    if content.startswith(_LFS_POINTER):
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
    except RecursionError as error:
        raise UserError(f"{source}: {_TOO_DEEP}") from error
    except ValueError as error:  # JSONDecodeError, or a number of thousands of digits
        raise UserError(f"{source}: not {expected} ({error})") from error


def _leaves(value: Any, place: str) -> Iterator[tuple[str, int | float | str]]:
    """Every number and string in a document, with the path of its field; of a dictionary its keys, too."""
    if isinstance(value, int | float | str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield place, str(key)
            yield from _leaves(item, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{place}[{index}]")


def _strays(value: Any, kind: Any, place: str) -> Iterator[str]:
    """Keys of a document that no field of its dataclasses names, with their path."""
    arguments = [argument for argument in get_args(kind) if argument is not Ellipsis]
    if get_origin(kind) in (Annotated, Union, UnionType):
        for arm in arguments[:1] if get_origin(kind) is Annotated else arguments:
            yield from _strays(value, arm, place)
    elif _is_dataclass_type(kind) and isinstance(value, Mapping):
        known = _annotations(kind)
        for key, item in value.items():
            if key in known:
                yield from _strays(item, known[key], f"{place}.{key}")
            else:
                yield f"{place}.{key}".lstrip(".")
    elif isinstance(value, Mapping) and len(arguments) == 2:
        for key, item in value.items():
            yield from _strays(item, arguments[1], f"{place}.{key}")
    elif isinstance(value, list | tuple) and arguments:
        for index, item in enumerate(value):
            yield from _strays(item, arguments[min(index, len(arguments) - 1)], f"{place}[{index}]")


def _explained(message: str, document: Any, kind: Any) -> str:
    """msgspec's sentence with the field in front and, where they can be shown, the choices and the value that came."""
    found = _FIELD.match(message)
    assert found is not None
    problem, place = found["problem"].replace("`", ""), found["field"] or ""
    problem = problem[0].lower() + problem[1:]
    problem = re.sub("^object missing required field (.*)$", r"field '\1' is missing", problem)
    for name in re.findall(r"\.([^.\[\]]+)", place):  # from the document's type to the field's
        kind = _annotations(kind).get(name) if _is_dataclass_type(kind) else None
    if problem.startswith("invalid enum value") and get_origin(kind) is Literal:
        problem = f"expected one of {', '.join(map(repr, get_args(kind)))}"
    came, value = "", document
    with suppress(KeyError, IndexError, TypeError, ValueError):  # a path such as `[...]` has no single value
        for key, index in re.findall(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]", place):
            value = value[key] if key else value[int(index)]
        came = "" if value is None or "missing" in problem else f" ({short_json(value)})"
    return f"{_named(place)}{problem}{came}"


def _named(place: str) -> str:
    return f"field {place.lstrip('.')!r}: " if place else ""


def short_json(value: Any) -> str:
    """A value as an error shows it: JSON of at most 60 letters."""
    try:
        text = json.dumps(value, default=str)
    except (RecursionError, ValueError):  # ValueError: a whole number of thousands of digits
        return "nothing that can be shown"
    return text if len(text) <= 60 else text[:57] + "..."


def parse_episodes(text: str) -> list[range]:
    """Numbers and ranges of episodes: "0-9,12" -> [range(0, 10), range(12, 13)]."""
    ranges = []
    for part in text.split(","):
        ends = [end.strip() for end in part.split("-")]
        if len(ends) > 2 or not all(end.isascii() and end.isdecimal() and len(end) < 19 for end in ends):
            raise UserError(f"episodes: expected numbers and ranges like 0-9,12, got {text!r}")
        first, last = int(ends[0]), int(ends[-1])
        if first > last:
            raise UserError(f"episodes: expected the lower number of a range first, got {part.strip()!r}")
        ranges.append(range(first, last + 1))
    return ranges
