"""Hand-computed values of the surrogate, KL estimators and GRPO, and what they refuse."""

import math

import pytest
import torch

from aapa_lightning.errors import ConfigError
from aapa_lightning.objectives.grpo import grpo_loss
from aapa_lightning.objectives.kl import kl_penalty
from aapa_lightning.objectives.surrogate import clipped_surrogate
from aapa_lightning.types import TokenLossInputs


def surrogate_inputs(log_ratios, advantages, mask=None):
    ratios = torch.tensor([log_ratios], dtype=torch.float32)
    mask = torch.ones_like(ratios, dtype=torch.bool) if mask is None else torch.tensor([mask])
    return TokenLossInputs(ratios - 1.0, torch.full_like(ratios, -1.0), mask, torch.tensor([advantages], dtype=torch.float32))


def test_token_ratios_are_clipped_on_the_side_that_the_advantage_pushes():
    logs = [math.log(r) for r in (1.5, 1.5, 0.5, 0.5, 1.0)]
    inputs = surrogate_inputs(logs, [2.0, -2.0, 2.0, -2.0, 3.0])
    inputs.logprobs.requires_grad_()
    outputs = clipped_surrogate(inputs, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(outputs.losses, torch.tensor([[-2.6, 3.0, -1.0, 1.6, -3.0]]))
    assert outputs.metrics["clip_fraction"].tolist() == [[1, 0, 0, 1, 0]]
    outputs.losses.sum().backward()
    torch.testing.assert_close(inputs.logprobs.grad, torch.tensor([[0.0, 3.0, -1.0, 0.0, -3.0]]))


def test_sequence_ratio_is_the_geometric_mean_of_the_unmasked_tokens():
    inputs = surrogate_inputs([0.1, 0.2, 9.0], [1.0, 1.0, 1.0], [True, True, False])
    outputs = clipped_surrogate(inputs, ratio_level="sequence")
    ratio = math.exp(0.15)
    torch.testing.assert_close(outputs.losses, torch.tensor([[-ratio, -ratio, 0.0]]))


def test_on_policy_ratio_is_one_and_the_gradient_is_the_policy_gradient():
    for level in ("token", "sequence"):
        inputs = surrogate_inputs([0.0, 0.0], [0.7, 0.7])
        inputs.logprobs.requires_grad_()
        outputs = clipped_surrogate(inputs, ratio_level=level)
        outputs.losses.sum().backward()
        assert torch.equal(outputs.metrics["ratio"], torch.ones(1, 2))
        assert not outputs.metrics["clip_fraction"].any()
        torch.testing.assert_close(inputs.logprobs.grad, torch.full((1, 2), -0.7))


def test_clamped_log_ratios_are_counted_and_have_no_gradient():
    inputs = surrogate_inputs([21.0, -21.0, 19.0], [-1.0, 1.0, -1.0])
    inputs.logprobs.requires_grad_()
    outputs = clipped_surrogate(inputs)
    assert outputs.metrics["log_ratio_clamped"].tolist() == [[1, 1, 0]]
    torch.testing.assert_close(outputs.losses, torch.tensor([[math.exp(20.0), -math.exp(-20.0), math.exp(19.0)]]))
    outputs.losses.sum().backward()
    assert inputs.logprobs.grad[0, :2].tolist() == [0, 0]
    assert inputs.logprobs.grad[0, 2] > 1e8


def test_kl_values_by_hand():
    logprobs, ref = torch.tensor([0.5, 0.2]).log(), torch.tensor([0.25, 0.4]).log()
    log2 = math.log(2.0)
    torch.testing.assert_close(kl_penalty(logprobs, ref, "k1"), torch.tensor([log2, -log2]))
    torch.testing.assert_close(kl_penalty(logprobs, ref, "k2"), torch.full((2,), log2**2 / 2))
    torch.testing.assert_close(kl_penalty(logprobs, ref, "k3"), torch.tensor([0.5 + log2 - 1, 2 - log2 - 1]))


def test_expected_gradients_of_the_estimators_over_a_toy_vocabulary():
    theta = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-0.2, 0.5, 0.1], dtype=torch.float64).log_softmax(0)
    logprobs = theta.log_softmax(0)

    def grad(value):
        return torch.autograd.grad(value, theta, retain_graph=True)[0]

    def expected(estimator):
        return grad((logprobs.detach().exp() * kl_penalty(logprobs, ref, estimator)).sum())

    reverse = grad((logprobs.exp() * (logprobs - ref)).sum())
    forward = grad((ref.exp() * (ref - logprobs)).sum())
    torch.testing.assert_close(expected("k1"), torch.zeros_like(theta))
    torch.testing.assert_close(expected("k2"), reverse)
    torch.testing.assert_close(expected("k3"), forward)
    for estimator in ("k1", "k3"):
        value = (logprobs.exp() * kl_penalty(logprobs, ref, estimator)).sum()
        torch.testing.assert_close(value, (logprobs.exp() * (logprobs - ref)).sum())


def _expected_gradient(estimator, drift, **options):
    """Gradients over all responses of two tokens, in float64: of the loss expected under the old policy, KL(pi || ref), KL(ref || pi)."""
    g = torch.Generator().manual_seed(3)
    theta, noise, ref = torch.randn(3, 4, 3, dtype=torch.float64, generator=g).unbind()  # a state at the start, one after each token
    theta.requires_grad_()
    old, ref = (theta.detach() + drift * noise).log_softmax(-1), ref.log_softmax(-1)
    pi = theta.log_softmax(-1)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    states = torch.stack([torch.zeros(9, dtype=torch.int64), 1 + pairs[:, 0]], 1)
    rows = [table[states, pairs] for table in (pi, old, ref)]
    inputs = TokenLossInputs(rows[0], rows[1], torch.ones(9, 2, dtype=torch.bool), torch.zeros(9, 2, dtype=torch.float64), rows[2])
    chance = rows[1].sum(-1).exp()
    losses = grpo_loss(inputs, beta=0.7, kl_estimator=estimator, **options).losses
    visits = torch.cat([torch.ones(1, dtype=torch.float64), old[0].exp()])  # of the old policy
    kls = [(visits * (p.exp() * (p - q)).sum(-1)).sum() for p, q in ((pi, ref), (ref, pi))]
    return [
        torch.autograd.grad(value, theta, retain_graph=True)[0] for value in ((chance * losses.sum(-1)).sum(), *(0.7 * kl for kl in kls))
    ]


@pytest.mark.parametrize("drift", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_expected_gradient_of_the_kl_is_the_stated_one_off_policy(estimator, drift):
    ours, reverse, _ = _expected_gradient(estimator, drift)
    torch.testing.assert_close(ours, reverse, rtol=1e-10, atol=1e-12)
    plain, reverse, forward = _expected_gradient(estimator, drift, kl_ratio=False)
    stated = {"k2": reverse, "k3": forward}[estimator]
    assert ((plain - stated).norm() / stated.norm() < 1e-10) == (drift == 0.0)


def test_on_policy_the_ratio_changes_no_value_and_no_gradient_of_k2():
    inputs = surrogate_inputs([0.0, 0.0, 0.0], [0.5, -1.0, 0.2], [True, True, False])
    inputs.ref_logprobs = torch.tensor([[-0.3, -2.0, -1.0]])
    inputs.logprobs.requires_grad_()
    for estimator in ("k2", "k3"):
        with_ratio, plain = (grpo_loss(inputs, beta=0.3, kl_estimator=estimator, kl_ratio=on) for on in (True, False))
        assert torch.equal(with_ratio.losses, plain.losses)
        assert all(torch.equal(value, plain.metrics[name]) for name, value in with_ratio.metrics.items())
        grads = [torch.autograd.grad(outputs.losses.sum(), inputs.logprobs)[0] for outputs in (with_ratio, plain)]
        assert torch.equal(*grads) == (estimator == "k2")


def test_k3_still_pulls_a_policy_back_that_is_far_above_its_reference():
    logprobs = torch.tensor([-1.0, -60.0], requires_grad=True)
    kl = kl_penalty(logprobs, torch.tensor([-60.0, -1.0]), "k3")
    kl.sum().backward()
    torch.testing.assert_close(kl[0], torch.tensor(58.0))
    torch.testing.assert_close(logprobs.grad, torch.tensor([1.0, 0.0]))
    ones = torch.ones(1, 2)
    inputs = TokenLossInputs(logprobs[None], logprobs[None].detach(), ones.bool(), ones, torch.tensor([[-60.0, -1.0]]))
    assert grpo_loss(inputs, beta=0.1).metrics["kl_clamped"].tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.1, "kl_estimator": "k1"}, "expected gradient is 0"),
        ({"beta": 0.1}, "ref_logprobs"),
        ({"entropy_coef": 0.1}, "entropies"),
        ({"ratio_level": "word"}, "ratio_level: expected one of token, sequence; found 'word'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        grpo_loss(surrogate_inputs([0.0], [1.0]), **options)


def test_unknown_estimator():
    with pytest.raises(ConfigError, match="kl_estimator: expected one of k1, k2, k3; found 'k4'"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k4")
