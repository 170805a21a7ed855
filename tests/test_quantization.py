"""Quantised weights under adapters. Where bitsandbytes is installed its own code runs, on the CPU, without what it packs for CPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aapa_lightning.adapters import LoraSpec, adapter_names, adapters_off, fingerprint, quantization
from aapa_lightning.adapters.quantization import compute_dtype, is_quantized, quantization_arguments
from aapa_lightning.adapters.weights import merged_model
from aapa_lightning.errors import ConfigError, MissingDependencyError
from aapa_lightning.export import export_policy, save_trained
from aapa_lightning.logprobs import response_logprobs
from aapa_lightning.policy import PolicySpec, load_policy


@pytest.fixture
def installed(monkeypatch):
    """As if bitsandbytes were there: building its configuration asks for no kernel."""
    monkeypatch.setattr(quantization, "find_spec", lambda name: True)


@pytest.fixture
def on_cpu(monkeypatch):
    """bitsandbytes' own layers, as they compute on a GPU: the same in training and in evaluation."""
    modules = pytest.importorskip("bitsandbytes.nn.modules", reason="bitsandbytes comes with the extra `qlora`")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    monkeypatch.setattr(quantization, "_device", lambda name: "cpu")


@pytest.fixture
def spec(tiny_model_dir):
    return PolicySpec(str(tiny_model_dir), lora=LoraSpec(r=4))


def test_nothing_is_asked_of_whole_weights(monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: pytest.fail("looked for a package"))
    assert quantization_arguments("none", torch.float32) == {}


def test_four_bits_are_those_of_qlora(installed, monkeypatch):
    monkeypatch.setattr(quantization, "_device", lambda name: "cpu")
    found = quantization_arguments("nf4", torch.bfloat16)
    config = found["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert quantization_arguments("int8", torch.float32)["quantization_config"].load_in_8bit
    monkeypatch.undo()
    monkeypatch.setattr(quantization, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    found = quantization_arguments("nf4", torch.float32)
    assert found["device_map"] == {"": 3}  # each rank its own
    assert found["quantization_config"].bnb_4bit_compute_dtype == torch.bfloat16


def test_products_are_taken_in_the_dtype_that_the_gpu_is_good_at(monkeypatch):
    cases = [(False, True, torch.float32), (True, False, torch.float32), (True, True, torch.bfloat16)]
    for gpu, capable, expected in cases:
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda capable=capable: capable)
        assert compute_dtype(torch.float32) == expected
        assert compute_dtype(torch.float16) == torch.float16


def test_without_a_gpu_there_is_a_word_of_help(installed, spec, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="quantization=int8: expected a CUDA GPU, found none"):
        load_policy(replace(spec, quantization="int8"))


@pytest.mark.parametrize("package", ["bitsandbytes", "accelerate"])
def test_a_missing_package_is_named(spec, monkeypatch, package):
    monkeypatch.setattr(quantization, "find_spec", lambda name: name != package)
    with pytest.raises(MissingDependencyError, match=rf"quantization=nf4: expected the package {package}.*aapa-lightning\[qlora\]"):
        load_policy(replace(spec, quantization="nf4"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "nf3"}, "policy.quantization: expected one of none, nf4, int8; found 'nf3'"),
        ({"quantization": "nf4", "lora": None}, "quantization=nf4: quantised weights cannot be trained; add policy.lora"),
        ({"quantization": "int8", "lora": LoraSpec(dora=True)}, "policy.lora.dora: .* int8 weights; use quantization nf4, or dora false"),
        ({"quantization": "int8", "model": None}, "quantization=int8: expected `model`, found random weights from `config`"),
    ],
)
def test_what_does_not_go_together(spec, tiny_model_dir, tiny_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_policy(replace(spec, tokenizer=str(tiny_model_dir), config=tiny_config, **changes))


def test_a_model_tells_that_it_is_quantised(tiny_model_dir):
    model, _ = load_policy(PolicySpec(str(tiny_model_dir)))
    assert not is_quantized(model)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    assert is_quantized(model)


def test_a_base_that_comes_quantised_is_exported_as_adapters(spec, tmp_path, monkeypatch):
    model, tokenizer = load_policy(spec)
    monkeypatch.setattr("aapa_lightning.export.is_quantized", lambda model: True)
    with pytest.warns(UserWarning, match="holds the adapters alone: .* has no weights to merge them into but quantised ones"):
        save_trained(model, tokenizer, tmp_path, spec)
    assert {file.name for file in tmp_path.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("kind", "dtype", "lora"),
    [
        ("nf4", "float32", {}),
        ("nf4", "bfloat16", {"dora": True}),
        ("nf4", "bfloat16", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["norm"]}),
        ("int8", "float32", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["norm"]}),
        ("int8", "bfloat16", {}),
    ],
)
def test_adapters_on_quantised_weights(spec, tmp_path, kind, dtype, lora):
    spec = replace(spec, quantization=kind, dtype=dtype, activation_checkpointing=True, lora=LoraSpec(r=4, **lora))
    model, tokenizer = load_policy(spec)
    layers = [type(layer.self_attn.q_proj.base_layer).__name__ for layer in model.get_base_model().model.layers]
    assert layers == [{"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]] * 2
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    ids, ones = torch.randint(3, 290, (2, 9), generator=torch.Generator().manual_seed(0)), torch.ones(2, 5, dtype=torch.bool)

    def logprobs(model):
        return response_logprobs(model, ids[:, :4], ones[:, :4], ids[:, 4:], ones)[0]

    start = logprobs(model.train())
    start.sum().backward()
    with torch.no_grad(), adapters_off(model):
        base = logprobs(model)
    torch.testing.assert_close(start.detach(), base, rtol=0, atol=0.3 if lora.get("dora") else 0)  # whose magnitudes are rounded
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        with adapters_off(model):
            assert torch.equal(logprobs(model), base)
        assert not torch.allclose(logprobs(model), base, atol=1e-2)
    assert load_policy(spec)[0].aapa_base == fingerprint(model) == model.aapa_base
    save_trained(model, tokenizer, tmp_path, spec)  # merged into the weights as they were
    whole, _ = load_policy(replace(spec, quantization="none"))
    whole.load_state_dict({name: model.state_dict()[name] for name in adapter_names(model)}, strict=False)
    merged, _ = load_policy(PolicySpec(str(tmp_path), dtype=dtype))
    assert not is_quantized(merged)
    torch.testing.assert_close(logprobs(merged), logprobs(whole), rtol=0, atol=1e-4 if dtype == "float32" else 0.3)
    with pytest.raises(ConfigError, match=r"weights of .* are quantised; write the adapters alone"):
        merged_model(model)


@pytest.mark.usefixtures("on_cpu")
def test_a_run_on_four_bits_resumes_bit_for_bit_and_is_exported(spec, tmp_path):
    import lightning as L

    from aapa_lightning.data.datamodule import AapaDataModule
    from aapa_lightning.modules.preference import PreferenceModule
    from aapa_lightning.types import Record

    spec = replace(spec, quantization="nf4")
    records = [Record(f"Describe {i}.", chosen="calm sea", rejected="a storm") for i in range(4)]

    def run(steps, ckpt=None):
        module = PreferenceModule(spec, batch_size=2, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2), seed=1)
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        trainer = L.Trainer(max_steps=steps, default_root_dir=tmp_path, **options)
        trainer.fit(module, AapaDataModule(records), ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    whole, _ = run(3), run(1)
    again = run(3, ckpt=tmp_path / "1.ckpt")
    for (name, one), (_, other) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    names = torch.load(tmp_path / "3.ckpt", weights_only=True)["state_dict"].keys()
    assert names == {f"model.{name}" for name in adapter_names(whole.model)}
    whole.export(tmp_path / "live")
    export_policy(tmp_path / "3.ckpt", tmp_path / "export")
    one, other = (load_policy(PolicySpec(str(tmp_path / name)))[0].state_dict() for name in ("live", "export"))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
