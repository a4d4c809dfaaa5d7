"""Whether a latent action is a motion that other scenes can borrow, or a description of its own scene."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from repvitok.runtime.errors import UserError
from torch import Tensor

from latent_action.dynamics import Grid
from latent_action.model import LatentActionTokenizer
from latent_action.transitions import TransitionTable

_BATCH = 512


@dataclass(frozen=True)
class TransferLosses:
    """Mean squared error of z_hat_{t+1} = f(z_t, l) under four latent actions, over the same transitions.

    Attributes:
        own: l of the transition itself, q(z_t, z_{t+1}).
        paired: l of the transition of another group in which the robot moved most alike. As low as `own` if l is
            motion alone and the motions are alike; as high as `shuffled` if l only says what its own scene looks like.
        shuffled: l of a random transition of another group.
        static: q(z_t, z_t), nothing happens.
    """

    own: float
    paired: float
    shuffled: float
    static: float


@torch.no_grad()
def transfer_losses(
    lat: LatentActionTokenizer,
    table: TransitionTable,
    group: Int[Tensor, " transitions"] | None = None,
    grid: Grid | None = None,
    seed: int = 0,
) -> TransferLosses:
    """Predict each transition with the latent action of another one.

    Args:
        lat: the latent action tokenizer.
        table: transitions whose robot motion is known; usually held-out ones.
        group: which transitions must not lend to each other; their episodes by default. With tasks as groups a
            donor never shows the borrower's scene.
        grid: (views, rows, columns) of a latent frame.
        seed: of the random lenders.
    """
    group = table.episode if group is None else group
    donor = matching_transitions(table, group)
    control = _random_donor(group, torch.Generator().manual_seed(seed))
    actions = latent_actions(lat, table, grid)
    total = torch.zeros(4, dtype=torch.float64)
    for index in torch.arange(len(table)).split(_BATCH):
        z_t, z_next = table.pairs(index)
        static = lat.encode(torch.stack([z_t, z_t], dim=1), grid)[:, 0]
        for number, action in enumerate((actions[index], actions[donor[index]], actions[control[index]], static)):
            error = (lat.decode(z_t, action, grid) - z_next).square().mean(dim=(1, 2))
            total[number] += error.double().sum()
    own, paired, shuffled, static = (total / len(table)).tolist()
    return TransferLosses(own, paired, shuffled, static)


def matching_transitions(table: TransitionTable, group: Int[Tensor, " transitions"]) -> Int[Tensor, " transitions"]:
    """For every transition, the one of another group in which the robot moved most alike.

    Alike is the Euclidean distance of the changes of the robot's state, each channel in its own standard deviation.
    """
    if table.motion is None:
        raise UserError("These latents hold no robot state, so nobody knows which motions are alike.")
    if len(group.unique()) < 2:
        raise UserError("All transitions are of one group, so none can lend to another: take more episodes.")
    std = table.motion.std(dim=0, correction=0)
    motion = table.motion / torch.where(std > 1e-6, std, 1.0)
    pieces = []
    for index in torch.arange(len(table)).split(_BATCH):
        # (piece, transitions) distances, those of the same group out of reach
        distance = torch.cdist(motion[index], motion)
        pieces.append(distance.masked_fill(group[index, None] == group[None], torch.inf).argmin(dim=1))
    return torch.cat(pieces)


@torch.no_grad()
def latent_actions(
    lat: LatentActionTokenizer, table: TransitionTable, grid: Grid | None = None
) -> Float[Tensor, "transitions action"]:
    """l_t of every transition of a table."""
    pieces = [
        lat.encode(torch.stack(table.pairs(index), dim=1), grid)[:, 0]
        for index in torch.arange(len(table)).split(_BATCH)
    ]
    return torch.cat(pieces)


@torch.no_grad()
def read_again(
    lat: LatentActionTokenizer,
    z: Float[Tensor, "b tokens d"],
    l: Float[Tensor, "b action"],
    grid: Grid | None = None,
) -> Float[Tensor, "b action"]:
    """q(z, f(z, l)): the latent action that the IDM reads from the transition that l makes in a frame z.

    It equals l where z is the frame that l was read from and the LAT is exact; on a frame of another clip, only if l
    means the same there.
    """
    return lat.encode(torch.stack([z, lat.decode(z, l, grid)], dim=1), grid)[:, 0]


@torch.no_grad()
def composed(
    lat: LatentActionTokenizer,
    a: Float[Tensor, "b tokens d"],
    b: Float[Tensor, "b tokens d"],
    c: Float[Tensor, "b tokens d"],
    grid: Grid | None = None,
) -> Float[Tensor, "3 b action"]:
    """What `composed_by` makes of the LAT's latent actions of triplets of frames."""
    return composed_by(lambda first, last: lat.encode(torch.stack([first, last], dim=1), grid)[:, 0], a, b, c)


def composed_by(read: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, c: Tensor) -> Float[Tensor, "3 b _"]:
    """l(a, c) of triplets, l(a, b) + l(b, c), and the same sum by way of another triplet's b; l is `read`.

    For `composition_error`: the last is the control. It is as low as the second where l is the difference of two
    readings of single frames, which add up by whatever frame. The triplets lie along the first dimension: frames, or
    their numbers.
    """
    other = b.roll(len(b) // 2, dims=0)
    legs = [(a, c), (a, b), (b, c), (a, other), (other, c)]
    whole, *sums = (read(*leg) for leg in legs)
    return torch.stack([whole, sums[0] + sums[1], sums[2] + sums[3]])


def reading_r2(read: Float[Tensor, "b action"], given: Float[Tensor, "b action"]) -> float:
    """1 - |read - given|^2 / variance of given, mean over the dimensions that vary.

    1 means read back exactly, 0 no better than the mean of all latent actions; 0, too, where no dimension varies.
    """
    variance = given.var(dim=0, correction=0)
    varies = variance > 1e-9 * variance.max()
    if not varies.any():
        return 0.0
    error = (read - given).square().mean(dim=0)
    return 1 - float((error[varies] / variance[varies]).mean())


@torch.no_grad()
def cycle_loss(
    lat: LatentActionTokenizer,
    z_t: Float[Tensor, "b tokens d"],
    forward_action: Float[Tensor, "b action"],
    backward_action: Float[Tensor, "b action"],
    grid: Grid | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error of z_t after going there and back: f(f(z_t, q(z_t, z_{t+1})), q(z_{t+1}, z_t))."""
    there = lat.decode(z_t, forward_action, grid)
    return (lat.decode(there, backward_action, grid) - z_t).square().mean()


def effective_dimensions(actions: Float[Tensor, "n action"]) -> float:
    """How many directions the latent actions use: (sum of eigenvalues)^2 / sum of squares, of their correlation matrix.

    action_dim if all dimensions vary independently, 1 if all say the same; dimensions that do not vary count nothing.
    """
    centred = actions - actions.mean(dim=0)
    std = centred.std(dim=0, correction=0)
    varying = centred[:, std > 1e-9] / std[std > 1e-9]
    if varying.shape[1] == 0:
        return 0.0
    # of the correlation matrix: columns are centred and in units of their standard deviation
    eigenvalues = torch.linalg.eigvalsh(varying.T.double() @ varying.double() / len(varying)).clamp(min=0)
    return float(eigenvalues.sum().square() / eigenvalues.square().sum())


def _random_donor(group: Int[Tensor, " transitions"], random: torch.Generator) -> Int[Tensor, " transitions"]:
    """For every transition a random one of another group."""
    donor = torch.empty_like(group)
    for value in group.unique():
        # rows of this group, each given a row of any other
        mine, others = (group == value).nonzero()[:, 0], (group != value).nonzero()[:, 0]
        donor[mine] = others[torch.randint(len(others), (len(mine),), generator=random)]
    return donor
