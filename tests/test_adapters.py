"""Adapters put on a policy: what is trained, what is switched off, what is refused."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from aapa_lightning.adapters import LoraSpec, adapter_names, adapters_off, base_state, fingerprint, has_adapters
from aapa_lightning.errors import ConfigError, MissingDependencyError
from aapa_lightning.logprobs import response_logprobs
from aapa_lightning.policy import PolicySpec, load_policy

#: Kinds of adapters; the head's shares its weights with the embeddings.
KINDS = {
    "default": {},
    "dora": {"dora": True},
    "whole layers": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["norm", "lm_head"]},
    "tied": {"target_modules": ["v_proj", "lm_head", "embed_tokens"], "rslora": True},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "options": {"layers_to_transform": [1], "init_lora_weights": "gaussian"}},
}


def load(folder, dtype="float32", seed=0, **options):
    spec = {name: options.pop(name) for name in ("activation_checkpointing", "disable_dropout", "logprob_backend") if name in options}
    return load_policy(PolicySpec(str(folder), dtype=dtype, seed=seed, lora=LoraSpec(**{"r": 4, **options}), **spec))[0]


def move(model, scale=0.2):
    """Give adapters other values than their start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(3, 290, (3, 11), generator=torch.Generator().manual_seed(0))
    ones = torch.ones(3, 6, dtype=torch.bool)
    return ids[:, :6], ones, ids[:, 6:], ones[:, :5]


def logprobs(model, batch, **options):
    return response_logprobs(model, *batch, 0.7, **options)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_are_trained_and_in_float32(tiny_model_dir, batch, kind, dtype):
    base, _ = load_policy(PolicySpec(str(tiny_model_dir), dtype=dtype))
    model = load(tiny_model_dir, dtype, **KINDS[kind])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == adapter_names(model)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    if (kind, dtype) != ("dora", "bfloat16"):  # whose magnitudes are rounded
        assert torch.equal(logprobs(model, batch), logprobs(base, batch))
    move(model)
    logprobs(model, batch).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained.keys()
    assert not [name for name, p in trained.items() if not p.grad.any() and "embedding" not in name]
    assert not torch.allclose(logprobs(model, batch), logprobs(base, batch), atol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_adapters_off_it_is_the_base_model_bit_for_bit(tiny_model_dir, batch, kind, dtype):
    base, _ = load_policy(PolicySpec(str(tiny_model_dir), dtype=dtype))
    model = move(load(tiny_model_dir, dtype, **KINDS[kind]))
    on = logprobs(model, batch)
    with adapters_off(model):
        off = logprobs(model, batch)
    assert torch.equal(off, logprobs(base, batch))
    assert torch.equal(logprobs(model, batch), on)
    with model.disable_adapter():  # peft's own says the same
        assert torch.equal(logprobs(model, batch), off)
    assert base_state(model).keys() == base.state_dict().keys()
    assert fingerprint(model) == fingerprint(base) == model.aapa_base
    torch.testing.assert_close(base_state(model), dict(base.state_dict()), rtol=0, atol=0)


def test_streamed_logprobs_of_the_base_model(tiny_model_dir, batch):
    base, _ = load_policy(PolicySpec(str(tiny_model_dir)))
    model = move(load(tiny_model_dir))
    with adapters_off(model):
        assert torch.equal(logprobs(model, batch, backend="chunked"), logprobs(base, batch, backend="chunked"))


@pytest.mark.parametrize("kind", ["default", "whole layers"])
def test_switching_off_leaves_gradients_graphs_and_flags_alone(tiny_model_dir, batch, kind):
    model = move(load(tiny_model_dir, **KINDS[kind]))
    frozen = next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)  # by somebody else, for a while

    def gradients(between):
        model.zero_grad()
        loss = logprobs(model, batch).square().sum()
        between()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    def off():
        with adapters_off(model), adapters_off(model), torch.no_grad():
            logprobs(model, batch)
        with pytest.raises(KeyError), adapters_off(model):
            raise KeyError

    torch.testing.assert_close(gradients(off), gradients(lambda: None), rtol=0, atol=0)
    assert not frozen.requires_grad
    with adapters_off(model):
        with adapters_off(model):
            pass
        inner = logprobs(model, batch)
    assert not torch.equal(inner, logprobs(model, batch))


def test_a_peft_that_cannot_be_switched_off_says_so(tiny_model_dir, monkeypatch):
    model = load(tiny_model_dir)
    layer = type(model.get_base_model().model.layers[0].mlp.up_proj)
    monkeypatch.setattr(layer, "disable_adapters", property(lambda self: False))
    with pytest.raises(RuntimeError, match="cannot be switched off"), adapters_off(model):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_belongs_to_the_seed(tiny_model_dir, kind):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two, other = (load(tiny_model_dir, seed=seed, **KINDS[kind]).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activation_checkpointing(tiny_model_dir, batch, dtype):
    """Recomputing gives the same gradients, and needs no gradient of the embeddings."""
    found = []
    for checkpointing in (False, True):
        model = move(load(tiny_model_dir, dtype, activation_checkpointing=checkpointing)).train()
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == checkpointing
        embedded = []
        model.get_input_embeddings().register_forward_hook(lambda *call, seen=embedded: seen.append(call[2].requires_grad))
        logprobs(model, batch).square().sum().backward()
        assert embedded == [False]
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert found[0].keys() == adapter_names(model)


def test_dropout_is_asked_for_twice(tiny_model_dir, batch):
    with pytest.raises(
        ConfigError, match=r"lora.dropout=0.1 would do nothing: policy.disable_dropout.* set policy.disable_dropout to false"
    ):
        load(tiny_model_dir, dropout=0.1)
    model = move(load(tiny_model_dir, dropout=0.5, disable_dropout=False)).train()
    assert not torch.equal(logprobs(model, batch), logprobs(model, batch))
    still = move(load(tiny_model_dir)).train()
    assert torch.equal(logprobs(still, batch), logprobs(still, batch))
    assert torch.equal(logprobs(model.eval(), batch), logprobs(still, batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, r"policy.lora.r: expected a whole number, at least 1, found 0"),
        ({"alpha": 0}, r"policy.lora.alpha: expected a positive, finite number"),
        ({"dropout": 1.0}, r"policy.lora.dropout: expected a number in \[0, 1\)"),
        ({"target_modules": []}, r"policy.lora.target_modules: expected names of layers, or all-linear"),
        ({"options": {"bias": "all"}}, r"policy.lora.options: expected keys of exclude_modules.*; found bias"),
        ({"options": {"init_lora_weights": "pissa"}}, r"expected true or gaussian, found 'pissa'"),
        ({"target_modules": ["nothing"]}, r"peft cannot adapt Qwen3ForCausalLM: .*'nothing'"),
        ({"modules_to_save": ["norm", "score"]}, r"modules_to_save: Qwen3ForCausalLM has no layer score"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_model_dir, options, message):
    with pytest.raises(ConfigError, match=message):
        load(tiny_model_dir, **options)


def test_without_peft_there_is_a_word_of_help(tiny_model_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"expected the package peft.*pip install 'aapa-lightning\[peft\]'"):
        load(tiny_model_dir)
    assert not has_adapters(load_policy(PolicySpec(str(tiny_model_dir)))[0])


def test_a_fingerprint_tells_models_apart(tiny_model_dir):
    base, _ = load_policy(PolicySpec(str(tiny_model_dir)))
    known = {fingerprint(base)}
    for change in (lambda m: m.lm_head.weight.data.mul_(1.001), lambda m: m.model.norm.weight.data.add_(1e-3), lambda m: m.bfloat16()):
        other = copy.deepcopy(base)
        change(other)
        known.add(fingerprint(other))
    turned, _ = load_policy(PolicySpec(str(tiny_model_dir), config={"rms_norm_eps": 1e-3}))
    assert len(known | {fingerprint(turned)}) == 5
    assert fingerprint(copy.deepcopy(base)) in known
