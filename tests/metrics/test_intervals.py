"""Intervals hold the truth as often as they say: simulated, also with few prompts and near-perfect judges."""

from __future__ import annotations

import math

import pytest
import torch

from aapa_lightning.metrics.functional.discrimination import Judged, discrimination
from aapa_lightning.metrics.functional.instruction_accuracy import bootstrap_intervals, verdict_counts
from aapa_lightning.metrics.functional.intervals import share_intervals, t_quantile


def phi(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


def judged(prompts, separation, generator):
    """An expert's response and two others to each prompt; their logits share a little of the prompt."""
    labels, groups = torch.tensor([True, False, False]).repeat(prompts), torch.arange(prompts).repeat_interleave(3)
    logits = torch.randn(3 * prompts, generator=generator) + separation * labels + 0.3 * torch.randn(prompts, generator=generator)[groups]
    return Judged(logits, torch.arange(3 * prompts), labels, groups, torch.ones(3 * prompts))


@pytest.mark.parametrize(("prompts", "separation"), [(10, 0.5), (10, 1.5), (10, 3.5), (36, 1.5), (36, 3.5)])
def test_figures_of_a_discriminator_are_covered(prompts, separation):
    generator, trials = torch.Generator().manual_seed(prompts), 100
    own, other = phi(separation / math.sqrt(2)), phi(separation / math.sqrt(2 * 1.09))
    truth = {"paired_accuracy": own, "response_auroc": own / prompts + other * (1 - 1 / prompts)}
    held = dict.fromkeys(truth, 0)
    for trial in range(trials):
        found = discrimination(judged(prompts, separation, generator), resamples=60, seed=trial)
        for name, value in truth.items():
            held[name] += found[f"{name}_low"] <= value <= found[f"{name}_high"]
            assert found[f"{name}_low"] < found[f"{name}_high"]
    # 95 of 100 have a standard deviation of 2.2
    assert all(count >= 0.90 * trials for count in held.values()), held


@pytest.mark.parametrize("prompts", [10, 20, 100])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_shares_are_covered(prompts, share):
    generator, trials = torch.Generator().manual_seed(0), 150
    held = 0
    for trial in range(trials):
        followed = (torch.rand(prompts, generator=generator) < share).tolist()
        counts = torch.tensor([verdict_counts([value], [value]) for value in followed])
        low, high = bootstrap_intervals(counts, resamples=40, seed=trial)[:, 0].tolist()
        held += low <= share <= high
    assert held >= 0.91 * trials


def test_responses_that_stay_together_count_once_and_independent_ones_more():
    generator = torch.Generator().manual_seed(1)
    follows = torch.rand(60, 1, generator=generator) < 0.5
    widths = []
    for verdicts in (follows.expand(60, 8), torch.rand(60, 8, generator=generator) < 0.5):
        counts = torch.tensor([[8, *[int(row.sum())] * 2, 8, *[int(row.sum())] * 2] for row in verdicts])
        low, high = bootstrap_intervals(counts, resamples=400)[:, 0].tolist()
        widths.append(high - low)
    # 1.96 sqrt(p (1 - p) / m) each way, with m = 60 and 480
    assert widths[0] == pytest.approx(2 * 2.0 * 0.5 / math.sqrt(60), rel=0.1)
    assert widths[1] == pytest.approx(2 * 2.0 * 0.5 / math.sqrt(480), rel=0.2)


def test_wilson_by_hand():
    # without a resample that differs every prompt is a yes or a no: Wilson's interval at t instead of 1.96
    for prompts, t in ((10, 2.262157), (36, 2.030108)):
        low, high = share_intervals(torch.tensor([1.0]), torch.ones(50, 1), prompts).flatten().tolist()
        assert (low, high) == (pytest.approx(prompts / (prompts + t * t), rel=1e-3), 1)
        low, high = share_intervals(torch.tensor([0.0]), torch.zeros(50, 1), prompts).flatten().tolist()
        assert (low, high) == (0, pytest.approx(t * t / (prompts + t * t), rel=1e-3))
    assert share_intervals(torch.tensor([0.5, 1.0]), torch.ones(50, 2), 2).tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(("freedom", "expected"), [(2, 4.3027), (3, 3.1824), (5, 2.5706), (9, 2.2622), (35, 2.0301), (1000, 1.9623)])
def test_quantiles_of_students_t(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, rel=0.01)


def test_agrees_with_scipy_where_there_is_much():
    stats = pytest.importorskip("scipy.stats")
    values = torch.rand(400, generator=torch.Generator().manual_seed(2), dtype=torch.float64).square()
    draws = torch.randint(400, (2000, 400), generator=torch.Generator().manual_seed(3))
    found = share_intervals(values.mean()[None], values[draws].mean(1)[:, None], 400).flatten().tolist()
    expected = stats.bootstrap((values.numpy(),), lambda x, axis: x.mean(axis), n_resamples=2000, method="BCa", rng=0).confidence_interval
    assert found == pytest.approx([expected.low, expected.high], abs=0.004)
