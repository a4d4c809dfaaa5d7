"""Regularly placed blocks of one shape are computed together, each once, forward and backward as if alone."""

from __future__ import annotations

import pytest
import torch
from repwam_core.model import blocked
from repwam_core.model.blocked import Block, BlockPlan, Column, Group, block_plan, blocked_attention
from repwam_core.model.sequence import training_layout
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def one_by_one(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Tensor:
    """Each block by itself, its tokens picked by index."""
    segment = torch.arange(len(plan.sizes)).repeat_interleave(torch.tensor(plan.sizes))
    output = torch.zeros_like(q)
    for block in plan.blocks:
        queries, keys = (
            torch.isin(segment, torch.tensor(part)).nonzero()[:, 0] for part in (block.queries, block.keys)
        )
        values = scaled_dot_product_attention(q[:, :, queries], k[:, :, keys], v[:, :, keys])
        output = output.index_copy(2, queries, values)
    return output


def assert_same(plan: BlockPlan) -> None:
    q, k, v = (torch.randn(2, 3, sum(plan.sizes), 8, requires_grad=True) for _ in range(3))
    weights = torch.randn(q.shape)
    results = []
    for attention in (blocked_attention, one_by_one):
        output = attention(q, k, v, plan)
        results.append([output, *torch.autograd.grad((output * weights).sum(), (q, k, v))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_groups_by_hand() -> None:
    """Segment i sees itself and the one before it: the keys of neighbours overlap."""
    plan = BlockPlan((2,) * 4, (Block((0,), (0,)), *(Block((i,), (i - 1, i)) for i in (1, 2, 3))))
    assert plan.groups == (
        Group((Column(0, 2, 0, 1),), (Column(0, 2, 0, 1),)),
        Group((Column(2, 2, 2, 3),), (Column(0, 4, 2, 3),)),
    )
    assert_same(plan)


def test_irregular_places_are_not_joined() -> None:
    plan = BlockPlan((2, 2, 1, 2, 2), tuple(Block((i,), (i,)) for i in range(5)))
    assert [group.queries[0].count for group in plan.groups] == [2, 1, 2]
    assert_same(plan)


def test_blocks_of_several_runs_and_padding() -> None:
    """Two interleaved kinds of segments; the last segment is of no block."""
    blocks = (Block((0, 2), (0, 2)), Block((1, 3), (1, 3)))
    plan = BlockPlan((3, 3, 2, 2, 4), blocks)
    assert len(plan.groups) == 1
    q = torch.randn(1, 1, 14, 8)
    assert torch.equal(blocked_attention(q, q, q, plan)[:, :, 10:], torch.zeros(1, 1, 4, 8))
    assert_same(plan)


@pytest.mark.parametrize("most", [1, 4, 8, 16_384])
def test_the_bound_changes_no_output(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(blocked, "KEYS_TOGETHER", most)
    plan = BlockPlan((2,) * 5, tuple(Block((i,), (i,)) for i in range(5)))
    assert max(group.queries[0].count for group in plan.groups) == max(1, min(5, most // 2))
    assert_same(plan)


@pytest.mark.parametrize(("coupling", "calls"), [("joint", 3), ("sequential", 6)])
def test_a_document_of_equal_chunks_takes_a_few_calls_whatever_its_length(coupling: str, calls: int) -> None:
    for chunks in (6, 9):
        layout = training_layout(chunks + 1, (1,) * chunks, (1, 2, 2), 2, state=True, action_history=False)
        assert len(block_plan(layout.streams, coupling, 1).groups) <= calls
