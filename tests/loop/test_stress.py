"""The stress test in a single process: the formula, and that nothing but the answer is left of it."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from aapa_lightning.errors import ConfigError
from aapa_lightning.loop import stress as stress_file
from aapa_lightning.loop.layers import perturbed_parameters
from aapa_lightning.loop.stress import WeightStress

SOURCE = importlib.util.spec_from_file_location("stress_kit", Path(__file__).with_name("stress_kit.py"))
kit = importlib.util.module_from_spec(SOURCE)
SOURCE.loader.exec_module(kit)
make_model, margins, probe_of = kit.make_model, kit.margins, kit.probe_of
stored, assert_same_bits, moved_by = kit.stored, kit.assert_same_bits, kit.moved_by


def test_formula_by_hand():
    """theta = (2, -1), loss = 3 a + 0.5 b^2: g = (3, -1), theta g = (6, 1), theta^2 g = (12, -1)."""
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-1.0))
    stress = WeightStress(model, rho=0.1)
    found = stress.evaluate(lambda: 3 * model.a + 0.5 * model.b**2, lambda: torch.stack((model.a, model.b)), seed=0)
    norm = math.sqrt(37.0)
    torch.testing.assert_close(found, torch.tensor([2 + 0.1 * 12 / norm, -1 - 0.1 / norm]))
    assert not found.requires_grad
    assert stress.metrics == {"changed_fraction": 1.0, "perturbation_norm": pytest.approx(0.1 * math.sqrt(145.0) / norm, rel=1e-5)}
    assert (model.a.item(), model.b.item(), model.a.grad, model.b.grad) == (2.0, -1.0, None, None)


def test_moves_along_the_scaled_gradient_by_the_stated_length():
    model = make_model()
    added, stress = moved_by(model, rho=0.5)
    gradient = dict(zip(added, torch.autograd.grad(probe_of(model)(), list(model.parameters())), strict=True))
    weights = dict(model.named_parameters())
    ascent = {n: weights[n].detach() ** 2 * gradient[n] for n in added}
    norm = torch.stack([(weights[n].detach() * gradient[n]).norm() for n in added]).norm()
    for name in added:
        torch.testing.assert_close(added[name], 0.5 * ascent[name] / norm, rtol=1e-3, atol=1e-6)
    length = 0.5 * torch.stack([a.norm() for a in ascent.values()]).norm() / norm
    assert stress.metrics["perturbation_norm"] == pytest.approx(length.item(), rel=1e-4)
    loss, after = probe_of(model)(), WeightStress(model, rho=0.5).evaluate(probe_of(model), probe_of(model), seed=0)
    assert after > loss + 1e-2


def test_a_gradient_of_zero_moves_nothing():
    model = make_model()
    stress = WeightStress(model, rho=10.0)
    found = stress.evaluate(lambda: 0.0 * probe_of(model)(), lambda: margins(model), seed=0)
    assert torch.equal(found, margins(model).detach())
    assert stress.metrics == {"changed_fraction": 0.0, "perturbation_norm": 0.0}


def test_noise_is_seeded_and_needs_no_probe():
    model = make_model()
    stress = WeightStress(model, rho=0.5, direction="gaussian")
    draws = [stress.evaluate(lambda: pytest.fail("called"), lambda: margins(model), seed=s) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    added, stress = moved_by(model, rho=0.5, direction="gaussian")
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    noise = torch.cat([a.flatten() for a in added.values()]) / weights.square()
    # theta^2 n rho / |theta n|: dividing by theta^2 leaves normal noise times rho / |theta n|
    kept = noise[weights.abs() > 1e-2] * weights.norm() / 0.5
    assert kept.mean().abs() < 0.05
    assert kept.std() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "blocks", "norm"),
    [
        ("qwen3", "model.layers", "model.norm"),
        ("llama", "model.layers", "model.norm"),
        ("gpt2", "transformer.h", "transformer.ln_f"),
        ("gpt_neox", "gpt_neox.layers", "gpt_neox.final_layer_norm"),
        ("opt", "model.decoder.layers", "model.decoder.final_layer_norm"),
        ("bloom", "transformer.h", "transformer.ln_f"),
    ],
)
def test_layers_are_found_in_any_decoder(kind, blocks, norm, tied):
    model = make_model(kind, tie_word_embeddings=tied)
    names = {id(p): name for name, p in model.named_parameters()}
    head = {name for name in names.values() if name.startswith(("lm_head.", "embed_out."))}
    assert bool(head) is not tied
    assert {names[id(p)] for p in perturbed_parameters(model, 0)} == set(names.values()) - head
    for layer in (1, 2):
        upper = (f"{norm}.", *(f"{blocks}.{i}." for i in range(layer, 3)))
        expected = {name for name in names.values() if name.startswith(upper)} | head
        assert {names[id(p)] for p in perturbed_parameters(model, layer)} == expected
    for layer in (-1, 3):
        with pytest.raises(ConfigError, match=f"start_layer from 0 to 2, found {layer}; .* has 3 decoder layers"):
            WeightStress(model, start_layer=layer)


def test_layers_below_the_start_are_untouched_and_build_no_graph():
    model = make_model(tie_word_embeddings=False)
    chosen = perturbed_parameters(model, 2)
    added, _ = moved_by(model, rho=0.5, start_layer=2)
    gradient = torch.autograd.grad(probe_of(model)(), chosen)
    norm = torch.stack([(p.detach() * g).norm() for p, g in zip(chosen, gradient, strict=True)]).norm()
    expected = {id(p): 0.5 * p.detach() ** 2 * g / norm for p, g in zip(chosen, gradient, strict=True)}
    for name, p in model.named_parameters():
        torch.testing.assert_close(added[name], expected.get(id(p), torch.zeros_like(p)), rtol=1e-3, atol=1e-6)
    below = [output.requires_grad for output in probed_outputs(model, model.model.layers[1])]
    assert below == [False, False]  # probe, measure
    assert [output.requires_grad for output in probed_outputs(model, model.model.layers[2])] == [True, False]
    assert all(p.requires_grad for p in model.parameters())


def probed_outputs(model, layer):
    seen = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    WeightStress(model, start_layer=2).evaluate(probe_of(model), lambda: margins(model), seed=0)
    handle.remove()
    return seen


def test_frozen_parameters_stay_and_adapters_alone_move():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    for layer, blocks in ((0, {"0", "1", "2"}), (2, {"2"})):
        added, _ = moved_by(model, rho=0.5, start_layer=layer)
        moving = {name for name, value in added.items() if value.any()}
        assert all("lora_" in name for name in moving)
        assert {name.split("layers.")[1].split(".")[0] for name in moving} == blocks
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, _ in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(
    ("where", "error"),
    [*itertools.product(("probe", "measure", "move"), (ArithmeticError, KeyboardInterrupt)), ("put back", KeyboardInterrupt)],
)
def test_weights_come_back_whatever_happens(monkeypatch, error, where, layer):
    model = make_model()
    before, calls = stored(model), []
    stress = WeightStress(model, rho=0.5, start_layer=layer)

    def fail(*args):
        calls.append(model.model.layers[2].mlp.up_proj.weight.detach().clone())
        raise error

    if where == "move":
        wide = stress_file._wide
        monkeypatch.setattr(stress_file, "_wide", lambda value: fail() if moved_so_far(model, before) else wide(value))
    if where == "put back":
        interrupt_the_second_copy_back(monkeypatch, calls)
    with pytest.raises(error):
        stress.evaluate(fail if where == "probe" else probe_of(model), fail if where == "measure" else lambda: margins(model), seed=0)
    assert calls
    if where == "measure":
        assert not torch.equal(calls[0], before["model.layers.2.mlp.up_proj.weight"])
    assert_same_bits(model, before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def moved_so_far(model, before):
    return any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def interrupt_the_second_copy_back(monkeypatch, calls):
    put_back = stress_file._put_back

    class Interrupting:
        def __init__(self, tensor):
            self.tensor = tensor

        def copy_(self, value):
            calls.append(value)
            if len(calls) == 2:
                raise KeyboardInterrupt
            self.tensor.copy_(value)

    monkeypatch.setattr(stress_file, "_put_back", lambda moved: put_back([(Interrupting(stored), before) for stored, before in moved]))


def test_gradients_accumulated_before_are_not_touched():
    model = make_model()
    (3 * probe_of(model)()).backward()
    model.model.norm.weight.grad = None
    before = {name: None if p.grad is None else (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    WeightStress(model).evaluate(probe_of(model), lambda: margins(model), seed=0)
    for name, p in model.named_parameters():
        assert p.grad is (before[name][0] if before[name] else None)
        assert p.grad is None or torch.equal(p.grad, before[name][1])


def test_a_graph_that_is_open_already_gives_the_same_gradients():
    model = make_model()
    expected = torch.autograd.grad(probe_of(model)(), list(model.parameters()))
    loss = probe_of(model)()
    WeightStress(model, rho=0.5).evaluate(probe_of(model), lambda: margins(model), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True))


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])])
def test_dropout_masks_agree_and_the_random_state_goes_on_unchanged(device):
    model, ids = make_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3).to(device), kit.IDS.to(device)
    torch.manual_seed(7)
    clean = margins(model, ids).detach()
    after = torch.rand(3), torch.rand(3, device=device)
    torch.manual_seed(7)
    probed = []

    def probe():
        probed.append(margins(model, ids))
        return probed[0].mean()

    measured = WeightStress(model, rho=1e-30).evaluate(probe, lambda: margins(model, ids), seed=0)
    assert torch.equal(probed[0].detach(), clean)
    assert torch.equal(measured, clean)
    assert torch.equal(margins(model, ids).detach(), clean)
    assert torch.equal(torch.rand(3), after[0])
    assert torch.equal(torch.rand(3, device=device), after[1])


def test_ranks_are_averaged_in_few_calls(monkeypatch):
    """Two ranks of the same gradient, summed in pieces of at most 1200 values but for tensors that are larger."""
    model, sizes = make_model(), []
    whole, _ = moved_by(model, rho=0.5)

    def double(value):
        sizes.append(value.numel())
        return 2 * value

    monkeypatch.setattr(stress_file, "_BUCKET", 1200)
    pieces, _ = moved_by(model, rho=0.5, sum_over_ranks=double, world_size=2)
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)
    assert sum(sizes) == sum(p.numel() for p in model.parameters())
    assert 5 < len(sizes) < 10
    assert max(sizes) <= 1200


def test_what_it_refuses():
    model = make_model()
    for rho in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="finite rho > 0"):
            WeightStress(model, rho=rho)
    with pytest.raises(ConfigError, match="expected one of gradient, gaussian; found 'random'"):
        WeightStress(model, direction="random")
    with pytest.raises(ConfigError, match="start_layer from 0 to 0, found 1; Linear has 0 decoder layers"):
        WeightStress(nn.Linear(2, 2), start_layer=1)
    stress = WeightStress(model)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="expected trainable parameters from layer 0 on, found none in Qwen3ForCausalLM"):
        stress.evaluate(probe_of(model), lambda: margins(model), seed=0)
