"""Aggregation: hand-computed values, and what must not change the step's loss or gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aapa_lightning.errors import ConfigError
from aapa_lightning.reduce import AGGREGATIONS, StepCounts, aggregate, count_step, masked_mean, masked_sum

GLOBAL = [name for name in AGGREGATIONS if name != "bnpo"]
MAX_TOKENS = 8


@st.composite
def batches(draw):
    """Losses and a ragged mask, some rows empty (truncated)."""
    lengths = draw(st.lists(st.integers(0, MAX_TOKENS), min_size=1, max_size=7))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    mask = torch.arange(MAX_TOKENS) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), MAX_TOKENS, generator=g, dtype=torch.float64), mask


def step_loss(losses, mask, aggregation, pieces, divisor=1.0):
    """The loss of a step cut into pieces, each divided afterwards as a trainer does."""
    counts = StepCounts.from_tensor(sum(count_step(mask[rows]) for rows in pieces))
    return sum(aggregate(losses[rows], mask[rows], aggregation, counts, MAX_TOKENS, scale=divisor) / divisor for rows in pieces)


@pytest.mark.parametrize("aggregation", GLOBAL)
@settings(max_examples=40, deadline=None)
@given(batch=batches(), data=st.data())
def test_the_step_does_not_change_with_split_order_or_padding(aggregation, batch, data):
    losses, mask = batch
    rows = torch.arange(len(losses))
    whole = step_loss(losses, mask, aggregation, [rows])
    order = torch.tensor(data.draw(st.permutations(range(len(losses)))))
    cut = data.draw(st.integers(0, len(losses)))
    torch.testing.assert_close(step_loss(losses, mask, aggregation, [order[:cut], order[cut:]], divisor=6.0), whole)
    padded = torch.nn.functional.pad(losses, (0, 3), value=float("nan"))
    torch.testing.assert_close(step_loss(padded, torch.nn.functional.pad(mask, (0, 3)), aggregation, [rows]), whole)
    present = mask.any(-1)
    torch.testing.assert_close(step_loss(losses, mask, aggregation, [rows[present]]), whole)


@settings(max_examples=40, deadline=None)
@given(batch=batches())
def test_against_loops(batch):
    losses, mask = batch
    rows = [[v.item() for v, m in zip(r, k, strict=True) if m] for r, k in zip(losses, mask, strict=True)]
    rows = [r for r in rows if r]
    tokens = sum(map(len, rows)) or 1
    total, n = sum(map(sum, rows)), len(rows) or 1
    expected = {
        "grpo": sum(sum(r) / len(r) for r in rows) / n,
        "dapo": total / tokens,
        "bnpo": total / tokens,
        "dr_grpo": total / (n * MAX_TOKENS),
    }
    counts = StepCounts.from_tensor(count_step(mask))
    for name, value in expected.items():
        assert aggregate(losses, mask, name, counts, MAX_TOKENS).item() == pytest.approx(value, abs=1e-12)


def test_bnpo_is_local_whatever_the_counts_and_scale():
    losses, mask = torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]])
    assert aggregate(losses, mask, "bnpo", StepCounts(100, 100), scale=8.0).item() == 1.5


@pytest.mark.parametrize("aggregation", list(AGGREGATIONS))
def test_all_masked_is_a_zero_with_a_graph(aggregation):
    losses = torch.full((2, 3), float("nan"), requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    total = aggregate(losses, mask, aggregation, StepCounts(0, 0), 3)
    total.backward()
    assert total.item() == 0
    assert torch.equal(losses.grad, torch.zeros(2, 3))


def test_counts():
    mask = torch.tensor([[True, True], [False, False], [False, True]])
    assert StepCounts.from_tensor(count_step(mask) + count_step(mask[:1])) == StepCounts(tokens=5.0, responses=3.0)
    assert count_step(torch.zeros(0, 4, dtype=torch.bool)).tolist() == [0, 0]


def test_sums_run_in_float32():
    values, mask = torch.ones(1, 4096, dtype=torch.bfloat16), torch.ones(1, 4096, dtype=torch.bool)
    assert masked_sum(values, mask).dtype == torch.float32
    assert masked_sum(values, mask).item() == 4096
    assert masked_mean(values, mask, dim=-1).tolist() == [1.0]


def test_refusals():
    losses, mask = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ConfigError, match="aggregation: expected one of grpo, bnpo, dapo, dr_grpo; found 'mean'"):
        aggregate(losses, mask, "mean", StepCounts(1, 1))
    with pytest.raises(ConfigError, match="max_response_tokens >= 1"):
        aggregate(losses, mask, "dr_grpo", StepCounts(1, 1))
