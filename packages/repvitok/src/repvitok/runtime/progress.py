"""One progress bar, the same for every command of the three packages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(
    iterable: Iterable[Any] | None = None,
    desc: str = "",
    total: int | float | None = None,
    unit: str = "it",
    *,
    force: bool = False,
) -> tqdm:
    """A progress bar on stderr, over `iterable` or moved by `.update(n)`.

    Args:
        iterable: what to count; None for a bar that the caller moves.
        desc: what is going on, e.g. "encode".
        total: how many there will be, where the iterable cannot say.
        unit: what is counted, e.g. "clip"; the bar shows units per second.
        force: draw the bar even where stderr is no terminal (where it is silent otherwise).

    Returns:
        tqdm's bar: iterate over it, or use it as a context manager; `.set_postfix(loss=...)` shows numbers.
    """
    return tqdm(
        iterable,
        desc=desc,
        total=total,
        unit=unit,
        disable=False if force else None,
        dynamic_ncols=True,
        leave=True,
        smoothing=0.1,
    )
