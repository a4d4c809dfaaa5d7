"""How sure a success rate is, and a difference of two: Wilson's and Newcombe's intervals for counts."""

from __future__ import annotations

from math import sqrt

from repvitok.runtime.errors import UserError

__all__ = ["difference_interval", "wilson_interval"]

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
        raise UserError(f"expected 0 <= successes <= episodes and episodes >= 1, got {successes} of {episodes}")
    rate = successes / episodes
    scale = 1 + z * z / episodes
    centre = (rate + z * z / (2 * episodes)) / scale
    half = z * sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes**2)) / scale
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == episodes else min(1.0, centre + half)
    return low, high


def difference_interval(first: tuple[int, int], second: tuple[int, int], z: float = Z_95) -> tuple[float, float]:
    """The interval of differences of two independent success rates, first minus second.

    With each rate's Wilson bounds l, u, the bounds are ``d - sqrt((p1 - l1)^2 + (u2 - p2)^2)`` and
    ``d + sqrt((u1 - p1)^2 + (p2 - l2)^2)`` (Newcombe, 1998, method 10). A difference whose interval holds
    0 has not been measured.

    Args:
        first, second: Successes and episodes of each.
        z: Quantile of the standard normal distribution; the default gives 95 %.

    Returns:
        Lower and upper bound, in [-1, 1].
    """
    (low1, high1), (low2, high2) = wilson_interval(*first, z), wilson_interval(*second, z)
    rate1, rate2 = first[0] / first[1], second[0] / second[1]
    below = sqrt((rate1 - low1) ** 2 + (high2 - rate2) ** 2)
    above = sqrt((high1 - rate1) ** 2 + (rate2 - low2) ** 2)
    return rate1 - rate2 - below, rate1 - rate2 + above
