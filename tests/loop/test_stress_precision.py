"""The stress test and precision: autocast, checkpointed activations, and weights stored in 16 bits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from aapa_lightning.loop.stress import WeightStress

SOURCE = importlib.util.spec_from_file_location("stress_kit", Path(__file__).with_name("stress_kit.py"))
kit = importlib.util.module_from_spec(SOURCE)
SOURCE.loader.exec_module(kit)
make_model, margins, probe_of, moved_by = kit.make_model, kit.margins, kit.probe_of, kit.moved_by


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_autocast_no_cast_is_stale(checkpointing):
    """A cast kept from the probe would hide the move from ``measure``; one kept from ``measure`` would move the caller's forward."""
    model, moved = make_model(), make_model()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    stress = WeightStress(model, rho=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        gradient = torch.autograd.grad(probe_of(model)(), list(model.parameters()))
        torch.clear_autocast_cache()
        with torch.no_grad():
            expected = margins(model)
        found = stress.evaluate(probe_of(model), lambda: moved.load_state_dict(model.state_dict()) and margins(model), seed=0)
        assert torch.equal(margins(model), expected)
        again = torch.autograd.grad(probe_of(model)(), list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(found, margins(moved))
    assert (found - expected).abs().min() > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(again, gradient, strict=True))


def test_the_backward_keeps_the_precision_of_its_forward():
    """A probe that leaves autocast for float32 gets a float32 gradient, as it does where a trainer calls backward."""
    model = nn.Linear(8, 8, bias=False)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))

    def probe():
        with torch.autocast("cpu", enabled=False):
            return model(x).square().sum()

    stress = WeightStress(model, rho=0.5)
    outside = stress.evaluate(probe, model.weight.clone, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stress.evaluate(probe, model.weight.clone, seed=0), outside)
    assert not torch.equal(outside, model.weight)


@pytest.mark.parametrize("layer", [0, 2])
def test_gradient_checkpointing_changes_nothing(layer):
    plain, checkpointed = make_model(), make_model()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = [moved_by(model, rho=0.5, start_layer=layer)[0] for model in (plain, checkpointed)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(value.any() for value in found[0].values())


def test_small_moves_round_away_in_bfloat16():
    model = make_model().bfloat16()
    shares = []
    for rho in (1e-6, 0.05, 5.0):
        added, stress = moved_by(model, rho=rho)
        shares.append(stress.metrics["changed_fraction"])
        values = torch.cat([value.flatten() for value in added.values()]).float()
        assert shares[-1] == pytest.approx(values.count_nonzero().item() / len(values), abs=1e-6)
        assert stress.metrics["perturbation_norm"] == pytest.approx(values.norm().item(), rel=1e-2, abs=1e-9)
    assert shares[0] < 1e-3 < shares[1] < shares[2] < 1.0
    assert moved_by(make_model(), rho=0.05)[1].metrics["changed_fraction"] > 0.8
