"""What goes into the world action model, and what comes out: tensors beside the layout that explains them.

Clean tokens that no prediction depends on are left out of a teacher-forced pass (`without_unread`). The last chunk of a
document has no successor that could read it: in `joint` none of its clean tokens matter, in `sequential` only its video
does, which its own noisy actions see. In segments of six transitions that is one token in fourteen. Outputs and
gradients stay what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from repvitok.runtime.errors import UserError
from torch import Tensor

from repwam_core.model.config import LATENT_SPACE, WAMConfig
from repwam_core.model.sequence import KEPT_LAYOUTS, Modality, Run, SequenceLayout, concat, runs


@dataclass(frozen=True, eq=False)
class WAMInputs:
    """A batch of sequences of one layout.

    Attributes:
        layout: what each token is.
        video: standardised latents of the video tokens, clean and noisy, in the layout's order; the noisy ones already
            stand on the path of `flow.interpolate`.
        actions: normalised action vectors of the action tokens, clean and noisy alike, in the layout's order.
        states: normalised robot states of the state tokens; None where the layout holds none.
        times: noise time t of each entry of `layout.levels`, in [0, 1]; 1 for clean tokens, or less where the history
            is lightly noised.
        text: token-level hidden states of each document's instruction.
        text_mask: which of them are real; a document without any is unconditional.
        space: name of the action space.
    """

    layout: SequenceLayout
    video: Float[Tensor, "b n_video d"]
    actions: Float[Tensor, "b n_action c"]
    states: Float[Tensor, "b n_state state"] | None
    times: Float[Tensor, "b levels"]
    text: Float[Tensor, "b documents s width"]
    text_mask: Bool[Tensor, "b documents s"]
    space: str = LATENT_SPACE

    def check(self, config: WAMConfig) -> None:
        """Hold the tensors against the layout and the model.

        Raises:
            ValueError: a tensor does not fit; the message says which axis, what was expected and what came.
        """
        layout, space = self.layout, config.space(self.space)
        b = self.video.shape[0]
        _require_shape("video", self.video, (b, len(layout.video), config.latent_dim + config.joint_actions))
        _require_shape("actions", self.actions, (b, len(layout.actions), space.channels))
        _require_shape("times", self.times, (b, len(layout.levels)))
        _require_shape("text", self.text, (b, layout.documents, self.text_mask.shape[-1], config.text_dim))
        _require_shape("text_mask", self.text_mask, (b, layout.documents, self.text.shape[-2]))
        if self.states is not None:
            _require_shape("states", self.states, (b, len(layout.states), space.state_channels))
        elif len(layout.states):
            raise UserError(f"states: the layout holds {len(layout.states)} state tokens, but no states were given.")


@dataclass(frozen=True, eq=False)
class Velocities:
    """Predicted velocities (data - noise) of the noisy tokens.

    Attributes:
        video: in the order of `layout.noisy_video`.
        actions: in the order of `layout.noisy_actions`.
    """

    video: Float[Tensor, "b n_noisy_video d"]
    actions: Float[Tensor, "b n_noisy_action c"]


def document_inputs(
    layout: SequenceLayout,
    *,
    latents: Float[Tensor, "b frames tokens d"],
    noisy_latents: Float[Tensor, "b transitions tokens d"],
    actions: Float[Tensor, "b transitions a c"],
    noisy_actions: Float[Tensor, "b transitions a c"],
    states: Float[Tensor, "b frames state"] | None,
    times: Float[Tensor, "b levels"],
    text: Float[Tensor, "b s width"],
    text_mask: Bool[Tensor, "b s"],
    space: str = LATENT_SPACE,
) -> WAMInputs:
    """Lay one document's tensors out as `training_layout` orders its tokens.

    Args:
        layout: from `training_layout`.
        latents: clean latents of frames 0 .. F.
        noisy_latents: latents of frames 1 .. F on the path.
        actions: clean actions of the transitions into frames 1 .. F; unused where the layout has no action history.
        noisy_actions: the same on the path.
        states: robot state at each frame; unused where the layout holds no state tokens.
        times: one noise time per level of the layout.
        text, text_mask: the instruction.
        space: name of the action space.
    """
    has_history = len(layout.actions) > len(layout.noisy_actions)
    action_parts = [actions, noisy_actions] if has_history else [noisy_actions]
    return WAMInputs(
        layout=layout,
        video=rearrange(torch.cat([latents, noisy_latents], dim=1), "b frames tokens d -> b (frames tokens) d"),
        actions=rearrange(torch.cat(action_parts, dim=1), "b transitions a c -> b (transitions a) c"),
        states=states if len(layout.states) else None,
        times=times,
        text=rearrange(text, "b s width -> b 1 s width"),
        text_mask=rearrange(text_mask, "b s -> b 1 s"),
        space=space,
    )


def pack(documents: Sequence[WAMInputs]) -> WAMInputs:
    """Put documents one after the other into one sequence; none sees another.

    Shorter instructions are padded and masked.

    Raises:
        ValueError: no documents, several action spaces, or only some with states.
    """
    if len({document.space for document in documents}) != 1:
        raise UserError(
            f"expected documents of one action space, got {sorted({document.space for document in documents})}."
        )
    states = [document.states for document in documents if document.states is not None]
    if states and len(states) != len(documents):
        raise UserError(f"expected states in all {len(documents)} documents or in none, got {len(states)}.")
    s = max(document.text.shape[2] for document in documents)
    return WAMInputs(
        layout=concat([document.layout for document in documents]),
        video=torch.cat([document.video for document in documents], dim=1),
        actions=torch.cat([document.actions for document in documents], dim=1),
        states=torch.cat(states, dim=1) if states else None,
        times=torch.cat([document.times for document in documents], dim=1),
        text=torch.cat([_pad(document.text, s, axis=2) for document in documents], dim=1),
        text_mask=torch.cat([_pad(document.text_mask, s, axis=2) for document in documents], dim=1),
        space=documents[0].space,
    )


def _pad(values: Tensor, size: int, axis: int) -> Tensor:
    """Zeros (or False) appended along `axis` up to `size`."""
    shape = list(values.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([values, values.new_zeros(shape)], dim=axis)


def _require_shape(name: str, values: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(values.shape) != expected:
        raise UserError(f"{name}: the layout and the model expect shape {expected}, got {tuple(values.shape)}.")


class Read(NamedTuple):
    """The tokens that matter, and where they stand among those of their modality."""

    layout: SequenceLayout
    video: list[Run]
    actions: list[Run]
    states: list[Run]


def without_unread(inputs: WAMInputs, coupling: str) -> WAMInputs:
    """The same batch without the clean tokens that nothing reads."""
    read = read_tokens(inputs.layout, coupling)
    return replace(
        inputs,
        layout=read.layout,
        video=_chosen(inputs.video, read.video),
        actions=_chosen(inputs.actions, read.actions),
        states=None if inputs.states is None else _chosen(inputs.states, read.states),
    )


@lru_cache(maxsize=KEPT_LAYOUTS)
def read_tokens(layout: SequenceLayout, coupling: str) -> Read:
    """The tokens of a layout of `training_layout`, or of several packed, that some prediction depends on."""
    last = torch.zeros(layout.documents, dtype=torch.long)
    last.scatter_reduce_(0, layout.document, layout.chunk, "amax")
    unread = ~layout.noisy & (layout.chunk == last[layout.document])
    if coupling == "sequential":
        unread &= layout.modality != Modality.VIDEO
    keep = ~unread
    return Read(
        layout.take(keep.nonzero()[:, 0]),
        *(runs(keep[index].nonzero()[:, 0]) for index in (layout.video, layout.actions, layout.states)),
    )


def _chosen(values: Tensor, ranges: list[Run]) -> Tensor:
    """(b, n, c) -> (b, m, c): the tokens in `ranges`."""
    return torch.cat([values[:, start:stop] for start, stop in ranges], dim=1) if ranges else values[:, :0]
