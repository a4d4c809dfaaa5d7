"""Several data sets in one run: their weights, and the layout of named channels that their robots share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from repvitok.data import LatentMeta, LatentShards
from repvitok.data.split import HeldOut, held_out_by_0_1
from repvitok.runtime.documents import Above0, check_arguments
from repvitok.runtime.errors import UserError

from repwam_core.data.episodes import MEMORY_LIMIT_GB, EpisodeStore
from repwam_core.interface import Embodiment, channel_units, shared_channels
from repwam_core.model.config import LATENT_SPACE
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
        space: "latent" for latent actions, any other name for robot actions.
        text_encoder: name of the text encoder.
        held_out: share of each data set's episodes that is held out; or numbers of an only data set's.
        tokenizer_digest: of the tokenizer that must have made all latents.
        memory_limit_gb: of each data set, see `EpisodeStore`.
        chunk_frames: latent frames of the longest chunk that is learned, see `count_statistics`.
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
