"""Where the tokens of a latent frame lie: the grid of views, rows and columns."""

import math

import torch
from einops import rearrange
from jaxtyping import Float, Int
from repvitok.runtime.errors import UserError
from torch import Tensor

Grid = tuple[int, int, int]


def resolve_grid(tokens: int, grid: Grid | None) -> Grid:
    """The grid of a frame with `tokens` tokens; None means one square view.

    Args:
        tokens: tokens per latent frame, L.
        grid: (views, rows, columns), or None.

    Raises:
        ValueError: the grid does not hold `tokens` tokens, or `tokens` is no square and no grid is given.
    """
    if grid is None:
        side = math.isqrt(tokens)
        if tokens < 1 or side * side != tokens:
            raise UserError(
                f"{tokens} tokens per frame are no square view: pass grid=(views, rows, columns), for "
                "example the `grid` of the latent shards' meta."
            )
        return (1, side, side)
    views, rows, columns = grid
    if min(views, rows, columns) < 1 or views * rows * columns != tokens:
        raise UserError(
            f"grid (views, rows, columns) = {tuple(grid)} holds {views * rows * columns} tokens, but the "
            f"latents have {tokens} per frame. Pass the grid the latents were encoded with."
        )
    return (views, rows, columns)


def token_coordinates(grid: Grid, device: torch.device | None = None) -> Float[Tensor, "tokens 2"]:
    """Row and column of each token in token units, relative to the centre of its view; camera-major order."""
    views, rows, columns = grid
    row = torch.arange(rows, dtype=torch.float32, device=device) - (rows - 1) / 2
    column = torch.arange(columns, dtype=torch.float32, device=device) - (columns - 1) / 2
    plane = torch.stack(torch.meshgrid(row, column, indexing="ij"), dim=-1)
    return rearrange(plane.expand(views, rows, columns, 2), "v h w two -> (v h w) two")


def token_views(grid: Grid, device: torch.device | None = None) -> Int[Tensor, " tokens"]:
    """Index of the view each token belongs to."""
    views, rows, columns = grid
    return torch.arange(views, device=device).repeat_interleave(rows * columns)


def position_features(
    grid: Grid, frequencies: int, device: torch.device | None = None
) -> Float[Tensor, "tokens features"]:
    """Sinusoidal features of a token's place in its view, of size `position_feature_size(frequencies)`.

    The place is taken as a fraction of the view in (-1, 1), so one model serves several resolutions:
    y, x, and sin/cos(pi 2^(k-1) y), sin/cos(pi 2^(k-1) x) for k = 0 .. frequencies - 1.
    """
    _, rows, columns = grid
    place = token_coordinates(grid, device) * torch.tensor([2 / rows, 2 / columns], device=device)
    octaves = math.pi * 2.0 ** (torch.arange(frequencies, dtype=torch.float32, device=device) - 1)
    angles = rearrange(place[:, :, None] * octaves, "tokens two k -> tokens (two k)")
    return torch.cat([place, angles.sin(), angles.cos()], dim=-1)


def position_feature_size(frequencies: int) -> int:
    """Number of features `position_features` returns."""
    return 2 + 4 * frequencies
