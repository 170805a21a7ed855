"""GAPO inside the module: the weight against autograd, weights put back, precision, layers, the control."""

import pytest
import torch

from aapa_lightning.errors import ConfigError
from aapa_lightning.logprobs import sequence_logprobs
from aapa_lightning.loop.terms import total_loss
from aapa_lightning.modules.preference import StressOptions


def opened(kit, spec, **options):
    """A GAPO module with an open window, outside of its trainer's loop."""
    module = kit.make_module("preference", spec, **({"objective": "gapo"} | options))
    kept = []
    module.on_before_zero_grad = lambda optimizer: kept.append(module.window)
    kit.fit(module, kit.make_trainer(1))
    return module, kept[-1]


def margins_of(module, rows):
    """Length-normalised margins, with a graph, pair by pair."""
    margins = []
    for row in rows:
        means = []
        for side in (row.chosen, row.rejected):
            ids, learned = torch.tensor([side.input_ids]), torch.tensor([side.response_mask])
            means.append(sequence_logprobs(module.model, ids, torch.ones_like(learned), learned).sum() / learned.sum())
        margins.append(means[0] - means[1])
    return torch.stack(margins)


@pytest.mark.parametrize("options", [{}, {"beta": 10.0, "gamma_beta_ratio": 0.5}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize(
    "stress", [StressOptions(rho=0.2), StressOptions(rho=0.2, start_layer=1), StressOptions(rho=0.2, direction="gaussian")]
)
def test_the_gradient_is_the_weighted_gradient_of_the_margins(kit, spec, options, stress):
    module, window = opened(kit, spec, stress=stress, options=options)
    beta, ratio, smoothing = options.get("beta", 2.0), options.get("gamma_beta_ratio", 0.25), options.get("label_smoothing", 0.0)
    (term,) = module.loss_terms(window, 0)
    metrics = {name: value.flatten() for name, value in term.outputs.metrics.items()}
    loss, _ = total_loss([term], 1.0)
    parameters = [p for p in module.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(loss, parameters)
    margins = margins_of(module, window.demonstrations_of(0)[0])
    torch.testing.assert_close(metrics["margin"], margins.detach(), rtol=1e-4, atol=1e-5)
    weight = beta * (torch.sigmoid(beta * (ratio - metrics["anchor_gap"])) - smoothing)
    torch.testing.assert_close(metrics["weight"], weight, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(-(weight * margins).mean(), parameters)
    for found, wanted in zip(gradient, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    assert metrics["anchor_gap"].abs().max() > 1e-3


def test_the_stress_lowers_the_mean_margin(kit, spec):
    """The weights move up the probe's loss, so the gap between the margin and the stressed one is positive on the whole."""
    module, window = opened(kit, spec, stress=StressOptions(rho=0.01))
    (term,) = module.loss_terms(window, 0)
    assert float(term.outputs.metrics["anchor_gap"].mean()) > 0


def test_the_loss_is_that_of_weights_moved_by_hand(kit, spec):
    """The stressed margins, from the formula of the paper on a copy of the policy."""
    rho = 0.1
    module, window = opened(kit, spec, stress=StressOptions(rho=rho))
    rows = window.demonstrations_of(0)[0]
    (term,) = module.loss_terms(window, 0)
    margins = margins_of(module, rows)
    probe = -torch.nn.functional.logsigmoid(2.0 * (margins - 0.25)).mean()
    moved = [p for p in module.model.parameters() if p.requires_grad]  # a tied head: its weights are the embeddings'
    gradient = torch.autograd.grad(probe, moved)
    norm = torch.cat([(p * g).flatten() for p, g in zip(moved, gradient, strict=True)]).norm()
    before = [p.detach().clone() for p in moved]
    with torch.no_grad():
        for p, g in zip(moved, gradient, strict=True):
            p.add_(rho * p.square() * g / (norm + 1e-12))
        stressed = margins_of(module, rows)
        for p, value in zip(moved, before, strict=True):
            p.copy_(value)
    gap = margins.detach() - stressed
    torch.testing.assert_close(term.outputs.metrics["anchor_gap"].flatten(), gap, rtol=1e-3, atol=1e-4)
    expected = -torch.nn.functional.logsigmoid(2.0 * (gap - 0.25))
    torch.testing.assert_close(term.outputs.losses.flatten().detach(), expected, rtol=1e-3, atol=1e-4)


def test_weights_gradients_and_noise_are_as_if_nothing_had_happened(kit, spec, same):
    module, window = opened(kit, spec, stress=StressOptions(rho=0.3))
    for p in module.parameters():
        p.grad = torch.full_like(p, 0.5)
    before, state = kit.weights(module), torch.get_rng_state()
    module.loss_terms(window, 0)
    same(before, kit.weights(module))
    assert all((p.grad == 0.5).all() for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_exception_in_any_forward_leaves_the_weights(kit, spec, same, monkeypatch, at):
    """The probe, the stressed forward, the clean one."""
    module, window = opened(kit, spec, stress=StressOptions(rho=0.3))
    before, calls = kit.weights(module), []
    plain = module.model.forward

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("out of memory")
        return plain(*args, **kwargs)

    monkeypatch.setattr(module.model, "forward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        module.loss_terms(window, 0)
    assert len(calls) == at
    same(before, kit.weights(module))
    monkeypatch.setattr(module.model, "forward", plain)
    module.loss_terms(window, 0)
    same(before, kit.weights(module))


def test_three_forwards_and_two_backwards(kit, spec, monkeypatch):
    for direction, expected in (("gradient", 3), ("gaussian", 2)):
        module, window = opened(kit, spec, stress=StressOptions(direction=direction))
        calls, plain = [], module.model.forward
        monkeypatch.setattr(
            module.model, "forward", lambda *args, calls=calls, plain=plain, **kwargs: calls.append(1) or plain(*args, **kwargs)
        )
        module.loss_terms(window, 0)
        assert len(calls) == expected


@pytest.mark.parametrize("stress", [StressOptions(), StressOptions(start_layer=1), StressOptions(direction="gaussian")])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_stressed_margins_differ_in_every_precision(kit, spec, stress, precision):
    rows = kit.Rows()
    module = kit.make_module("preference", spec, objective="gapo", stress=stress)
    kit.fit(module, kit.make_trainer(3, accumulate=2, logger=rows, precision=precision))
    for _, row in rows.rows:
        assert all(value == value and abs(value) < 1e4 for value in row.values())
        assert row["train/preference/anchor_gap"] != 0
        assert row["train/stress/changed_fraction"] > 0.3
        assert row["train/stress/perturbation_norm"] > 0
        assert 0 < row["train/preference/weight"] < 2.0
        assert row["train/skipped_steps"] == 0


def test_weights_kept_in_bfloat16_say_how_many_of_them_moved(kit, spec):
    """A small rho rounds away: the share of weights that changed tells."""
    from dataclasses import replace

    shares = []
    for rho in (1e-4, 1.0):
        rows = kit.Rows()
        module = kit.make_module("preference", replace(spec, dtype="bfloat16"), objective="gapo", stress=StressOptions(rho=rho))
        kit.fit(module, kit.make_trainer(1, logger=rows))
        shares.append(rows.rows[0][1]["train/stress/changed_fraction"])
    assert shares[0] < 0.1 < shares[1]


@pytest.mark.parametrize(
    ("stress", "message"),
    [
        ({"rho": 0.0}, r"stress\.rho: expected a positive, finite number, found 0\.0"),
        ({"start_layer": 9}, "layer"),
        ({"direction": "sideways"}, "direction"),
    ],
)
def test_a_stress_that_cannot_be_is_refused_before_anything_else(kit, spec, stress, message):
    def run():
        module = kit.make_module("preference", spec, objective="gapo", stress=StressOptions(**stress))
        module.train_loader = lambda splits: pytest.fail("the data were read first")
        kit.fit(module, kit.make_trainer(1))

    with pytest.raises(ConfigError, match=message):
        run()


def test_a_stress_without_gapo_is_refused(kit, spec):
    with pytest.raises(ConfigError, match="objective dpo perturbs no weights; leave stress out"):
        kit.make_module("preference", spec, stress=StressOptions(rho=0.1))
