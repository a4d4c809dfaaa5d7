"""Blocks of one shape are computed together, each once, and never more keys at a time than the bound."""

from __future__ import annotations

import pytest
import torch
from repwam_core.model import blocked
from repwam_core.model.blocked import Block, BlockPlan, blocked_attention
from torch.nn.functional import scaled_dot_product_attention

PLAN = BlockPlan((3, 2, 3, 2), (Block((0,), (0,)), Block((1, 2), (0, 1)), Block((3,), (2, 3))))


def test_groups_hold_every_block_once_and_one_shape_each() -> None:
    same = BlockPlan((2, 2, 2), (Block((0,), (0,)), Block((1,), (0, 1)), Block((2,), (1, 2))))
    assert same.groups == ((same.blocks[0],), (same.blocks[1], same.blocks[2]))
    assert sorted(block.queries for group in PLAN.groups for block in group) == [(0,), (1, 2), (3,)]


@pytest.mark.parametrize("most", [1, 4, 8, 16_384])
def test_the_bound_changes_no_output(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(blocked, "KEYS_TOGETHER", most)
    plan = BlockPlan((2,) * 5, tuple(Block((i,), (i,)) for i in range(5)))
    assert max(len(group) for group in plan.groups) == max(1, min(5, most // 2))
    q, k, v = (torch.randn(2, 3, 10, 8) for _ in range(3))
    output = blocked_attention(q, k, v, plan)
    for i in range(5):
        part = slice(2 * i, 2 * i + 2)
        expected = scaled_dot_product_attention(q[:, :, part], k[:, :, part], v[:, :, part])
        torch.testing.assert_close(output[:, :, part], expected)
