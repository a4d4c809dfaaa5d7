"""The settings of a world action model, checked where they are written down; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Literal

import msgspec
from repvitok.runtime.documents import MAX_PARAMETERS, Layers, Size, check_fields, parse
from repvitok.runtime.errors import UserError

COUPLINGS = ("joint", "sequential")
ATTENTIONS = ("shared", "per_modality")
MOST_LOOK_AHEAD = 8
OPTIONAL = ("joint_actions", "look_ahead")
"""Fields that files have only where they are not 0."""
LATENT_SPACE = "latent"
"""Name of the action space of stage one: the latent actions of the paper's Eq. 3."""
Recompute = Literal["none", "selective", "full", "offload"]
"""What a layer computes again in the backward pass instead of keeping it.

Nothing, all but attention, all of it, or all of it from inputs that meanwhile wait in the host's memory.
"""
_PRESETS: dict[str, dict[str, Any]] = {
    "1.3b": {},
    "5b": {"width": 3072, "heads": 24, "ffn": 14336, "action_ffn": 3072},
    "tiny": {
        "width": 128,
        "depth": 4,
        "heads": 4,
        "ffn": 512,
        "action_width": 128,
        "action_ffn": 512,
        "text_dim": 384,
        "rope_base": 100.0,
    },
}


@dataclass(frozen=True, kw_only=True)
class ActionSpace:
    """What an action is: its own input and output projections in the model (docs/decisions/000, entry 7).

    Attributes:
        channels: numbers c in one action vector; the named-channel layout shared by a set of embodiments.
        vectors_per_transition: action vectors a between two latent frames.
        state_channels: numbers in the robot state that enters with each observed frame; 0 for none.
    """

    channels: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    vectors_per_transition: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1
    state_channels: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class WAMConfig:
    """Shape of a `WorldActionModel`. The defaults are the paper's 1.3 B model (Sec. 4.1).

    Attributes:
        width: hidden size h_v of the video expert and of the shared attention.
        depth: transformer layers, of both experts.
        heads: attention heads at `width`; the head size, width / heads, is also that of the action expert's
            cross-attention.
        ffn: hidden size of the video expert's feed-forward layers.
        action_width: hidden size h_a of the action expert.
        action_ffn: hidden size of the action expert's feed-forward layers.
        text_dim: width D of the text encoder's hidden states.
        latent_dim: channels d of a visual latent token.
        coupling: what video and action of one noisy chunk see of each other, "joint" or "sequential"
            (docs/decisions/000, entry 3, `attention.visible`).
        attention: "shared" (one q, k, v, o at `width`; the action stream enters and leaves through adapters) or
            "per_modality" (the action stream has its own q, k, v, o), docs/decisions/000, entry 5.
        window: latent frames of history a chunk sees, before its own frames (docs/decisions/000, entry 6).
        action_history: whether executed actions are part of the history. Without them a policy cannot copy its
            own past.
        state_token: whether the robot state enters with each observed frame (docs/decisions/000, entry 11).
        joint_actions: channels of the actions that the video expert predicts beside each latent frame, by a head of its
            own, in place of action tokens; 0 for none. The paper's ablation "Joint Pred" (docs/decisions/033).
        look_ahead: layers that in training alone predict chunks 1 .. this after the one that is predicted; 0 for none.
            Training sets it (`LossSettings.look_ahead`), and an export leaves them out (docs/decisions/081).
        max_views: cameras for which a view embedding exists.
        rope_base: base of the rotary frequencies.
        spaces: the action spaces by name.
    """

    width: Size = 1536
    depth: Layers = 30
    heads: Size = 12
    ffn: Size = 7680
    action_width: Size = 768
    action_ffn: Size = 4480
    text_dim: Size = 2048
    latent_dim: Size = 96
    coupling: str = "joint"
    attention: str = "shared"
    window: Size = 32
    action_history: bool = True
    state_token: bool = False
    joint_actions: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
    look_ahead: Annotated[int, msgspec.Meta(ge=0, le=MOST_LOOK_AHEAD)] = 0
    max_views: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 4
    rope_base: Annotated[float, msgspec.Meta(gt=1)] = 10_000.0
    spaces: Mapping[str, ActionSpace] = field(default_factory=lambda: {LATENT_SPACE: ActionSpace(channels=4)})

    def __post_init__(self) -> None:
        check_fields(self)
        for name, choices in (("coupling", COUPLINGS), ("attention", ATTENTIONS)):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}.")
        if self.width % self.heads:
            raise UserError(f"width: expected a multiple of heads = {self.heads}, got {self.width}.")
        if self.head_dim % 2 or self.head_dim < 8:
            raise UserError(
                f"heads: expected an even head size width / heads of at least 8 (rotary over three axes), got "
                f"{self.width} / {self.heads} = {self.head_dim}."
            )
        if self.action_width % self.head_dim:
            raise UserError(
                f"action_width: expected a multiple of the head size {self.head_dim} = width / heads, got "
                f"{self.action_width}."
            )
        layer = self.width * (6 * self.width + 2 * self.ffn + 2 * self.text_dim) + 8 * self.action_width * (
            self.width + self.action_ffn
        )
        if self.depth * layer > MAX_PARAMETERS:
            raise UserError(
                f"depth {self.depth} of width {self.width}: {self.depth * layer:.0e} parameters, more than any model"
            )
        if not self.spaces:
            raise UserError("spaces: expected at least one action space, got none.")
        for name in self.spaces:
            if not name.isidentifier():
                raise UserError(f"spaces: expected names like 'latent' or 'metaworld', got {name!r}.")

    @property
    def head_dim(self) -> int:
        """Size of one attention head, in both experts."""
        return self.width // self.heads

    def space(self, name: str) -> ActionSpace:
        """The action space called `name`."""
        if name not in self.spaces:
            raise UserError(
                f"expected one of the model's action spaces {sorted(self.spaces)}, got {name!r}; add it with "
                "WorldActionModel.add_action_space."
            )
        return self.spaces[name]

    def has_state(self, space: str) -> bool:
        """Whether sequences in this space hold a state token with each observed frame."""
        return self.state_token and self.space(space).state_channels > 0

    def with_space(self, name: str, space: ActionSpace) -> WAMConfig:
        """This config with one more action space."""
        if self.spaces.get(name, space) != space:
            raise UserError(f"action space {name!r} is already {self.spaces[name]}; choose another name.")
        return replace(self, spaces={**self.spaces, name: space})

    @classmethod
    def preset(cls, name: str, **changes: Any) -> WAMConfig:
        """A named size, with some fields changed.

        "1.3b" and "5b" are the paper's: 1.30 B and 5.00 B parameters for video and 357 M and 363 M more for actions
        (docs/decisions: our reading of "about 350M"). "tiny" trains on a CPU in minutes.
        """
        if name not in _PRESETS:
            raise UserError(f"preset: expected one of {sorted(_PRESETS)}, got {name!r}.")
        return cls(**{**_PRESETS[name], **changes})

    def to_dict(self) -> dict[str, Any]:
        """Every field as JSON can hold it; those of `OPTIONAL` only where they are not 0, as files have it."""
        values = asdict(replace(self, spaces=dict(self.spaces)))
        return {name: value for name, value in values.items() if value or name not in OPTIONAL}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WAMConfig:
        """The inverse of `to_dict`."""
        values = {**dict.fromkeys(OPTIONAL, 0), **values}
        parse(values, cls, cls.__name__, required=[item.name for item in fields(cls)])
        for name, space in values["spaces"].items():
            parse(space, ActionSpace, f"spaces.{name}", required=[item.name for item in fields(ActionSpace)])
        spaces = {name: ActionSpace(**space) for name, space in values["spaces"].items()}
        return cls(**{**values, "spaces": spaces})
