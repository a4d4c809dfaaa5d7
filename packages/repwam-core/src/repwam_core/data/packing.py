"""Several data sets in one run, with the named channels that their robots share; and how episodes share a sequence.

Packing is an endless stream of plans that can be resumed. Episodes go whole, first-fit, into a few open sequences of a
token budget; what fits into none closes the fullest one. Plans handle sizes only, so that every rank can follow the
whole stream and read its own sequences out of the stores.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from repvitok.data import LatentMeta, LatentShards
from repvitok.data.split import HeldOut, held_out_by_0_1
from repvitok.runtime.documents import Above0, Frames, Positive, Size, check_arguments, check_fields
from repvitok.runtime.errors import UserError

from repwam_core.data.batches import Documents, PackedBatch, Piece
from repwam_core.data.episodes import MEMORY_LIMIT_GB, EpisodeStore
from repwam_core.interface import Embodiment, channel_units, shared_channels
from repwam_core.model.config import LATENT_SPACE, WAMConfig
from repwam_core.statistics import ActionKind, Statistics
from repwam_core.text import EMBEDDED


@dataclass(frozen=True, kw_only=True)
class DataSetSettings:
    """One data set of a run.

    Attributes:
        latents: folder of its latent shards, or with `data.encoding` of the data set itself.
        weight: its share of the training tokens, against the other data sets' weights.
        statistics: statistics.json to scale its actions by; counted on its training episodes when None.
        action_units: units of its action channels, see `repwam_core.interface.channel_units`; "1" when None.
        action_kind: what its actions are and what is learned of them: "absolute", "relative" or "from_state".
    """

    latents: str | Path
    weight: Above0 = 1.0
    statistics: str | Path | None = None
    action_units: list[str] | dict[str, str] | str | None = None
    action_kind: ActionKind = "absolute"

    def __post_init__(self) -> None:
        check_arguments(DataSetSettings, vars(self))


class Mixture:
    """The episodes of all data sets of a run, with one width of actions and states.

    Every robot keeps the names of its channels; their union, in order of first appearance, is the layout. What a robot
    lacks is zero and masked out of the loss (docs/decisions/000, entry 7). Actions, states and latents are scaled by
    the statistics of their own data set.

    Args:
        settings: the data sets.
        space, text_encoder, held_out, memory_limit_gb, chunk_frames: of each data set, see `EpisodeStore`.
        tokenizer_digest: of the tokenizer that must have made all latents.
        split_of_0_1: hold out what version 0.1 did for a share: go on with a run that it began.
    """

    def __init__(
        self,
        settings: Sequence[DataSetSettings],
        space: str = "robot",
        text_encoder: str = EMBEDDED,
        held_out: HeldOut = 0.0,
        tokenizer_digest: str | None = None,
        memory_limit_gb: float | int = MEMORY_LIMIT_GB,
        chunk_frames: int = 1,
        split_of_0_1: bool = False,
    ) -> None:
        shards = [LatentShards(entry.latents, expect_digest=tokenizer_digest) for entry in settings]
        metas = [entry.meta for entry in shards]
        _check_common("the tokenizer of the latents", [meta.tokenizer_digest[:16] for meta in metas], shards)
        ranged = [entry for entry in shards if entry.meta.depth_range is not None]
        _check_common("the depth range of the latents", [str(entry.meta.depth_range) for entry in ranged], ranged)
        if space == LATENT_SPACE:
            frames = [str(meta.latent_action_frames) for meta in metas]
            _check_common("the latent frames that a latent action stands for (transition_frames)", frames, shards)
        several = len(settings) > 1 and space != LATENT_SPACE
        layout = _action_layout(settings, metas) if several else None
        states = list(dict.fromkeys(name for meta in metas for name in meta.state_names)) if several else None
        self.space, self.weights = space, [entry.weight for entry in settings]
        kept: list[HeldOut] = [held_out for _ in shards]
        if split_of_0_1 and isinstance(held_out, float | int):
            kept = [held_out_by_0_1((info.episode_index for info in entry.infos), held_out) for entry in shards]
        self.stores = [
            EpisodeStore(
                entry_shards,
                space=space,
                text_encoder=text_encoder,
                held_out=kept[number],
                statistics=None if entry.statistics is None else Statistics.load(entry.statistics),
                units=None
                if space == LATENT_SPACE
                else channel_units(entry.action_units, entry_shards.meta.action_names),
                kind=entry.action_kind,
                layout=layout,
                state_layout=states,
                number=number,
                memory_limit_gb=memory_limit_gb,
                chunk_frames=chunk_frames,
            )
            for number, (entry, entry_shards) in enumerate(zip(settings, shards, strict=True))
        ]
        vectors = [str(store.vectors_per_transition) for store in self.stores]
        _check_common("action vectors per latent transition", vectors, shards)

    @property
    def action_channels(self) -> tuple[str, ...]:
        """Names of the action channels, in order."""
        return self.stores[0].action_channels

    @property
    def state_channels(self) -> tuple[str, ...]:
        """Names of the state's numbers, in order."""
        return self.stores[0].state_channels

    @property
    def vectors_per_transition(self) -> int:
        """Action vectors per latent transition, a."""
        return self.stores[0].vectors_per_transition

    @property
    def latent_dim(self) -> int:
        """Channels of a latent."""
        return self.stores[0].meta.latent_dim

    @property
    def text_dim(self) -> int:
        """Width of the instructions' hidden states."""
        return self.stores[0].text.shape[-1]


def _action_layout(settings: Sequence[DataSetSettings], metas: Sequence[LatentMeta]) -> tuple[str, ...]:
    """The union of all action channels."""
    kinds: dict[str, str] = {}
    robots = []
    for entry, meta in zip(settings, metas, strict=True):
        robots.append(Embodiment.from_names(str(entry.latents), meta.action_names, units=entry.action_units))
        for name in meta.action_names:
            if kinds.setdefault(name, entry.action_kind) != entry.action_kind:
                raise UserError(
                    f"data_sets: action channel {name!r} is {entry.action_kind} in {entry.latents} and {kinds[name]} "
                    "elsewhere; rename one of them"
                )
    return shared_channels(robots)


def _check_common(what: str, values: Sequence[str], shards: Sequence[LatentShards]) -> None:
    if len(set(values)) > 1:
        found = ", ".join(f"{entry.root}: {value}" for entry, value in zip(shards, values, strict=True))
        raise UserError(f"data_sets: expected {what} to be the same in all data sets, got {found}")


PATIENCE = 4
"""A sequence is closed before a fuller one after as many others as this times the open ones."""


@dataclass(frozen=True, kw_only=True)
class PackingSettings:
    """How episodes are packed (RepWAM Sec. 4.1; docs/decisions/030).

    Attributes:
        token_budget: tokens of a sequence, clean and noisy together; the paper's 200K (1.3 B) and 160K (5 B).
        open_sequences: sequences that are filled at the same time; more waste less and mix farther.
        chunk_multiple: an episode longer than the budget is cut after a multiple of this many transitions, so that a
            cut is a chunk border for every chunk size that divides it: 12 for sizes 1 to 4.
    """

    token_budget: Positive = 200_000
    open_sequences: Size = 32
    chunk_multiple: Frames = 12

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class TokenCost:
    """Tokens of a document as `sequence.training_layout` lays it out, clean and noisy.

    Attributes:
        video: tokens of a latent frame, over all cameras.
        vectors: action vectors per transition; 0 where actions have no tokens.
        state: whether each clean frame has a state token.
        action_history: whether clean actions are part of the sequence.
    """

    video: int
    vectors: int
    state: bool = False
    action_history: bool = True

    def of(self, transitions: int) -> int:
        """Tokens of a document of `transitions` transitions, one frame more."""
        return self._per_frame * (transitions + 1) + self._per_transition * transitions

    def fitting(self, budget: int) -> int:
        """The most transitions whose tokens fit a budget; below 1 if none do."""
        # n transitions have n + 1 frames: per_frame (n + 1) + per_transition n <= budget, solved for n
        return (budget - self._per_frame) // (self._per_frame + self._per_transition)

    @property
    def _per_frame(self) -> int:
        return self.video + int(self.state)

    @property
    def _per_transition(self) -> int:
        return self.video + self.vectors * (1 + int(self.action_history))


class PackedPieces(NamedTuple):
    """Sequence number `index` of the stream, and its tokens."""

    index: int
    pieces: tuple[Piece, ...]
    tokens: int


@dataclass(frozen=True, eq=False)
class Source:
    """The episodes of one data set, by size alone.

    Attributes:
        episodes: the episodes' numbers, as the data set counts them.
        transitions: transitions of each.
        cost: what they cost.
        weight: share of the tokens, against the other data sets' weights.
    """

    episodes: np.ndarray
    transitions: np.ndarray
    cost: TokenCost
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not len(self.episodes) or len(self.episodes) != len(self.transitions):
            raise UserError(
                f"expected episodes with their lengths, got {len(self.episodes)} and {len(self.transitions)}"
            )
        if not self.weight > 0:
            raise UserError(f"expected a weight above 0, got {self.weight}")


class SequencePacker(Iterator[PackedPieces]):
    """An endless stream of packed sequences; sequence i depends on (sources, settings, seed) and i only.

    The data set that is furthest behind its share of tokens gives the next episode, each in an order of its own that
    is drawn anew for every pass through it: no episode is seen twice before all were seen once.
    """

    def __init__(self, sources: Sequence[Source], settings: PackingSettings, seed: int = 0) -> None:
        if not sources:
            raise UserError("expected at least one data set to pack, got none")
        self.sources, self.settings, self.seed = tuple(sources), settings, seed
        self._longest = [self._longest_piece(number) for number in range(len(sources))]
        self._smallest = min(source.cost.of(int(source.transitions.min())) for source in sources)
        self._drawn, self._spent = [0] * len(sources), [0] * len(sources)
        self._open: list[list[Piece]] = []
        self._opened: list[int] = []
        self._closed = 0
        self._ready: deque[list[Piece]] = deque()
        self._packed = self._tokens = 0

    def __next__(self) -> PackedPieces:
        while not self._ready:
            self._feed()
        pieces = tuple(self._ready.popleft())
        tokens, index = self._size(pieces), self._packed
        self._packed, self._tokens = self._packed + 1, self._tokens + tokens
        return PackedPieces(index, pieces, tokens)

    @property
    def waste(self) -> float:
        """Share of the token budgets of all sequences so far that holds no token; 0 before the first."""
        return 1 - self._tokens / (self._packed * self.settings.token_budget) if self._packed else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, in plain numbers."""
        return {
            "episodes": [len(source.episodes) for source in self.sources],
            "drawn": list(self._drawn),
            "spent": list(self._spent),
            "open": [[list(piece) for piece in pieces] for pieces in self._open],
            "opened": list(self._opened),
            "closed": self._closed,
            "ready": [[list(piece) for piece in pieces] for pieces in self._ready],
            "packed": self._packed,
            "tokens": self._tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another packer of the same data stood."""
        if state["episodes"] != (own := [len(source.episodes) for source in self.sources]):
            raise UserError(f"the packing was saved with {state['episodes']} episodes per data set, these have {own}")
        self._drawn, self._spent = list(state["drawn"]), list(state["spent"])
        self._open = [[Piece(*piece) for piece in pieces] for pieces in state["open"]]
        self._opened, self._closed = list(state["opened"]), int(state["closed"])
        self._ready = deque([Piece(*piece) for piece in pieces] for pieces in state["ready"])
        self._packed, self._tokens = int(state["packed"]), int(state["tokens"])

    def _longest_piece(self, number: int) -> int:
        """Transitions of the longest piece of a data set: all fit whole, or a multiple of `chunk_multiple`."""
        source, settings = self.sources[number], self.settings
        fitting, longest = source.cost.fitting(settings.token_budget), int(source.transitions.max())
        if fitting >= longest:
            return longest
        if fitting < settings.chunk_multiple:
            needed = source.cost.of(min(longest, settings.chunk_multiple))
            raise UserError(
                f"packing.token_budget: expected at least {needed} tokens for the episodes of data set {number}, got "
                f"{settings.token_budget}"
            )
        return fitting // settings.chunk_multiple * settings.chunk_multiple

    def _feed(self) -> None:
        """Place the next episode."""
        # tokens given so far in units of its share: the least served is next
        behind = [spent / source.weight for spent, source in zip(self._spent, self.sources, strict=True)]
        number = int(np.argmin(behind))
        source = self.sources[number]
        # the d-th draw is place d % n of the order of pass d // n
        visit, position = divmod(self._drawn[number], len(source.episodes))
        row = _order(len(source.episodes), self.seed, number, visit)[position]
        self._drawn[number] += 1
        episode = int(source.episodes[row])
        for start, transitions in self._cuts(number, int(source.transitions[row]), (visit, episode)):
            piece = Piece(number, episode, start, transitions, visit)
            self._spent[number] += source.cost.of(transitions)
            self._place(piece)

    def _cuts(self, number: int, transitions: int, key: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """(start, transitions) of an episode's pieces; the first cut of a long episode is drawn anew at every visit."""
        if transitions <= self.sources[number].cost.fitting(self.settings.token_budget):
            yield 0, transitions
            return
        longest, multiple = self._longest[number], self.settings.chunk_multiple
        # The first piece is a random multiple of the chunk, so that borders fall elsewhere on each visit
        start = multiple * int(np.random.default_rng((self.seed, 1, number, *key)).integers(1, longest // multiple + 1))
        yield 0, start  # every cut is a multiple of `chunk_multiple`; only the last piece ends elsewhere
        while start < transitions:
            yield start, min(longest, transitions - start)
            start += longest

    def _place(self, piece: Piece) -> None:
        """First fit; what fits nowhere closes the fullest sequence, and a full sequence is closed at once.

        Sequences stand in the order in which they were opened. One that has been open for long is closed before a
        fuller one, so that no episode waits for ever.
        """
        settings, size = self.settings, self._size((piece,))
        room = [settings.token_budget - self._size(pieces) for pieces in self._open]
        fits = next((number for number, left in enumerate(room) if left >= size), None)
        if fits is None:
            if len(room) == settings.open_sequences:
                waited = self._closed - self._opened[0]
                self._close(0 if waited > PATIENCE * settings.open_sequences else int(np.argmin(room)))
            self._open.append([])
            self._opened.append(self._closed)
            fits = len(self._open) - 1
        self._open[fits].append(piece)
        if settings.token_budget - self._size(self._open[fits]) < self._smallest:
            self._close(fits)

    def _close(self, number: int) -> None:
        self._ready.append(self._open.pop(number))
        self._opened.pop(number)
        self._closed += 1

    def _size(self, pieces: Sequence[Piece]) -> int:
        return sum(self.sources[piece.data_set].cost.of(piece.transitions) for piece in pieces)


@lru_cache(maxsize=64)
def _order(episodes: int, seed: int, data_set: int, visit: int) -> np.ndarray:
    """The order in which a data set's episodes come on one pass."""
    return np.random.default_rng((seed, 0, data_set, visit)).permutation(episodes)


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
        mine = [next(self.packer) for _ in range(self.world_size)][self.rank]  # the others' are planned, not read
        batch = read_packed(self.mixture, mine, self.packer.settings.token_budget)
        return self.prepare(batch), self.packer.state_dict()
