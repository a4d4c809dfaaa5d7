"""How episodes ended: one record each, counted per task with an interval, kept as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from repvitok.runtime.documents import Count, load_json, parse, require_format
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import write_json_atomic

from repwam_core.sim.intervals import wilson_interval

__all__ = ["EpisodeResult", "SuccessRate", "load_results", "mean_rate", "mean_rates", "save_results", "success_rates"]

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
        frames: What the first camera saw, uint8 ``(n, H, W, 3)``, where the episode was filmed.
    """

    task: str
    seed: int
    instruction: str | None
    success: bool
    steps: int
    crashed: str | None = None
    traceback: str | None = None
    frames: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.crashed is not None and self.success:
            raise UserError(f"a crashed episode cannot be a success: task {self.task!r}, seed {self.seed}")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary without the frames."""
        return {key: getattr(self, key) for key in self.__dataclass_fields__ if key != "frames"}


@dataclass(frozen=True)
class SuccessRate:
    """Successes of a number of episodes, with Wilson's 95 % interval for the rate."""

    successes: int
    episodes: int
    crashed: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """Share of successes."""
        return self.successes / self.episodes

    @classmethod
    def of(cls, results: Sequence[EpisodeResult]) -> SuccessRate:
        """Count results, at least one."""
        successes = sum(result.success for result in results)
        crashed = sum(result.crashed is not None for result in results)
        return cls(successes, len(results), crashed, *wilson_interval(successes, len(results)))


def success_rates(results: Sequence[EpisodeResult]) -> dict[str, SuccessRate]:
    """One rate per task, in the order in which tasks first appear."""
    tasks = dict.fromkeys(result.task for result in results)
    return {task: SuccessRate.of([result for result in results if result.task == task]) for task in tasks}


def mean_rate(results: Sequence[EpisodeResult]) -> float:
    """Mean over tasks of their success rates."""
    rates = success_rates(results)
    return sum(rate.rate for rate in rates.values()) / len(rates)


def mean_rates(results: Sequence[EpisodeResult], groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """`mean_rate` over each group of tasks of which any were run, in the groups' order."""
    ran = {name: [result for result in results if result.task in tasks] for name, tasks in groups.items()}
    return {name: mean_rate(members) for name, members in ran.items() if members}


def save_results(path: str | Path, results: Sequence[EpisodeResult], **about: Any) -> None:
    """Write episodes, rates and whatever JSON values describe the run (``about``), whole or not at all."""
    counted = {**success_rates(results), "all": SuccessRate.of(results)}
    rates = {task: {**asdict(rate), "rate": rate.rate} for task, rate in counted.items()}
    episodes = [result.to_dict() for result in results]
    header = {"format": FORMAT, "format_version": FORMAT_VERSION}
    write_json_atomic(Path(path), {**header, "about": about, "rates": rates, "episodes": episodes})


def load_results(path: str | Path) -> tuple[list[EpisodeResult], Mapping[str, Any]]:
    """What ``save_results`` wrote: the episodes, without frames, and what describes the run.

    Raises:
        ValueError: If it is another kind of file.
    """
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


@dataclass(frozen=True)
class _Stored:
    """What a file of results says."""

    about: dict[str, Any]
    rates: dict[str, Any]
    episodes: list[_StoredEpisode]
