"""HTML and SVG elements built so that text is always escaped."""

from __future__ import annotations

from html import escape
from typing import TypeAlias

VOID = frozenset({"img", "meta", "br", "source", "line", "rect", "circle", "polyline", "polygon"})


class Markup(str):
    """Text that is markup already and must not be escaped again."""

    __slots__ = ()


Child: TypeAlias = Markup | str | int | None


def el(tag: str, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """One element. Children that are no ``Markup`` are escaped; None children and attributes are dropped.

    Attribute names lose a trailing underscore and turn the others into dashes: ``class_="a"``, ``aria_label="b"``.
    True gives a bare attribute.

    >>> el("p", "a < b", class_="note")
    '<p class="note">a &lt; b</p>'
    """
    head = tag
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        head += f" {name}" if value is True else f' {name}="{escape(str(value))}"'
    if tag in VOID:
        return Markup(f"<{head}/>")
    return Markup(f"<{head}>{join(*children)}</{tag}>")


def join(*children: Child) -> Markup:
    """Children one after the other, escaped where they are plain text."""
    parts = (c if isinstance(c, Markup) else escape(str(c)) for c in children if c is not None)
    return Markup("".join(parts))
