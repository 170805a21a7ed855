"""Weights for the difference between trainer and engine: values by hand and by loops, TRL's own code, gradients, extremes."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from aapa_lightning.errors import ConfigError
from aapa_lightning.objectives.correction import CorrectionOptions, correction_weights
from aapa_lightning.objectives.grpo import grpo_loss
from aapa_lightning.objectives.surrogate import clipped_surrogate
from aapa_lightning.types import TokenLossInputs

MODES = ("truncate", "mask")
LEVELS = [("token", "product"), ("sequence", "product"), ("sequence", "mean")]
EMPTY = torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool)


def batch(seed=0, rows=6, width=7, spread=0.6, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, width, generator=g, dtype=dtype)
    lengths = torch.tensor([width, 1, 3, 0, 5, 2])[:rows]
    return old, old + spread * torch.randn(rows, width, generator=g, dtype=dtype), torch.arange(width) < lengths[:, None]


def by_loops(old, engine, mask, options):
    """The definition, one number at a time."""
    weights = torch.zeros(mask.shape, dtype=torch.float64)
    for i in range(mask.shape[0]):
        logs = [float(old[i, t] - engine[i, t]) for t in range(mask.shape[1]) if mask[i, t]]
        total, mean = sum(logs), sum(logs) / max(len(logs), 1)
        whole = total if options.sequence == "product" else mean
        for t in range(len(logs)):
            ratio = math.exp(min(max(logs[t] if options.level == "token" else whole, -20), 20))
            inside = options.low <= ratio <= options.high
            weights[i, t] = ratio if inside else 0.0 if options.mode == "mask" else min(max(ratio, options.low), options.high)
            if not options.reject_low <= math.exp(min(max(mean, -20), 20)) <= options.reject_high:
                weights[i, t] = 0.0
    return weights


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("level", "sequence"), LEVELS)
@pytest.mark.parametrize("bounds", [(0.0, 2.0, 0.0, math.inf), (0.7, 1.3, 0.0, math.inf), (0.5, math.inf, 0.8, 1.2)])
def test_weights_equal_float64_loops(mode, level, sequence, bounds):
    options = CorrectionOptions(mode, level, sequence, *bounds)
    changed = 0
    for seed in range(3):
        old, engine, mask = batch(seed, dtype=torch.float64)
        weights, metrics = correction_weights(old, engine, mask, options)
        expected = by_loops(old, engine, mask, options)
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)
        free = by_loops(old, engine, mask, replace(options, mode="truncate", low=0.0, high=math.inf, reject_low=0.0, reject_high=math.inf))
        assert torch.equal(metrics["engine_outside"].bool() & mask, (expected - free).abs() > 1e-12)
        changed += int(metrics["engine_outside"][mask].sum())
        single, _ = correction_weights(old.float(), engine.float(), mask, options)
        assert single.dtype == torch.float32
        near = ~torch.isclose(free, torch.tensor(options.high, dtype=free.dtype), rtol=1e-4)
        torch.testing.assert_close(single[near].double(), expected[near], rtol=1e-4, atol=0)
    assert changed > 0


def test_values_by_hand():
    old = torch.tensor([[0.6, 0.5, 0.9], [0.2, 0.9, 0.9]]).log()
    engine = torch.tensor([[0.2, 0.5, 0.1], [0.8, 0.9, 0.9]]).log()
    mask = torch.tensor([[True, True, False], [True, True, False]])  # ratios 3, 1, (9); 1/4, 1, (1)

    def weights(mode, level="token", sequence="product", **bounds):
        return correction_weights(old, engine, mask, CorrectionOptions(mode, level, sequence, **bounds))[0]

    close = torch.testing.assert_close
    close(weights("truncate", high=2.0), torch.tensor([[2.0, 1.0, 0.0], [0.25, 1.0, 0.0]]))
    close(weights("truncate", low=0.5, high=2.0), torch.tensor([[2.0, 1.0, 0.0], [0.5, 1.0, 0.0]]))
    close(weights("mask", low=0.5, high=2.0), torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]))
    close(weights("truncate", "sequence", high=5.0), torch.tensor([[3.0, 3.0, 0.0], [0.25, 0.25, 0.0]]))
    close(weights("mask", "sequence", high=2.0), torch.tensor([[0.0, 0.0, 0.0], [0.25, 0.25, 0.0]]))
    close(weights("truncate", "sequence", "mean", high=5.0), torch.tensor([[3**0.5] * 2 + [0.0], [0.5, 0.5, 0.0]]))
    close(weights("truncate", low=1.0, high=1.0, reject_high=1.5), torch.tensor([[0.0] * 3, [1.0, 1.0, 0.0]]))  # rejection alone
    _, metrics = correction_weights(old, engine, mask, CorrectionOptions("mask", low=0.5))
    assert (
        metrics["engine_outside"].tolist() == [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
        or metrics["engine_outside"][:, :2].tolist() == [[1, 0]] * 2
    )
    close(metrics["engine_kl"], torch.tensor([[2 - math.log(3), 0, 0], [0.25 - 1 + math.log(4), 0, 0]]))


def trl_weights(old, engine, mask, mode, low, high):
    """TRL's own statements, taken from its trainer's source and run."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is the oracle; it comes with the extra `test`")
    source = textwrap.dedent(inspect.getsource(trainer.GRPOTrainer._generate_and_score_completions))
    (block,) = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If)
        and isinstance(node.body[0], ast.Assign)
        and len(node.body) > 4
        and any(ast.unparse(part).startswith("vllm_importance_sampling_ratio = torch.exp") for part in node.body)
    ]
    options = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_min": low, "vllm_importance_sampling_clip_max": high}
    names = {
        "torch": torch,
        "math": math,
        "self": SimpleNamespace(use_vllm=True, vllm_importance_sampling_correction=True, **options),
        "old_per_token_logps": old,
        "sampling_per_token_logps": engine,
        "completion_mask": mask.long(),
        "tool_mask": None,
    }
    exec(compile(ast.Module([block], []), "trl", "exec"), names)  # noqa: S102  # TRL's, as installed
    return names["vllm_importance_sampling_ratio"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("low", "high"), [(None, 3.0), (0.5, 1.5), (0.8, None)])
def test_weights_equal_those_of_trl(mode, level, low, high):
    options = CorrectionOptions(mode, level, low=low or 0.0, high=high or math.inf)
    for seed in range(4):
        old, engine, mask = batch(seed)
        old[0, 0] = math.nan  # neither may be scored
        theirs = trl_weights(old, engine, mask, f"{level}_{mode}", low, high).expand_as(old)
        ours, _ = correction_weights(old, engine, mask, options)
        torch.testing.assert_close(ours, theirs.masked_fill(~mask, 0.0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_weighted_loss_equals_that_of_trl(level):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is the oracle; it comes with the extra `test`")
    source = inspect.getsource(trainer.GRPOTrainer._compute_loss)
    weighted = 'per_token_loss = per_token_loss * inputs["importance_sampling_ratio"]'
    assert source.index(weighted) < source.index("per_token_loss = per_token_loss + self.beta * per_token_kl")  # the KL is not weighted
    old, engine, mask = batch(1)
    logprobs = (old + 0.1 * torch.randn(old.shape, generator=torch.Generator().manual_seed(3))).requires_grad_()
    advantages = torch.randn(len(old), 1, generator=torch.Generator().manual_seed(4)).expand_as(old)
    inputs = TokenLossInputs(logprobs, old, mask, advantages, ref_logprobs=engine)
    plain = grpo_loss(inputs, beta=0.0).losses
    kl = grpo_loss(inputs, beta=0.3).losses - plain
    weights, _ = correction_weights(old, engine, mask, CorrectionOptions("truncate", level, high=1.5))
    theirs = trl_weights(old, engine, mask, f"{level}_truncate", None, 1.5)
    ours = grpo_loss(replace(inputs, weights=weights), beta=0.3).losses
    expected = (plain * theirs + kl).masked_fill(~mask, 0.0)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(ours.sum(), logprobs, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logprobs)[0], rtol=1e-5, atol=1e-6)


def test_weights_carry_no_gradient_and_scale_that_of_the_surrogate():
    old, engine, mask = batch(2)
    old.requires_grad_()
    weights, metrics = correction_weights(old, engine, mask, CorrectionOptions("truncate", high=3.0))
    assert not any(value.requires_grad for value in (weights, *metrics.values()))
    logprobs = old.detach().clone().requires_grad_()
    inputs = TokenLossInputs(logprobs, old.detach(), mask, torch.ones_like(old))
    (plain,) = torch.autograd.grad(clipped_surrogate(inputs).losses.sum(), logprobs)
    weighted = clipped_surrogate(replace(inputs, weights=weights, weight_metrics=metrics))
    torch.testing.assert_close(torch.autograd.grad(weighted.losses.sum(), logprobs)[0], plain * weights)
    assert set(metrics) < set(weighted.metrics)


def test_none_gives_no_weights_and_leaves_losses_bit_for_bit():
    old, engine, mask = batch(3)
    assert correction_weights(old, engine, mask, CorrectionOptions()) == (None, {})
    inputs = TokenLossInputs(old, old - 0.1, mask, torch.randn(old.shape))
    ones = replace(inputs, weights=torch.ones_like(old))
    assert torch.equal(clipped_surrogate(inputs).losses, clipped_surrogate(ones).losses)
    assert set(clipped_surrogate(inputs).metrics) == {"ratio", "clip_fraction", "log_ratio_clamped"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("level", "sequence"), LEVELS)
def test_equal_policies_weigh_one(mode, level, sequence):
    old, _, mask = batch()
    weights, metrics = correction_weights(
        old, old.clone(), mask, CorrectionOptions(mode, level, sequence, reject_low=0.999, reject_high=1.001)
    )
    assert torch.equal(weights, mask.float())
    assert not metrics["engine_outside"].any()
    assert not metrics["engine_kl"].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("level", "sequence"), LEVELS)
@pytest.mark.parametrize("engine", [-1e4, -math.inf, 0.0, math.nan])
@pytest.mark.parametrize("old", [-1e4, -math.inf, 0.0])
def test_extremes_stay_finite(mode, level, sequence, engine, old):
    mask = torch.tensor([[True, True, False], [False] * 3])
    olds, engines = torch.full((2, 3), old), torch.full((2, 3), engine)
    olds[0, 1], engines[0, 1] = engines[0, 1].nan_to_num(nan=-1.0), olds[0, 1]  # an opposite beside it
    olds[0, 2], engines[0, 2] = math.nan, math.inf  # padding
    weights, metrics = correction_weights(olds, engines, mask, CorrectionOptions(mode, level, sequence, high=math.inf))
    assert torch.isfinite(weights).all()
    assert all(torch.isfinite(value).all() for value in metrics.values())
    assert not weights[~mask].any()
    assert weights.max() <= math.exp(20) * 1.001
    losses = clipped_surrogate(TokenLossInputs(torch.zeros(2, 3), torch.zeros(2, 3), mask, torch.ones(2, 3), weights=weights)).losses
    assert torch.isfinite(losses).all()


def test_garbage_under_the_mask_does_not_reach_the_gradient():
    logprobs = torch.zeros(1, 2, requires_grad=True)
    weights = torch.tensor([[1.0, math.nan]])
    mask = torch.tensor([[True, False]])
    inputs = TokenLossInputs(logprobs, torch.zeros(1, 2), mask, torch.ones(1, 2), weights=weights)
    (gradient,) = torch.autograd.grad(clipped_surrogate(inputs).losses.sum(), logprobs)
    assert gradient.tolist() == [[-1.0, 0.0]]


def test_an_empty_response_weighs_nothing():
    for level, sequence in LEVELS:
        weights, metrics = correction_weights(*EMPTY, CorrectionOptions("mask", level, sequence))
        assert weights.tolist() == [[0.0, 0.0]]
        assert metrics["engine_outside"].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mode": "clip"}, "correction.mode: expected one of none, truncate, mask"),
        ({"level": "word"}, "correction.level"),
        ({"sequence": "sum"}, "correction.sequence"),
        ({"low": -0.1}, r"correction\.low: expected a number in \[0, 1\], found -0\.1"),
        ({"low": 1.1}, r"correction\.low: expected a number in \[0, 1\]"),
        ({"high": 0.9}, r"correction\.high: expected a finite number, at least 1, found 0\.9"),
        ({"high": math.nan}, r"correction\.high: expected a finite number, at least 1, found nan"),
        ({"mode": "mask", "reject_low": 1.5}, r"correction\.reject_low: expected a number in \[0, 1\]"),
        ({"reject_high": 1.01}, r"correction\.reject_high=1\.01 does nothing with mode none"),
        ({"level": "sequence"}, r"correction\.level='sequence' does nothing with mode none"),
        ({"mode": "mask", "sequence": "mean"}, r"correction\.sequence='mean' does nothing with level token"),
    ],
)
def test_options_outside_their_range_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        CorrectionOptions(**options)
