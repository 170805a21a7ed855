"""The preference objectives against numbers worked out by hand or in plain Python floats."""

import math
import statistics

import pytest
import torch

from aapa_lightning.errors import ConfigError
from aapa_lightning.objectives.orpo import MAX_LOGPROB
from aapa_lightning.objectives.preference import PREFERENCES
from aapa_lightning.types import LabelLossInputs, PairLossInputs

CHOSEN, REJECTED = [-4.0, -6.0, -12.0, -3.0], [-6.0, -5.0, -9.0, -30.0]
LENGTHS = [2, 3, 6, 1], [3, 5, 3, 10]
REF_CHOSEN, REF_REJECTED = [-5.0, -7.0, -10.0, -4.0], [-5.0, -8.0, -11.0, -20.0]
H = [2.0, -2.0, -4.0, 11.0]
MEANS = [(-2.0, -2.0), (-2.0, -1.0), (-2.0, -3.0), (-3.0, -3.0)]
M = [chosen - rejected for chosen, rejected in MEANS]


def sigma(z):
    return 1 / (1 + math.exp(-z))


def pairs(dtype=torch.float64, **changes):
    floats = {
        "chosen_logprobs": CHOSEN,
        "rejected_logprobs": REJECTED,
        "ref_chosen_logprobs": REF_CHOSEN,
        "ref_rejected_logprobs": REF_REJECTED,
    }
    tensors = {name: torch.tensor(value, dtype=dtype) for name, value in (floats | changes).items()}
    return PairLossInputs(chosen_lengths=torch.tensor(LENGTHS[0]), rejected_lengths=torch.tensor(LENGTHS[1]), **tensors)


def losses(name, inputs=None, **options):
    return PREFERENCES[name].bind(options)(pairs() if inputs is None else inputs).losses.tolist()


def test_margins_are_the_ones_worked_out():
    assert PREFERENCES["dpo"].bind({})(pairs()).metrics["margin"].tolist() == H
    assert PREFERENCES["simpo"].bind({})(pairs()).metrics["margin"].tolist() == M == [0.0, -1.0, 1.0, 0.0]


def test_dpo():
    # h = 2: log(1 + e^-1) at beta 0.5.
    assert losses("dpo", beta=0.5)[0] == pytest.approx(math.log(1 + math.exp(-1)))
    assert losses("dpo", beta=0.5) == pytest.approx([-math.log(sigma(0.5 * h)) for h in H])
    # Mean log-ratios: 1/2 - (-1/3), 1/3 - 3/5, -2/6 - 2/3, 1/1 - (-10/10).
    means = [1 / 2 + 1 / 3, 1 / 3 - 3 / 5, -1.0, 2.0]
    assert losses("dpo", beta=5.0, length_normalize=True) == pytest.approx([-math.log(sigma(5 * m)) for m in means])
    assert losses("ipo", beta=0.25) == pytest.approx([(m - 2) ** 2 for m in means])


def test_rpo_is_dpo_with_its_own_beta():
    assert losses("rpo") == losses("dpo", beta=0.01)
    assert losses("rpo", beta=0.1) == losses("dpo")
    assert PREFERENCES["rpo"].sft_weight == 0.005


def test_metrics_of_a_pair():
    metrics = PREFERENCES["dpo"].bind({"beta": 0.5})(pairs(rejected_logprobs=[-6.0, -7.0, -9.0, -30.0])).metrics
    assert metrics["accuracy"].tolist() == [1.0, 0.5, 0.0, 1.0]
    assert metrics["chosen_logprob"].tolist() == [-2.0, -2.0, -2.0, -3.0]
    assert metrics["rejected_logprob"].tolist() == pytest.approx([-2.0, -7 / 5, -3.0, -3.0])
    assert metrics["chosen_reward"].tolist() == [0.5, 0.5, -1.0, 0.5]
    assert metrics["rejected_reward"].tolist() == [-0.5, 0.5, 1.0, -5.0]


def test_hypo_ignores_a_reference_that_ranks_wrongly():
    # Policy margins 2, -1, -3, 27 over reference margins 0, 1, 1, 16: only positive ones count.
    assert losses("hypo", beta=0.1) == pytest.approx([-math.log(sigma(0.1 * z)) for z in (2, -2, -4, 11)])
    wrong = pairs(ref_chosen_logprobs=[-9.0, -7.0, -10.0, -40.0])
    outputs = PREFERENCES["hypo"].bind({})(wrong)
    assert outputs.losses.tolist() == pytest.approx([-math.log(sigma(0.1 * z)) for z in (2, -2, -4, 27)])
    assert outputs.metrics["reference_clamped"].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert outputs.metrics["chosen_reward"].tolist() == pytest.approx([0.5, 0.1, -0.2, 3.7])


def test_simpo_gapo_and_rrhf():
    expected = [-0.9 * math.log(sigma(2 * (m - 0.25))) - 0.1 * math.log(sigma(-2 * (m - 0.25))) for m in M]
    assert losses("simpo", beta=2.0, gamma_beta_ratio=0.25, label_smoothing=0.1) == pytest.approx(expected)
    assert losses("rrhf") == [0.0, 1.0, 0.0, 0.0]
    assert PREFERENCES["rrhf"].bind({})(pairs()).metrics["weight"].tolist() == [0.0, 1.0, 0.0, 0.0]
    stressed = [-0.5, 0.25, -1.0, 3.0]
    outputs = PREFERENCES["gapo"].bind({})(pairs(stressed_margins=stressed))
    gaps = [m - s for m, s in zip(M, stressed, strict=True)]
    assert outputs.metrics["anchor_gap"].tolist() == gaps
    assert outputs.losses.tolist() == pytest.approx([-math.log(sigma(2 * gap - 0.5)) for gap in gaps])
    assert outputs.metrics["weight"].tolist() == pytest.approx([2 * sigma(0.5 - 2 * gap) for gap in gaps])


def test_gapo_gradient_does_not_reach_the_stressed_margins():
    chosen, stressed = torch.tensor([-4.0], requires_grad=True), torch.tensor([0.3], requires_grad=True)
    length = torch.tensor([2])
    loss = (
        PREFERENCES["gapo"].bind({})(PairLossInputs(chosen, torch.tensor([-5.0]), length, length, stressed_margins=stressed)).losses.sum()
    )
    grads = torch.autograd.grad(loss, (chosen, stressed), allow_unused=True)
    # M = 0.5, G = 0.2, w = 2 sigma(0.5 - 0.4), over two tokens.
    assert grads[0].item() == pytest.approx(-2 * sigma(0.1) / 2)
    assert grads[1] is None


def test_orpo():
    odds = [(math.exp(c) / (1 - math.exp(c)), math.exp(r) / (1 - math.exp(r))) for c, r in MEANS]
    assert losses("orpo", beta=0.3) == pytest.approx([-0.3 * math.log(sigma(math.log(c / r))) for c, r in odds])
    # Probabilities 0.5 and 0.2: odds 1 and 1/4, sigma(log 4) = 0.8.
    ones = torch.ones(1, dtype=torch.int64)
    inputs = PairLossInputs(torch.tensor([0.5]).log(), torch.tensor([0.2]).log(), ones, ones)
    assert losses("orpo", inputs, beta=1.0) == pytest.approx([-math.log(0.8)], rel=1e-6)


def test_orpo_where_odds_are_infinite_or_nothing():
    chosen = torch.tensor([0.0, -1e4, MAX_LOGPROB * 10, -0.7, -0.69], requires_grad=True)
    ones = torch.ones(5, dtype=torch.int64)
    outputs = PREFERENCES["orpo"].bind({"beta": 1.0})(PairLossInputs(chosen, torch.full((5,), -1.0), ones, ones))
    margin = [-math.log(math.expm1(1e-6)), -1e4, -math.log(math.expm1(1e-5)), -math.log(math.expm1(0.7)), -math.log(math.expm1(0.69))]
    margin = [value + math.log(math.expm1(1.0)) for value in margin]
    assert outputs.metrics["margin"].tolist() == pytest.approx(margin, rel=1e-4)
    grads = torch.autograd.grad(outputs.losses.sum(), chosen)[0].tolist()
    assert grads[0] == 0.0
    assert grads[1:] == pytest.approx(
        [-1.0, *(-sigma(-m) / -math.expm1(x) for m, x in zip(margin[2:], (-1e-5, -0.7, -0.69), strict=True))], rel=1e-3
    )


def test_noise_robust_losses():
    z = [0.5 * h for h in H]
    good, bad = [-math.log(sigma(x)) for x in z], [-math.log(sigma(-x)) for x in z]
    assert losses("cdpo", beta=0.5, label_smoothing=0.2) == pytest.approx([0.8 * g + 0.2 * b for g, b in zip(good, bad, strict=True)])
    expected = [(0.8 * g - 0.2 * b) / 0.6 for g, b in zip(good, bad, strict=True)]
    assert losses("rdpo", beta=0.5, label_smoothing=0.2) == pytest.approx(expected)
    expected = [4 * 14 / 15**2 * g + 4 * 14**2 / 15**2 * sigma(-x) for g, x in zip(good, z, strict=True)]
    assert losses("ropo", beta=0.5) == pytest.approx(expected)


def test_rdpo_is_unbiased_under_flips():
    swapped = PairLossInputs(
        pairs().rejected_logprobs, pairs().chosen_logprobs, *LENGTHS, pairs().ref_rejected_logprobs, pairs().ref_chosen_logprobs
    )
    swapped.chosen_lengths, swapped.rejected_lengths = torch.tensor(LENGTHS[1]), torch.tensor(LENGTHS[0])
    kept, flipped = (losses("rdpo", inputs, label_smoothing=0.3) for inputs in (pairs(), swapped))
    assert [0.7 * k + 0.3 * f for k, f in zip(kept, flipped, strict=True)] == pytest.approx(losses("dpo"))


def test_sympo():
    outputs = {
        kind: PREFERENCES["sympo"].bind({"kind": kind, "beta": 0.5, "clip": 1.5})(pairs()) for kind in ("sigmoid", "ramp", "unhinged")
    }
    # Rewards (0.5, -0.5), (0.5, 1.5), (-1, 1), (0.5, -5 clipped to -1.5).
    z = [1.0, -1.0, -2.0, 2.0]
    assert outputs["sigmoid"].losses.tolist() == pytest.approx([1 / (1 + math.exp(x)) for x in z])
    assert outputs["ramp"].losses.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert outputs["unhinged"].losses.tolist() == [0.0, 2.0, 3.0, -1.0]
    assert outputs["unhinged"].metrics["clipped"].tolist() == [0.0, 0.0, 0.0, 0.5]
    assert outputs["unhinged"].metrics["weight"].tolist() == [0.5, 0.5, 0.5, 0.25]
    with pytest.raises(ConfigError, match="kind of sympo: expected one of sigmoid, ramp, unhinged; found 'hinge'"):
        PREFERENCES["sympo"].bind({"kind": "hinge"})


def test_dr_dpo():
    own = [-math.log(sigma(0.5 * h)) for h in H]
    batch = -0.7 * math.log(sum(math.exp(-x / 0.7) for x in own) / 4)
    inputs = pairs()
    inputs.chosen_logprobs.requires_grad_()
    outputs = PREFERENCES["dr_dpo"].bind({"beta": 0.5, "beta_prime": 0.7})(inputs)
    assert outputs.losses.tolist() == pytest.approx([batch] * 4)
    shares = [math.exp(-x / 0.7) for x in own]
    expected = [-share / sum(shares) * 0.5 * sigma(-0.5 * h) for share, h in zip(shares, H, strict=True)]
    assert torch.autograd.grad(outputs.losses.mean(), inputs.chosen_logprobs)[0].tolist() == pytest.approx(expected)
    assert losses("dr_dpo", beta_prime=1e6) == pytest.approx([statistics.mean(losses("dpo"))] * 4, rel=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_dr_dpo_at_enormous_losses(sign):
    # DPO losses of 1e5 each but one, in float32.
    chosen = torch.tensor([-1e5, -1e5, -1e5 + 3.0]).mul(sign).requires_grad_()
    zeros, ones = torch.zeros(3), torch.ones(3, dtype=torch.int64)
    outputs = PREFERENCES["dr_dpo"].bind({"beta": 1.0})(PairLossInputs(chosen, zeros, ones, ones, zeros, zeros))
    expected = 1e5 - 3.0 - math.log((1 + 2 * math.exp(-3)) / 3) if sign > 0 else 0.0
    assert outputs.losses.tolist() == pytest.approx([expected] * 3, rel=1e-6, abs=1e-6)
    assert torch.autograd.grad(outputs.losses.mean(), chosen)[0].sum().item() == pytest.approx(-1.0 if sign > 0 else 0.0, abs=1e-5)


def test_amapo():
    mean, std = statistics.mean(M), statistics.stdev(M)
    shifted = [m + 0.5 for m in M]
    for rejected, margins, mu in ((REJECTED, M, mean), ([-7.5, -7.5, -10.5, -35.0], shifted, mean + 0.5)):
        outputs = PREFERENCES["amapo"].bind({"beta": 2.0})(pairs(rejected_logprobs=rejected))
        target = [2.0 * math.exp((mu - m) / std * mu) if m < mu else 0.0 for m in margins]
        assert outputs.metrics["adaptive_margin"].tolist() == pytest.approx(target)
        assert outputs.losses.tolist() == pytest.approx([-math.log(sigma(2.0 * m - t)) for m, t in zip(margins, target, strict=True)])
    assert sum(t > 0 for t in target) == 1


def test_amapo_caps_its_margin_where_the_mean_is_enormous():
    lengths = torch.ones(3, dtype=torch.int64)
    outputs = PREFERENCES["amapo"].bind({})(PairLossInputs(torch.zeros(3), torch.tensor([-1e4, -1e4, -10.0]), lengths, lengths))
    assert outputs.metrics["adaptive_margin"].tolist() == pytest.approx([0.0, 0.0, 2.0 * math.exp(20)], rel=1e-6)
    assert outputs.losses.tolist() == pytest.approx([0.0, 0.0, 2.0 * math.exp(20) - 20.0], rel=1e-6)


@pytest.mark.parametrize("count", [1, 7])
def test_amapo_without_a_spread_has_no_adaptive_margin(count):
    # 0.1 is no binary fraction: a plain mean of seven of them lies beside it.
    logprobs, lengths = torch.full((count,), -0.1), torch.ones(count, dtype=torch.int64)
    outputs = PREFERENCES["amapo"].bind({})(PairLossInputs(logprobs, 3 * logprobs, lengths, lengths))
    assert outputs.metrics["adaptive_margin"].tolist() == [0.0] * count
    assert outputs.losses.tolist() == pytest.approx([-math.log(sigma(2.0 * 0.2))] * count, rel=1e-6)


def test_kto():
    good = torch.tensor([True, False, True])
    inputs = LabelLossInputs(torch.tensor([-4.0, -4.0, -7.0]), torch.tensor([-5.0, -5.0, -5.0]), good, torch.tensor([1.0, -0.5, 1.0]))
    outputs = PREFERENCES["kto"].bind({"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 3.0})(inputs)
    # z0 = 0.5; log-ratios 1, 1, -2.
    assert outputs.losses.tolist() == pytest.approx([2 * (1 - sigma(0.25)), 3 * (1 - sigma(-0.25)), 2 * (1 - sigma(-1.25))])
    assert outputs.metrics["kl"].tolist() == [0.5] * 3
    assert outputs.metrics["margin"].tolist() == [0.5, -0.5, -2.5]
    assert outputs.metrics["reward"].tolist() == [0.5, 0.5, -1.0]
    for mismatched in (torch.tensor([-1.0]), torch.zeros(0)):
        inputs.mismatched_log_ratios = mismatched
        assert PREFERENCES["kto"].bind({})(inputs).metrics["kl"].tolist() == [0.0] * 3
