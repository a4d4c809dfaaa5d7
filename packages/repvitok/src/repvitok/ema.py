"""Exponential moving average of a module's parameters."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from repvitok.errors import UserError
from repvitok.sharded import local


class ExponentialMovingAverage:
    """Averages w_ema <- d w_ema + (1 - d) w, kept beside the module and stored with its checkpoint.

    With `warmup` the decay of update k (from 0) is d_k = min(decay, (1 + k) / (10 + k)), so that a short run is not
    dominated by its random start.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999, warmup: bool = True) -> None:
        """Starts from the module's present parameters.

        Raises:
            ValueError: if decay is not in [0, 1).
        """
        if not 0 <= decay < 1:
            raise UserError(f"expected an EMA decay in [0, 1), got {decay}")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.average: dict[str, Tensor] = {
            name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes one step towards the module's parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        self.updates += 1
        parameters = self._parameters(module)
        averages = [local(self.average[name]) for name in parameters]
        torch._foreach_lerp_(averages, [local(parameter) for parameter in parameters.values()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrites the module's parameters with their averages."""
        for name, parameter in self._parameters(module).items():
            parameter.copy_(self.average[name])

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[nn.Module]:
        """Puts the averages into the module for the length of a `with` block, then the parameters back."""
        kept = {name: p.detach().clone() for name, p in self._parameters(module).items()}
        self.copy_to(module)
        try:
            yield module
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters(module).items():
                    parameter.copy_(kept[name])

    def to(self, device: torch.device | str) -> ExponentialMovingAverage:
        """Moves the averages to a device, in place."""
        self.average = {name: value.to(device) for name, value in self.average.items()}
        return self

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, safe to load with `weights_only=True`."""
        return {"updates": self.updates, "average": dict(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; names and shapes must be the module's."""
        for name in sorted(self.average.keys() ^ state["average"].keys()):
            raise UserError(f"EMA state and model differ at parameter {name!r}: load a checkpoint of this model")
        for name, value in state["average"].items():
            if value.shape != self.average[name].shape:
                shapes = f"{tuple(self.average[name].shape)} in the model, {tuple(value.shape)} in the EMA state"
                raise UserError(f"parameter {name!r} has shape {shapes}: load a checkpoint of this model")
            self.average[name].copy_(value)
        self.updates = int(state["updates"])

    def _parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in module.named_parameters() if name in self.average}
