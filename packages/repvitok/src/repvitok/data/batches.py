"""Which clips make up batch k of rank r: a function of the seed and k, with a beginning anywhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any, Generic, TypeVar

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from repvitok.errors import UserError

Batch = TypeVar("Batch")
ENDLESS = 2**62  # the length of what has no end; a float holds it exactly
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


class EndlessLoader(ABC, Generic[Batch]):
    """Training batches that keep their place: batch k of rank r is the same in every run.

    Each pass over them goes on after the last batch handed out: so a new epoch of Lightning's (`limit_train_batches`)
    has new batches, and a run that is resumed has those it would have had. Lightning stores `state_dict` in its
    checkpoints. It asks for no batch ahead of time, because there is a length: the place is that of the training.

    Attributes:
        position: batches handed out so far, those of earlier runs included.
    """

    def __init__(self, first: int = 0, length: int = ENDLESS) -> None:
        """Begins with batch `first`; every `length` batches end a pass."""
        self.position, self._length = first, length

    @abstractmethod
    def batches_from(self, number: int) -> Iterator[Batch]:
        """Batch `number` and those after it, without end."""

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        end = (self.position // self._length + 1) * self._length
        for batch in islice(self.batches_from(self.position), end - self.position):
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The place, in plain numbers."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the last batch that was handed out."""
        self.position = int(state["position"])


class ClipLoader(EndlessLoader[Any]):
    """Batches of clips that go on exactly where a saved state stopped, also for a training loop of one's own.

        loader = ClipLoader(dataset, StepBatches(batch_size=8), num_workers=4)
        for video in loader:
            ...
            state = loader.state_dict()

    What counts is batches handed out: those that workers had prepared and nobody had taken are made again.

    Attributes:
        batches: which clips come.
    """

    def __init__(self, dataset: Dataset[Any], batches: StepBatches | MixtureBatches, num_workers: int = 0) -> None:
        super().__init__(batches.first)
        self.batches = batches
        self._dataset, self._num_workers = dataset, num_workers
        self._iterator: Iterator[Any] | None = None  # the name that Lightning knows: it ends the workers after a run
        self._reached = 0

    def batches_from(self, number: int) -> Iterator[Any]:
        """From the workers of the last pass, where they stand at that batch."""
        if self._iterator is None or self._reached != number:
            batches = replace(self.batches, first=number)
            loader = DataLoader(self._dataset, batch_sampler=batches, num_workers=self._num_workers)  # pyright: ignore[reportArgumentType]
            self._iterator, self._reached = iter(loader), number
        for batch in self._iterator:
            self._reached += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The place, and the settings that decide what the batches before it held."""
        return super().state_dict() | {"settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the last batch that was handed out.

        Raises:
            ValueError: batch size, ranks or mixture were others: the order of the data would be another.
        """
        if (mine := self._settings()) != (found := state["settings"]):
            raise UserError(f"the state is of batches with {found}, this loader has {mine}: use the same")
        super().load_state_dict({"position": state.get("position", state.get("batches"))})

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.batches).items() if name not in ("first", "rank")}
