"""Every row of OBJECTIVES, with each of its variants, gets every invariant."""

import itertools
from functools import partial

import pytest
import torch

from aapa_lightning.objectives import OBJECTIVES
from aapa_lightning.objectives.chord import chord_phi
from aapa_lightning.objectives.kl import kl_penalty
from aapa_lightning.objectives.sft import sft_loss
from aapa_lightning.objectives.surrogate import clipped_surrogate, importance_ratio
from aapa_lightning.reduce import StepCounts, aggregate, count_step
from aapa_lightning.types import TokenLossInputs

#: Options beyond the defaults that are worth the whole battery.
VARIANTS = {
    "surrogate": [{"ratio_level": "sequence"}],
    "grpo": [
        {"beta": 0.3, "kl_estimator": "k2"},
        {"beta": 0.3, "kl_estimator": "k2", "kl_ratio": False},
        {"beta": 0.3, "kl_estimator": "k3", "ratio_level": "sequence"},
        {"beta": 0.3, "kl_estimator": "k3", "kl_ratio": False},
        {"entropy_coef": 0.1, "clip_high": 0.28},
    ],
    "chord_sft": [{"weight": "none"}, {"weight": "is"}],
}


def _held_weights(weigh):
    def held(at):
        weights = weigh(at.logprobs).clone()  # gradcheck moves the inputs in place
        return lambda inputs: sft_loss(inputs.logprobs, inputs.response_mask, weights).losses

    return held


def _held_ratio(at):
    ratio = importance_ratio(at, "token")[1].detach()

    def losses(inputs):
        kl = ratio * kl_penalty(inputs.logprobs, inputs.ref_logprobs, "k2")
        return clipped_surrogate(inputs).losses + 0.3 * kl.masked_fill(~inputs.response_mask, 0.0)

    return losses


#: Losses whose stop-gradient parts are held at given inputs, by case: gradcheck differentiates these.
HELD = {
    ("chord_sft", "{}"): _held_weights(chord_phi),
    ("chord_sft", "{'weight': 'is'}"): _held_weights(lambda logprobs: logprobs.detach().exp()),
    ("grpo", "{'beta': 0.3, 'kl_estimator': 'k2'}"): _held_ratio,
}

CASES = [(name, options) for name in OBJECTIVES for options in [{}, *VARIANTS.get(name, [])]]
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value) if isinstance(value, dict) else value)


def random_inputs(dtype=torch.float32, rows=4, width=5):
    g = torch.Generator().manual_seed(7)
    logprobs = -3 * torch.rand(rows, width, generator=g, dtype=dtype)
    lengths = torch.tensor([5, 1, 3, 0])[:rows]
    return TokenLossInputs(
        logprobs=logprobs.requires_grad_(),
        old_logprobs=logprobs.detach() + 0.3 * torch.randn(rows, width, generator=g, dtype=dtype),
        response_mask=torch.arange(width) < lengths[:, None],
        advantages=torch.randn(rows, 1, generator=g, dtype=dtype).expand(rows, width),
        ref_logprobs=logprobs.detach() + 0.5 * torch.randn(rows, width, generator=g, dtype=dtype),
        entropy=torch.rand(rows, width, generator=g, dtype=dtype).requires_grad_(),
    )


def rebuild(inputs, change):
    """Apply a tensor function to every field."""
    fields = ("logprobs", "old_logprobs", "response_mask", "advantages", "ref_logprobs", "entropy")
    return TokenLossInputs(**{name: change(getattr(inputs, name)) for name in fields})


def gradient(objective, inputs):
    logprobs = inputs.logprobs.detach().clone().requires_grad_()
    outputs = objective(TokenLossInputs(logprobs, *(getattr(inputs, f) for f in list(inputs.__slots__)[1:])))
    return outputs.losses.detach(), torch.autograd.grad(outputs.losses.sum(), logprobs)[0]


@every_case
def test_gradient_equals_finite_differences_in_float64(name, options):
    inputs = random_inputs(torch.float64)
    objective = partial(OBJECTIVES[name], **options)
    held = HELD[name, str(options)](inputs) if (name, str(options)) in HELD else lambda fields: objective(fields).losses

    def total(logprobs, entropy):
        fields = TokenLossInputs(logprobs, inputs.old_logprobs, inputs.response_mask, inputs.advantages, inputs.ref_logprobs, entropy)
        return held(fields).sum(-1)

    assert torch.autograd.gradcheck(total, (inputs.logprobs, inputs.entropy))
    direct = torch.autograd.grad(objective(inputs).losses.sum(), inputs.logprobs)[0]
    torch.testing.assert_close(direct, torch.autograd.grad(total(inputs.logprobs, inputs.entropy).sum(), inputs.logprobs)[0])
    assert direct[inputs.response_mask].abs().sum() > 0


@every_case
def test_masking_equals_removal(name, options):
    inputs = random_inputs()
    # A hole in the middle, as assistant-only masks make.
    inputs.response_mask[0, 2] = False
    objective = partial(OBJECTIVES[name], **options)
    losses, grads = gradient(objective, inputs)
    assert not losses[~inputs.response_mask].any()
    assert not grads[~inputs.response_mask].any()
    for row in range(len(losses)):
        keep = inputs.response_mask[row]
        kept_losses, kept_grads = gradient(objective, rebuild(inputs, lambda x, row=row, keep=keep: x[row : row + 1, keep]))
        torch.testing.assert_close(losses[row, keep], kept_losses[0])
        torch.testing.assert_close(grads[row, keep], kept_grads[0])


@every_case
def test_row_order_and_garbage_under_the_mask_change_nothing(name, options):
    inputs = random_inputs()
    objective = partial(OBJECTIVES[name], **options)
    losses, grads = gradient(objective, inputs)
    order = torch.tensor([2, 0, 3, 1])
    off = ~inputs.response_mask
    poisoned = rebuild(inputs, lambda x: (x if x.dtype == torch.bool else x.masked_fill(off, float("nan")))[order])
    other_losses, other_grads = gradient(objective, poisoned)
    assert all(metric.isfinite().all() for metric in objective(poisoned).metrics.values())
    torch.testing.assert_close(losses[order], other_losses, rtol=0, atol=0)
    torch.testing.assert_close(grads[order], other_grads, rtol=0, atol=0)


@every_case
def test_finite_at_extreme_log_probs(name, options):
    values = list(itertools.product([-1e4, 0.0], [-1e4, 0.0], [-1e4, 0.0], [-2.0, 0.0, 2.0]))
    logprobs, old, ref, advantages = torch.tensor(values).T.unsqueeze(-1).unbind()
    entropy = torch.zeros_like(logprobs).requires_grad_()
    inputs = TokenLossInputs(logprobs, old, torch.ones_like(logprobs, dtype=torch.bool), advantages, ref, entropy)
    outputs = OBJECTIVES[name](inputs, **options)
    assert outputs.losses.isfinite().all()
    assert all(metric.isfinite().all() for metric in outputs.metrics.values())
    assert gradient(partial(OBJECTIVES[name], **options), inputs)[1].isfinite().all()


@every_case
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0)])
def test_empty_responses_give_a_zero_with_a_graph(name, options, shape):
    logprobs = torch.randn(shape, requires_grad=True)
    entropy = torch.rand(shape, requires_grad=True)
    mask = torch.zeros(shape, dtype=torch.bool)
    outputs = OBJECTIVES[name](TokenLossInputs(logprobs, logprobs.detach(), mask, torch.ones(shape), logprobs.detach(), entropy), **options)
    assert outputs.losses.shape == shape
    for aggregation in ("grpo", "bnpo", "dapo", "dr_grpo"):
        total = aggregate(outputs.losses, mask, aggregation, StepCounts.from_tensor(count_step(mask)), 4)
        assert total.item() == 0
        assert not torch.autograd.grad(total, logprobs, retain_graph=True)[0].any()


@every_case
def test_types_and_metrics(name, options):
    inputs = random_inputs()
    outputs = OBJECTIVES[name](inputs, **options)
    assert outputs.losses.dtype == torch.float32
    for metric in outputs.metrics.values():
        assert metric.shape == inputs.logprobs.shape
        assert metric.dtype == torch.float32
        assert not metric.requires_grad
