"""The frames of filmed episodes on disk: one array per episode in an .npz file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from repvitok.runtime.files import atomic_file

from repwam_core.sim.results import EpisodeResult

__all__ = ["film_key", "load_films", "save_films"]


def film_key(result: EpisodeResult) -> str:
    """The name of an episode's frames in the file."""
    return f"{result.task}/{result.seed}"


def save_films(path: str | Path, results: Sequence[EpisodeResult]) -> None:
    """Write the frames of those episodes that were filmed."""
    films = {film_key(result): result.frames for result in results if result.frames is not None}
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **films)


def load_films(path: str | Path) -> Mapping[str, np.ndarray]:
    """``film_key`` -> uint8 ``(n, H, W, 3)``, read when looked up."""
    return np.load(path, allow_pickle=False)
