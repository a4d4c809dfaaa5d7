"""How episodes ended: one record each, counted per task with Wilson's interval, kept as JSON, with the filmed frames.

And what failed ones have come to: where they end, and which other task's demonstrations they move like. No simulator,
no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import sqrt
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from repvitok.runtime.documents import Count, load_json, parse, require_format
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import atomic_file, write_json_atomic

from repwam_core.sim.base import HAND_TO_OBJECT, OBJECT_TO_GOAL

Z_95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution."""


def wilson_interval(successes: int, episodes: int, z: float = Z_95) -> tuple[float, float]:
    """The interval of success rates that `successes` of `episodes` are compatible with.

    With p = successes / episodes, n = episodes, the bounds are
    `(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)` (Wilson, 1927), clipped to [0, 1]. Unlike
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

    With each rate's Wilson bounds l, u, the bounds are `d - sqrt((p1 - l1)^2 + (u2 - p2)^2)` and
    `d + sqrt((u1 - p1)^2 + (p2 - l2)^2)` (Newcombe, 1998, method 10). A difference whose interval holds
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


FORMAT, FORMAT_VERSION = "repwam-evaluation", 1


@dataclass(frozen=True, eq=False)
class EpisodeResult:
    """How one episode ended.

    Attributes:
        task: Canonical task name.
        seed: The simulator's seed.
        instruction: What the policy was told; None if nothing.
        success: Whether the task was solved in time. A crashed episode is a failed one.
        steps: Control steps carried out.
        crashed: What went wrong in the simulator, or None.
        traceback: Where it went wrong, where the simulator raised an exception; None also where its process died.
        frames: What the cameras saw, side by side, uint8 `(n, H, W, 3)`, where the episode was filmed.
        trace: The robot's state by channel and the task's distances in metres by name, one number per frame, and the
            actions as "action/<channel>", one number fewer: each led from its frame to the next. To four decimals,
            where the episode was traced.
    """

    task: str
    seed: int
    instruction: str | None
    success: bool
    steps: int
    crashed: str | None = None
    traceback: str | None = None
    frames: np.ndarray | None = None
    trace: Mapping[str, Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if self.crashed is not None and self.success:
            raise UserError(f"a crashed episode cannot be a success: task {self.task!r}, seed {self.seed}")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary without the frames, and without a trace that was not kept."""
        left_out = {"frames"} | ({"trace"} if self.trace is None else set())
        return {key: getattr(self, key) for key in self.__dataclass_fields__ if key not in left_out}


@dataclass(frozen=True)
class SuccessRate:
    """Successes among a number of episodes, at least one; crashed ones are failed ones."""

    successes: int
    episodes: int
    crashed: int = 0

    def __post_init__(self) -> None:
        wilson_interval(self.successes, self.episodes)  # refuses what cannot be counted

    @property
    def rate(self) -> float:
        return self.successes / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval for the rate."""
        return wilson_interval(self.successes, self.episodes)

    @classmethod
    def of(cls, results: Sequence[EpisodeResult]) -> SuccessRate:
        """Count results, at least one."""
        crashed = sum(result.crashed is not None for result in results)
        return cls(sum(result.success for result in results), len(results), crashed)

    def __add__(self, other: SuccessRate) -> SuccessRate:
        return SuccessRate(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


def success_rates(results: Sequence[EpisodeResult]) -> dict[str, SuccessRate]:
    """One rate per task, in the order in which tasks first appear."""
    tasks = dict.fromkeys(result.task for result in results)
    return {task: SuccessRate.of([result for result in results if result.task == task]) for task in tasks}


def mean_rate(rates: Mapping[str, SuccessRate]) -> float:
    """Mean over tasks of their success rates."""
    return sum(rate.rate for rate in rates.values()) / len(rates)


def mean_rates(rates: Mapping[str, SuccessRate], groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """`mean_rate` over each group of tasks of which any were run, in the groups' order."""
    ran = {name: {task: rate for task, rate in rates.items() if task in tasks} for name, tasks in groups.items()}
    return {name: mean_rate(members) for name, members in ran.items() if members}


def save_results(path: str | Path, results: Sequence[EpisodeResult], **about: Any) -> None:
    """Write episodes, rates and whatever JSON values describe the run (`about`), whole or not at all."""
    counted = {**success_rates(results), "all": SuccessRate.of(results)}
    rates = {
        task: {**asdict(rate), **dict(zip(("low", "high"), rate.interval, strict=True)), "rate": rate.rate}
        for task, rate in counted.items()
    }
    episodes = [result.to_dict() for result in results]
    header = {"format": FORMAT, "format_version": FORMAT_VERSION}
    write_json_atomic(Path(path), {**header, "about": about, "rates": rates, "episodes": episodes})


def load_results(path: str | Path) -> tuple[list[EpisodeResult], Mapping[str, Any]]:
    """What `save_results` wrote: the episodes, without frames, and what describes the run."""
    stored = parse(require_format(load_json(path), FORMAT, FORMAT_VERSION, str(path)), _Stored, str(path))
    return [EpisodeResult(**vars(episode)) for episode in stored.episodes], stored.about


@dataclass(frozen=True)
class _StoredEpisode:
    """`EpisodeResult` without its frames."""

    task: str
    seed: Annotated[int, msgspec.Meta(ge=0)]
    instruction: str | None
    success: bool
    steps: Count
    crashed: str | None = None
    traceback: str | None = None
    trace: dict[str, list[float]] | None = None


@dataclass(frozen=True)
class _Stored:
    """What a file of results says."""

    about: dict[str, Any]
    rates: dict[str, Any]
    episodes: list[_StoredEpisode]


def film_key(result: EpisodeResult) -> str:
    """The name of an episode's frames in the file."""
    return f"{result.task}/{result.seed}"


def save_films(path: str | Path, results: Sequence[EpisodeResult]) -> None:
    """Write the frames of those episodes that were filmed."""
    films = {film_key(result): result.frames for result in results if result.frames is not None}
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **films)


def write_films(folder: Path, results: Sequence[EpisodeResult], rate_hz: float) -> list[Path]:
    """Write each filmed episode as an mp4 for people to look at, named by task, seed and how it ended."""
    from repvitok.data.video import write_video

    written = []
    for result in results:
        if result.frames is not None:
            ended = "success" if result.success else "failure"
            written.append(folder / f"{result.task}-{result.seed}-{ended}.mp4")
            even = not (result.frames.shape[1] % 2 or result.frames.shape[2] % 2)
            write_video(written[-1], result.frames, rate_hz, pix_fmt="yuv420p" if even else "yuv444p")
    return written


def load_films(path: str | Path) -> Mapping[str, np.ndarray]:
    """`film_key` -> uint8 `(n, H, W, 3)`, read when looked up."""
    return np.load(path, allow_pickle=False)


NEAR_M = 0.08
"""The hand is at an object nearer than this: experts hold what they push or turn by its side, some 5 cm off."""
MOVED_M = 0.02
AWAY, UNMOVED, SHORT, UNTOLD = "hand not at the object", "object not moved", "object not at the goal", "not told"
ENDINGS = (AWAY, UNMOVED, SHORT, UNTOLD)
"""Where a failed episode can end, in the order of what it has come to."""
COMPARED_STEPS = 60


def ending(result: EpisodeResult) -> str:
    """Where an episode ended, one of `ENDINGS`; the last where the task tells no distances."""
    trace = result.trace or {}
    if HAND_TO_OBJECT not in trace or OBJECT_TO_GOAL not in trace:
        return UNTOLD
    if min(trace[HAND_TO_OBJECT]) > NEAR_M:
        return AWAY
    to_goal = trace[OBJECT_TO_GOAL]
    return UNMOVED if max(to_goal) - min(to_goal) < MOVED_M else SHORT


@dataclass(frozen=True)
class MixUp:
    """Failed episodes of a task whose motion is most like demonstrations of another one."""

    task: str
    other: str
    episodes: int


@dataclass(frozen=True)
class Likeness:
    """Which task's demonstrations episodes move like.

    Attributes:
        own: of the successful episodes, how many move most like a demonstration of their own task; what is said of the
            failed ones is worth no more than this.
        successes: how many those are.
        mix_ups: of the failed ones, by pairs of tasks, the most frequent first.
    """

    own: int
    successes: int
    mix_ups: Sequence[MixUp]


def likeness(
    results: Sequence[EpisodeResult], demonstrated: Mapping[str, Sequence[np.ndarray]], channels: Sequence[str]
) -> Likeness:
    """Find for every traced episode the demonstration that moves most like it.

    Two motions are compared by the mean squared difference of the robot's states over the first `COMPARED_STEPS`
    control steps, each channel in units of its deviation over all demonstrations; one that ends before stays where it
    is.

    Args:
        results: episodes with traces.
        demonstrated: task -> the states of its demonstrations, `(T, S)` each.
        channels: names of the states' S channels in traces.
    """
    names = [task for task, paths in demonstrated.items() for _ in paths]
    paths = np.stack([_start(path) for paths in demonstrated.values() for path in paths])
    scale = paths.std(axis=(0, 1)) + 1e-6
    flat = (paths / scale).reshape(len(paths), -1)
    own = successes = 0
    pairs: Counter[tuple[str, str]] = Counter()
    for result in results:
        if result.trace is None or any(name not in result.trace for name in channels):
            continue
        path = _start(np.array([result.trace[name] for name in channels]).T)
        nearest = names[int(np.square(flat - (path / scale).ravel()).sum(axis=1).argmin())]
        if result.success:
            successes += 1
            own += nearest == result.task
        elif nearest != result.task:
            pairs[result.task, nearest] += 1
    return Likeness(own, successes, [MixUp(*pair, count) for pair, count in pairs.most_common()])


def _start(path: np.ndarray) -> np.ndarray:
    """The first `COMPARED_STEPS` rows, the last one repeated where there are fewer."""
    rows = np.minimum(np.arange(COMPARED_STEPS), len(path) - 1)
    return np.asarray(path, np.float64)[rows]
