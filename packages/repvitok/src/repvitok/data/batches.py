"""Which clips make up batch k of rank r: a function of the seed and k, with a beginning anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from repvitok.errors import UserError

_KIND_STREAM = 9  # sets the draw of the kinds apart from the draw of the clips, which has the same seed


@dataclass(frozen=True)
class StepBatches:
    """Endless batches of consecutive indices: batch k of rank r holds the same indices in every run.

    With b clips per rank and w ranks, batch k of rank r is indices (k w + r) b ... (k w + r) b + b - 1.

    Attributes:
        batch_size: b.
        first: number of the batch to begin with.
        rank, world_size: r and w.
    """

    batch_size: int
    first: int = 0
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[list[int]]:
        for batch in count(self.first):
            start = (batch * self.world_size + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))


@dataclass(frozen=True)
class GivenBatches:
    """Batches of numbers of clips, once through. Not a plain list: Lightning wraps the sampler of `predict`."""

    batches: Sequence[Sequence[int]]

    def __iter__(self) -> Iterator[Sequence[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@dataclass(frozen=True)
class MixtureBatches:
    """Endless batches of several kinds: every batch is of one kind, drawn from (seed, k) with the kinds' weights.

    All ranks have the same kind at the same step, hence the same shapes and the same work.

    Attributes:
        batch_sizes: clips per rank in a batch of each kind.
        weights: how often each kind comes, relative to the others.
        seed: of the draw.
        first, rank, world_size: as for `StepBatches`.
    """

    batch_sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int = 0
    first: int = 0
    rank: int = 0
    world_size: int = 1

    def kind(self, batch: int) -> int:
        """The kind of batch number `batch`."""
        draw = np.random.default_rng([self.seed, batch, _KIND_STREAM]).random() * sum(self.weights)
        return int(np.searchsorted(np.cumsum(self.weights)[:-1], draw, side="right"))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in count(self.first):
            kind = self.kind(batch)
            size = self.batch_sizes[kind]
            start = (batch * self.world_size + self.rank) * size
            yield [(kind, index) for index in range(start, start + size)]


class ClipMixture(Dataset[Tensor]):
    """Several data sets as one: item (kind, index) is item `index` of data set number `kind`."""

    def __init__(self, datasets: Sequence[Dataset[Tensor]]) -> None:
        self.datasets = list(datasets)

    def __getitem__(self, index: tuple[int, int]) -> Tensor:
        kind, number = index
        return self.datasets[kind][number]


class ClipLoader:
    """Batches for a training loop of one's own, that go on exactly where a saved state stopped.

        loader = ClipLoader(dataset, StepBatches(batch_size=8), num_workers=4)
        for video in loader:
            ...
            state = loader.state_dict()

    What counts is batches handed out: those that workers had prepared and nobody had taken are made again.

    Attributes:
        batches: which clips come; begins with the next batch.
    """

    def __init__(self, dataset: Dataset[Any], batches: StepBatches | MixtureBatches, num_workers: int = 0) -> None:
        self.batches = batches
        self._dataset, self._num_workers = dataset, num_workers

    def __iter__(self) -> Iterator[Any]:
        loader = DataLoader(self._dataset, batch_sampler=self.batches, num_workers=self._num_workers)  # pyright: ignore[reportArgumentType]
        for batch in loader:
            self.batches = replace(self.batches, first=self.batches.first + 1)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """How many batches were handed out, and the settings that decide what they held."""
        settings = {name: value for name, value in vars(self.batches).items() if name not in ("first", "rank")}
        return {"batches": self.batches.first, "settings": settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the last batch that was handed out.

        Raises:
            ValueError: batch size, ranks or mixture were others: the order of the data would be another.
        """
        if (mine := self.state_dict()["settings"]) != state["settings"]:
            raise UserError(f"the state is of batches with {state['settings']}, this loader has {mine}: use the same")
        self.batches = replace(self.batches, first=int(state["batches"]))
