"""Noise time against hand values."""

from __future__ import annotations

import pytest
import torch
from repwam_core.model.flow import (
    UniformSNRSampler,
    euler,
    interpolate,
    shift_noise_level,
    time_grid,
    velocity_target,
)


def test_path_and_target_by_hand() -> None:
    """Eq. 6 at noise (2, -4), data (10, 4): a quarter of the way is (4, -2), the velocity (8, 8)."""
    noise, data = torch.tensor([[2.0, -4.0]]), torch.tensor([[10.0, 4.0]])
    t = torch.tensor([0.25])
    assert interpolate(noise, data, t).tolist() == [[4.0, -2.0]]
    assert velocity_target(noise, data).tolist() == [[8.0, 8.0]]
    assert interpolate(noise, data, torch.tensor([0.0])).tolist() == noise.tolist()
    assert interpolate(noise, data, torch.tensor([1.0])).tolist() == data.tolist()


def test_each_leading_index_has_its_own_time() -> None:
    noise, data = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    t = torch.tensor([[0.0, 0.5, 1.0], [0.1, 0.2, 0.3]])
    assert torch.equal(interpolate(noise, data, t), t[..., None].expand(2, 3, 4))


def test_shift_by_hand() -> None:
    """s = 5: u = 0.5 becomes 2.5 / 3; the ends stay, s = 1 is the identity."""
    levels = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(shift_noise_level(levels, 5.0), torch.tensor([0.0, 2.5 / 3, 1.0]))
    torch.testing.assert_close(shift_noise_level(levels, 1.0), levels)


@pytest.mark.parametrize("shift", [0.5, 1.0, 5.0])
def test_sampler_draws_the_shifted_uniform(shift: float) -> None:
    """P(t <= x) = P(noise level >= 1 - x), at the quantiles of the uniform draw."""
    t = UniformSNRSampler(shift)((200_000,), torch.Generator().manual_seed(0))
    assert t.min() >= 0
    assert t.max() <= 1
    for u in (0.1, 0.5, 0.9):
        threshold = 1 - shift * u / (1 + (shift - 1) * u)
        assert (t <= threshold).float().mean().item() == pytest.approx(1 - u, abs=0.005)


def test_sampler_depends_on_the_generator_only() -> None:
    first, second = (UniformSNRSampler(5.0)((3, 4), torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == (3, 4)
    assert torch.equal(first, second)


def test_time_grid_runs_from_noise_to_data() -> None:
    torch.testing.assert_close(time_grid(4), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    grid = time_grid(5, shift=5.0)
    assert grid[0] == 0
    assert grid[-1] == 1
    assert (grid.diff() > 0).all()
    assert (grid[1:-1] < time_grid(5)[1:-1]).all(), "a shift above 1 dwells near noise"


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_exact_on_a_straight_path(shift: float) -> None:
    noise, data = torch.randn(2, 3), torch.randn(2, 3)
    result = euler(lambda x, t: velocity_target(noise, data), noise, time_grid(3, shift).tolist())
    torch.testing.assert_close(result, data)


def test_euler_by_hand() -> None:
    """dx/dt = x + t from 1 in two steps: 1 + 0.5 * 1 = 1.5, then 1.5 + 0.5 * (1.5 + 0.5) = 2.5."""
    assert euler(lambda x, t: x + t, torch.tensor([1.0]), time_grid(2).tolist()).item() == 2.5


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        UniformSNRSampler(0.0)
    with pytest.raises(ValueError, match="at least 1"):
        time_grid(0)
    with pytest.raises(ValueError, match="positive"):
        time_grid(3, shift=-1.0)
