"""Initial weights drawn parameter by parameter, so that a part of the model can be drawn without the rest.

`WorldActionModel` draws its weights one after the other from torch's global generator. Here every parameter has a
generator of its own, seeded by (seed, name): a model that is spread over many ranks starts from the same weights as in
one process, and no rank ever holds more than one whole parameter (docs/decisions/031). The distributions are the same.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float
from repvitok.errors import UserError
from repvitok.sharded import copy_whole
from torch import Tensor, nn

from repwam_core.model.blocks import ExpertLayer, Projections
from repwam_core.model.wam import SpaceProjections, WorldActionModel

EMBEDDING_STD = 0.02
ZERO_OUTPUTS = ("video_out", "action_out", "project", "joint_out")
"""Linear layers that start at zero: velocities, and the modulation by the noise level."""


def initialise(wam: WorldActionModel, seed: int) -> None:
    """Overwrite every parameter by its initial value, sharded or not."""
    for name, parameter, draw in initial_draws(wam):
        generator = torch.Generator().manual_seed(_seed(seed, name))
        copy_whole(parameter, draw(tuple(parameter.shape), generator))


def load_whole(wam: WorldActionModel, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite the parameters that `tensors` has, sharded or not, by values that every rank holds whole."""
    for name, parameter in wam.named_parameters():
        if name in tensors:
            copy_whole(parameter, tensors[name])


Draw = Callable[[tuple[int, ...], torch.Generator], Float[Tensor, "..."]]


def initial_draws(wam: WorldActionModel) -> Iterator[tuple[str, nn.Parameter, Draw]]:
    """Every parameter with its name and the distribution of its initial value."""
    for prefix, module in wam.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            yield (f"{prefix}.{leaf}" if prefix else leaf), parameter, _draw(prefix, module, leaf)


def _draw(prefix: str, module: nn.Module, leaf: str) -> Draw:
    name = prefix.rpartition(".")[2]
    if isinstance(module, nn.Linear):
        if name in ZERO_OUTPUTS:
            return _constant(0.0)
        if prefix.startswith("spaces."):
            return _uniform(1 / math.sqrt(module.in_features))
        bound = math.sqrt(6 / (module.in_features + module.out_features))  # Xavier's
        return _constant(0.0) if leaf == "bias" else _uniform(bound)
    if isinstance(module, (nn.LayerNorm, Projections)):
        return _constant(0.0 if leaf == "bias" else 1.0)
    if isinstance(module, ExpertLayer) and leaf == "table":
        return _open_gates
    if isinstance(module, (WorldActionModel, SpaceProjections)) or leaf == "null":
        return _normal
    if leaf == "table":
        return _constant(0.0)
    raise UserError(f"no initial value is defined for {prefix}.{leaf} of a {type(module).__name__}")


def _constant(value: float) -> Draw:
    return lambda shape, _: torch.full(shape, value)


def _uniform(bound: float) -> Draw:
    return lambda shape, generator: torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return EMBEDDING_STD * torch.randn(shape, generator=generator)


def _open_gates(shape: tuple[int, ...], _: torch.Generator) -> Tensor:
    return torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])[None, :, None].expand(shape).clone()


def _seed(seed: int, name: str) -> int:
    return int(np.random.SeedSequence((seed, zlib.crc32(name.encode()))).generate_state(1, np.uint64)[0] >> 1)
