"""Open-loop score: the share of planned actions that are nearer than a threshold to the recorded ones.

The paper reports it (Tables 2 and 4) and leaves norm, unit and what is counted open, so all variants are computed and
each says which it is (docs/decisions/036).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from repvitok.runtime.errors import UserError

THRESHOLDS = (0.1, 0.05, 0.03, 0.01)
Norm = Literal["max", "l2", "l1"]
Span = Literal["step", "chunk"]
Scale = Literal["scaled", "si"]
NORMS: tuple[Norm, ...] = ("max", "l2", "l1")
SPANS: tuple[Span, ...] = ("step", "chunk")
SCALES: tuple[Scale, ...] = ("scaled", "si")


@dataclass(frozen=True)
class ScoreVariant:
    """Which open-loop score.

    Attributes:
        norm: of the error over the channels of one action vector: its largest entry, Euclidean length, or sum.
        span: what counts: every action vector, or every planned chunk, which counts if all its vectors do.
        scale: "scaled" errors are of recorded actions whose 1st to 99th percentile spans [-1, 1], whatever is learned
            of them; "si" in recorded units.
    """

    norm: Norm = "max"
    span: Span = "step"
    scale: Scale = "scaled"

    def __str__(self) -> str:
        return f"{self.norm} norm, per {self.span}, {self.scale}"


HEADLINE = ScoreVariant()
"""What is printed first: of scaled actions, because one threshold for metres and radians alike has no meaning."""

VARIANTS = tuple(ScoreVariant(*choice) for choice in product(NORMS, SPANS, SCALES))


def step_norms(errors: Float[np.ndarray, "*steps c"], norm: Norm) -> Float[np.ndarray, "*steps"]:
    """The norm of each error vector; channels an embodiment lacks must be 0."""
    size = np.abs(errors)
    if norm == "max":
        return size.max(axis=-1)
    return np.sqrt((size**2).sum(axis=-1)) if norm == "l2" else size.sum(axis=-1)


def open_loop_score(
    chunks: Iterable[Float[np.ndarray, "_ c"]], variant: ScoreVariant, thresholds: Sequence[float] = THRESHOLDS
) -> dict[float, float]:
    """Return threshold -> score in [0, 1], a score being the share with an error strictly below the threshold.

    Args:
        chunks: errors (planned minus recorded) of each planned chunk, in the unit that `variant.scale` names.
        variant: the norm and what counts.
        thresholds: in that unit.
    """
    norms = [step_norms(errors, variant.norm) for errors in chunks if len(errors)]
    if not norms:
        raise UserError("open-loop score: expected at least one planned chunk, got none")
    values = np.concatenate(norms) if variant.span == "step" else np.array([steps.max() for steps in norms])
    return {threshold: float((values < threshold).mean()) for threshold in thresholds}


def count_below(
    errors: Float[np.ndarray, "b frames a c"], valid: Bool[np.ndarray, "b frames"], thresholds: Sequence[float]
) -> tuple[dict[float, int], int]:
    """Return how many action vectors of valid transitions are below each threshold in `HEADLINE`, and of how many."""
    norms = step_norms(errors[valid], HEADLINE.norm)
    return {threshold: int((norms < threshold).sum()) for threshold in thresholds}, norms.size
