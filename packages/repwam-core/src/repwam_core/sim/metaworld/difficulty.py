"""Meta-World's 50 tasks in the four groups of difficulty in which success rates of MT50 are published."""

from __future__ import annotations

from collections.abc import Sequence

from repvitok.errors import UserError

from repwam_core.sim.metaworld.instructions import TASKS
from repwam_core.sim.results import EpisodeResult, mean_rate

__all__ = ["DIFFICULTIES", "difficulty", "mean_rates"]

_HARDER = {
    "medium": (
        "basketball", "bin-picking", "box-close", "coffee-pull", "coffee-push", "hammer", "peg-insert-side",
        "push-wall", "soccer", "sweep", "sweep-into",
    ),
    "hard": ("assembly", "hand-insert", "pick-out-of-hole", "pick-place", "push", "push-back"),
    "very hard": ("disassemble", "pick-place-wall", "shelf-place", "stick-pull", "stick-push"),
}  # fmt: skip
DIFFICULTIES = ("easy", *_HARDER)
"""The groups of Seo et al., "Masked World Models for Visual Control" (2022), which LeRobot's evaluation uses too."""


def difficulty(task: str) -> str:
    """The group of a task by its canonical name; tasks of no harder group are easy.

    Raises:
        ValueError: it is no task of Meta-World.
    """
    if task not in TASKS:
        raise UserError(f"expected one of Meta-World's {len(TASKS)} tasks by its canonical name, got {task!r}")
    return next((name for name, tasks in _HARDER.items() if task in tasks), "easy")


def mean_rates(results: Sequence[EpisodeResult]) -> dict[str, float]:
    """Mean over its tasks of the success rate in each group that has any, the easiest first."""
    groups = {name: [result for result in results if difficulty(result.task) == name] for name in DIFFICULTIES}
    return {name: mean_rate(members) for name, members in groups.items() if members}
