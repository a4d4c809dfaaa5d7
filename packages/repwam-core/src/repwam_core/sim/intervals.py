"""How sure a success rate is: Wilson's interval for a count of successes."""

from __future__ import annotations

from math import sqrt

__all__ = ["wilson_interval"]

Z_95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution."""


def wilson_interval(successes: int, episodes: int, z: float = Z_95) -> tuple[float, float]:
    """The interval of success rates that ``successes`` of ``episodes`` are compatible with.

    With p = successes / episodes, n = episodes, the bounds are
    ``(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)`` (Wilson, 1927), clipped to [0, 1]. Unlike
    the normal approximation it is sensible at 0 and at all successes.

    Args:
        successes: Count, 0 <= successes <= episodes.
        episodes: Count, at least 1.
        z: Quantile of the standard normal distribution; the default gives 95 %.

    Returns:
        Lower and upper bound as fractions.
    """
    if episodes < 1 or not 0 <= successes <= episodes:
        raise ValueError(f"expected 0 <= successes <= episodes and episodes >= 1, got {successes} of {episodes}")
    rate = successes / episodes
    scale = 1 + z * z / episodes
    centre = (rate + z * z / (2 * episodes)) / scale
    half = z * sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes**2)) / scale
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == episodes else min(1.0, centre + half)
    return low, high
