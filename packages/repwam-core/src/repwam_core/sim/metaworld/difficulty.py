"""Meta-World's 50 tasks in the four groups of difficulty in which success rates of MT50 are published."""

from __future__ import annotations

from repvitok.runtime.errors import UserError

from repwam_core.sim.metaworld.instructions import TASKS

__all__ = ["DIFFICULTIES", "difficulty"]

_HARDER = {
    "medium": (
        "basketball", "bin-picking", "box-close", "coffee-pull", "coffee-push", "hammer", "peg-insert-side",
        "push-wall", "soccer", "sweep", "sweep-into",
    ),
    "hard": ("assembly", "hand-insert", "pick-out-of-hole", "pick-place", "push", "push-back"),
    "very hard": ("disassemble", "pick-place-wall", "shelf-place", "stick-pull", "stick-push"),
}  # fmt: skip
_EASY = tuple(task for task in TASKS if not any(task in harder for harder in _HARDER.values()))
DIFFICULTIES: dict[str, tuple[str, ...]] = {"easy": _EASY, **_HARDER}
"""The groups of Seo et al., "Masked World Models for Visual Control" (2022), which LeRobot's evaluation uses too."""


def difficulty(task: str) -> str:
    """The group of a task by its canonical name.

    Raises:
        UserError: it is no task of Meta-World.
    """
    if task not in TASKS:
        raise UserError(f"expected one of Meta-World's {len(TASKS)} tasks by its canonical name, got {task!r}")
    return next(name for name, tasks in DIFFICULTIES.items() if task in tasks)
