"""CHORD's schedule, weights and gradients, computed by hand; SFT as its weightless case."""

import math

import pytest
import torch

from aapa_lightning.errors import ConfigError
from aapa_lightning.objectives.chord import chord_mu, chord_phi, chord_sft_loss
from aapa_lightning.objectives.sft import sft_loss
from aapa_lightning.reduce import StepCounts, aggregate, count_step

MIX = {"warmup_steps": 200, "decay_steps": 400, "peak": 0.5, "valley": 0.02}


@pytest.mark.parametrize(
    ("step", "mu"),
    [
        (0, 0.0),
        (50, 0.125),
        (199, 0.4975),
        (200, 0.5),
        (300, 0.02 + 0.48 * 0.5 * (1 + math.sqrt(0.5))),
        (400, 0.26),
        (599, 0.02 + 0.48 * 0.5 * (1 + math.cos(math.pi * 399 / 400))),
        (600, 0.02),
        (10**6, 0.02),
    ],
)
def test_mu_warms_up_decays_and_stays(step, mu):
    assert chord_mu(step, **MIX) == pytest.approx(mu, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "steps", "mus"),
    [
        ({"decay_steps": 200, "peak": 0.9, "valley": 0.05}, (0, 100, 200), (0.9, 0.475, 0.05)),  # no warm-up: CHORD-mu
        ({}, (0, 7), (0.1, 0.1)),  # constant: CHORD-phi
        ({"peak": 0.4}, (0, 1, 100), (0.4, 0.4, 0.4)),  # no decay: stays at its peak
        ({"peak": 0.4, "decay_steps": 2}, (0, 1, 2), (0.4, 0.25, 0.1)),
        ({"warmup_steps": 2, "peak": 0.8}, (0, 1, 2, 9), (0.0, 0.4, 0.8, 0.8)),
        ({"warmup_steps": 1, "peak": 0.3, "valley": 0.3}, (0, 1), (0.0, 0.3)),
    ],
)
def test_mu_edge_cases(options, steps, mus):
    assert [chord_mu(step, **options) for step in steps] == pytest.approx(list(mus))


@pytest.mark.parametrize("options", [{"warmup_steps": -1}, {"decay_steps": -1}, {"peak": 1.1}, {"valley": -0.1}, {"peak": float("nan")}])
def test_mu_refuses_impossible_schedules(options):
    with pytest.raises(ConfigError, match="mu schedule"):
        chord_mu(0, **options)


@pytest.mark.parametrize("options", [{"peak": 0.9, "valley": 0.05}, {"warmup_steps": 2, "peak": 0.8, "valley": 0.1}, {"valley": 0.0}])
def test_a_valley_that_is_never_reached_is_refused(options):
    with pytest.raises(ConfigError, match="is never reached: mu_decay_steps is 0; set mu_decay_steps, or leave mu_valley out"):
        chord_mu(0, **options)


def test_phi_by_hand_and_at_the_extremes():
    p = torch.tensor([0.5, 0.2, 0.9, 1.0, 0.0])
    torch.testing.assert_close(chord_phi(p.log()), torch.tensor([0.25, 0.16, 0.09, 0.0, 0.0]))
    # float32 rounds 1 - p to 0 here; expm1 does not.
    assert chord_phi(torch.tensor([-1e-9])).item() == pytest.approx(1e-9, rel=1e-5)
    assert chord_phi(torch.tensor([1e-7, -1e4])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("weight", "factor"),
    [("none", torch.ones_like), ("phi", lambda p: p * (1 - p)), ("is", lambda p: p)],
)
def test_weights_scale_value_and_gradient_and_carry_none_themselves(weight, factor):
    p = torch.tensor([[0.5, 0.2, 0.9]], dtype=torch.float64)
    logprobs = p.log().requires_grad_()
    outputs = chord_sft_loss(logprobs, torch.tensor([[True, True, True]]), weight=weight)
    torch.testing.assert_close(outputs.losses, -factor(p) * p.log())
    outputs.losses.sum().backward()
    torch.testing.assert_close(logprobs.grad, -factor(p))


def test_weights_are_constants_wherever_they_come_from():
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    assert not chord_phi(logprobs).requires_grad
    sft_loss(logprobs, torch.ones(1, 2, dtype=torch.bool), weights=logprobs.exp()).losses.sum().backward()
    torch.testing.assert_close(logprobs.grad, -logprobs.detach().exp())


def test_the_imitation_half_by_hand():
    # Two expert tokens at p = 0.5 and 0.2 with phi 0.25 and 0.16; the third is masked.
    logprobs = torch.tensor([[0.5, 0.2, 0.9]]).log()
    mask = torch.tensor([[True, True, False]])
    outputs = chord_sft_loss(logprobs, mask)
    sft = aggregate(outputs.losses, mask, "dapo", StepCounts.from_tensor(count_step(mask)))
    expected = (0.25 * math.log(2) + 0.16 * math.log(5)) / 2
    assert sft.item() == pytest.approx(expected)


def test_sft_equals_cross_entropy():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 4, 11), torch.randint(11, (2, 4))
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    logprobs = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    ours = aggregate(sft_loss(logprobs, mask).losses, mask, "dapo", StepCounts.from_tensor(count_step(mask)))
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.masked_fill(~mask, -100).flatten())
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(chord_sft_loss(logprobs, mask, weight="none").losses, sft_loss(logprobs, mask).losses)


def test_unknown_weight():
    with pytest.raises(ConfigError, match="sft_weight: expected one of none, phi, is; found 'tis'"):
        chord_sft_loss(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), weight="tis")
