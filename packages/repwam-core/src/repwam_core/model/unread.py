"""Clean tokens that no prediction depends on are left out of a teacher-forced pass.

The last chunk of a document has no successor that could read it: in `joint` none of its clean tokens matter, in
`sequential` only its video does, which its own noisy actions see. In segments of six transitions that is one token in
fourteen. Outputs and gradients stay what they are.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from repwam_core.model.inputs import WAMInputs
from repwam_core.model.sequence import KEPT_LAYOUTS, Run, SequenceLayout, runs
from repwam_core.model.tokens import Modality


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
