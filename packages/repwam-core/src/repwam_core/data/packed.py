"""Packed training batches: the episodes of one sequence, read out of their stores, and their loader."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from repwam_core.data.batches import Documents, PackedBatch
from repwam_core.data.mixture import Mixture
from repwam_core.data.packing import PackedPieces, PackingSettings, SequencePacker, Source, TokenCost
from repwam_core.model.config import WAMConfig


def token_cost(config: WAMConfig, space: str, grid: tuple[int, int, int], vectors: int) -> TokenCost:
    """What a document costs in the sequences of a model."""
    video = grid[0] * grid[1] * grid[2]
    return TokenCost(video, 0 if config.joint_actions else vectors, config.has_state(space), config.action_history)


def make_packer(mixture: Mixture, settings: PackingSettings, config: WAMConfig, seed: int) -> SequencePacker:
    """The stream of packed sequences of all training episodes of a run."""
    sources = [
        Source(
            episodes=store.train_episodes,
            transitions=store.lengths[store.train_episodes] - 1,
            cost=token_cost(config, mixture.space, store.meta.grid, store.vectors_per_transition),
            weight=weight,
        )
        for store, weight in zip(mixture.stores, mixture.weights, strict=True)
    ]
    return SequencePacker(sources, settings, seed)


def read_packed(mixture: Mixture, packed: PackedPieces, token_budget: int) -> PackedBatch:
    """Gather the tensors of a packed sequence."""
    documents = []
    for piece in packed.pieces:
        store = mixture.stores[piece.data_set]
        segment = store.batch(np.array([piece.episode]), np.array([piece.start]), piece.transitions)
        documents.append(Documents.of_segments(segment, store.meta.grid))
    return PackedBatch(packed.index, packed.pieces, Documents.packed(documents), packed.tokens, token_budget)


class PackedLoader:
    """Endless packed sequences cut into epochs of `batches`, with a position that is saved and restored.

    Batch p of rank r is sequence p * world_size + r of the packer's stream: every rank follows the whole stream, whose
    plans are cheap, and reads its own sequences. The saved position is the stream's, so that training may go on with
    another number of ranks.

    The next sequence is planned and read while training works on the last one; what is saved is where the stream stood
    when the last batch was handed out.

    Args:
        mixture, packer: what is read, and in which order.
        batches: of an epoch.
        rank, world_size: which sequences are this process's.
        prepare: adds what can be made of a sequence ahead of its step.

    Attributes:
        waited_s: seconds that training has waited for batches so far.
    """

    def __init__(
        self, mixture: Mixture, packer: SequencePacker, batches: int, rank: int = 0, world_size: int = 1,
        prepare: Callable[[PackedBatch], PackedBatch] = lambda batch: batch,
    ) -> None:  # fmt: skip
        self.mixture, self.packer, self.batches, self.prepare = mixture, packer, batches, prepare
        self.rank, self.world_size = rank, world_size
        self.position, self.waited_s = 0, 0.0
        self._stood = packer.state_dict()
        self._ahead: Future[tuple[PackedBatch, dict[str, Any]]] | None = None

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[PackedBatch]:
        if self._ahead is not None:  # an epoch that was left early had planned ahead
            wait([self._ahead])
            self.packer.load_state_dict(self._stood)
        end = (self.position // self.batches + 1) * self.batches
        with ThreadPoolExecutor(1, "packed-batches") as reader:
            self._ahead = reader.submit(self._read_next)
            while self.position < end:
                start_s = time.perf_counter()
                batch, self._stood = self._ahead.result()
                self.waited_s += time.perf_counter() - start_s
                self.position += 1
                if self.position < end:
                    self._ahead = reader.submit(self._read_next)
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Batches handed out so far and where the packer stood then; Lightning stores it in the checkpoint."""
        return {"position": self.position, "packer": self._stood}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch that was handed out."""
        self.position = int(state["position"])
        self.packer.load_state_dict(state["packer"])
        self._stood = self.packer.state_dict()

    def _read_next(self) -> tuple[PackedBatch, dict[str, Any]]:
        """This rank's next sequence, and where the packer stands after it."""
        mine = [next(self.packer) for _ in range(self.world_size)][self.rank]
        batch = read_packed(self.mixture, mine, self.packer.settings.token_budget)
        return self.prepare(batch), self.packer.state_dict()
