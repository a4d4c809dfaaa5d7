"""Passes whose layers are compiled: two functions of a layer serve all of them, so that depth costs no compilation."""

from __future__ import annotations

import copy
from typing import Any, no_type_check

import numpy as np
import torch
from einops import rearrange
from torch import nn

from repwam_core.model.blocks import WAMLayer
from repwam_core.model.captured import Run
from repwam_core.model.wam import WorldActionModel


def compiled_run(wam: WorldActionModel, **options: Any) -> Run:
    """`wam.run` with what surrounds attention compiled in every layer, when a kind of pass first comes.

    einops remembers which kinds of arrays it has met, and a compiled graph is thrown away when that memory grows: it
    meets both kinds before anything is compiled.

    Args:
        wam: left as it is; the weights are shared.
        **options: of `torch.compile`.
    """
    for values in (np.zeros(1), torch.zeros(1)):
        rearrange(values, "one -> one")
    before, after = (torch.compile(part, dynamic=False, **options) for part in (_before, _after))
    other = copy.copy(wam)
    layers = nn.ModuleList(_CompiledLayer(layer, before, after) for layer in wam.layers)
    other.__dict__["_modules"] = {**wam._modules, "layers": layers}
    return other.run


class _CompiledLayer(nn.Module):
    """`WAMLayer` without gradients, as two compiled functions around attention."""

    def __init__(self, layer: nn.Module, before: Any, after: Any) -> None:
        super().__init__()
        self.layer, self._before, self._after = layer, before, after

    @no_type_check
    def forward(self, number, video, side, modulations, texts, tensors, attention):
        q, k, v = self._before(self.layer, video, side, modulations, (tensors.cos, tensors.sin))
        attended = attention(number, *(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return self._after(self.layer, video, side, attended, modulations, texts, (tensors.video, tensors.side))


@no_type_check
def _before(layer, *inputs):
    return WAMLayer.before(layer, *inputs)


@no_type_check
def _after(layer, *inputs):
    return WAMLayer.after(layer, *inputs)
