"""A rollout's folder: what has ended is kept while the rest runs, so that a killed rollout goes on where it stood."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from repvitok.runtime.documents import short_json
from repvitok.runtime.errors import UserError
from repvitok.runtime.files import kind_of, sole_writer

from repwam_core.sim.base import DEFAULT_SUITE
from repwam_core.sim.films import film_key, load_films, save_films
from repwam_core.sim.results import EpisodeResult, load_results, save_results

__all__ = ["RESULTS_FILE", "RolloutFolder"]

RESULTS_FILE, FILMS_FILE = "results.json", "films.npz"
UNFINISHED = "unfinished"
"""Folder of the parts that have ended, each a file of results and, where filmed, one of frames; gone at the end."""
WHEREABOUTS = ("policy", "demonstrations")
"""What is recorded and not compared: a policy is known by its digests, wherever it lies."""


class RolloutFolder:
    """Episodes of one rollout, kept part by part; a part is what runs together and is begun anew if it was cut off.

    Use it as a context: it holds the folder against a second writer.

    Args:
        folder: It is created if need be; None keeps nothing.
        about: JSON values that say what is run; stored with the results.

    Raises:
        UserError: On entering, if the folder holds something else or episodes of other values, or another process is
            writing there.
    """

    def __init__(self, folder: str | Path | None, about: Mapping[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder)
        self._about: dict[str, Any] = json.loads(json.dumps(about))
        self._ended: dict[tuple[str, int], EpisodeResult] = {}
        self._exits = ExitStack()

    def __enter__(self) -> RolloutFolder:
        if self._folder is not None:
            if (kind := kind_of(self._folder)) is not None:
                raise UserError(f"{self._folder} holds {kind}; give a rollout a folder of its own")
            with ExitStack() as entered:
                entered.enter_context(sole_writer(self._folder))
                whole = self._folder / RESULTS_FILE
                parts = [whole] if whole.exists() else sorted((self._folder / UNFINISHED).glob("*.json"))
                for part in parts:
                    self._take(part, self._folder / FILMS_FILE if part == whole else part.with_suffix(".npz"))
                self._exits = entered.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def ended(self, planned: Sequence[EpisodeResult]) -> list[EpisodeResult] | None:
        """How these episodes ended, in their order; None if not all of them have."""
        found = [self._ended.get((episode.task, episode.seed)) for episode in planned]
        whole = [result for result in found if result is not None]
        if len(whole) < len(planned):
            return None
        if [result.instruction for result in whole] != [episode.instruction for episode in planned]:
            raise UserError(f"{self._folder}: these episodes ran under other instructions; name another folder")
        return whole

    def keep(self, part: Sequence[EpisodeResult]) -> None:
        """Note the episodes of a part that has ended, and write them."""
        if self._folder is not None:
            path = self._folder / UNFINISHED / f"{len(self._ended):06}.json"
            if any(result.frames is not None for result in part):
                save_films(path.with_suffix(".npz"), part)
            save_results(path, part, **self._about)  # last: a part is there when its results are
        self._ended |= {(result.task, result.seed): result for result in part}

    def finish(self, results: Sequence[EpisodeResult]) -> None:
        """Write the episodes of all parts as results.json, and films.npz where any were filmed."""
        if self._folder is None:
            return
        if not (self._folder / RESULTS_FILE).exists():
            if any(result.frames is not None for result in results):
                save_films(self._folder / FILMS_FILE, results)
            save_results(self._folder / RESULTS_FILE, results, **self._about)
        shutil.rmtree(self._folder / UNFINISHED, ignore_errors=True)

    def _take(self, results: Path, films: Path) -> None:
        """Read what an earlier run of this rollout has kept."""
        episodes, about = load_results(results)
        if "suite" in self._about:
            about = {"suite": DEFAULT_SUITE, **about}  # version 0.1 named none
        names = sorted({*about, *self._about} - set(WHEREABOUTS))
        pairs = [(name, about.get(name), self._about.get(name)) for name in names]
        if other := [f"{name} {short_json(was)}, not {short_json(now)}" for name, was, now in pairs if was != now]:
            raise UserError(f"{results}: these episodes ran with {'; '.join(other)}: name another folder")
        seen = load_films(films) if films.exists() else {}
        for episode in episodes:
            self._ended[episode.task, episode.seed] = replace(episode, frames=seen.get(film_key(episode)))
