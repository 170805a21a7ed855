"""Adapters on their way out and back in: merged folders, adapter folders, and policies that start from either."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from aapa_lightning.adapters import LoraSpec, base_state
from aapa_lightning.adapters.weights import merged_model
from aapa_lightning.cli import main
from aapa_lightning.data.datamodule import AapaDataModule
from aapa_lightning.errors import ConfigError
from aapa_lightning.export import export_policy, save_adapters, save_policy, save_trained
from aapa_lightning.modules.sft import SFTModule
from aapa_lightning.policy import PolicySpec, load_policy
from aapa_lightning.types import Record

IDS = torch.randint(3, 290, (2, 9), generator=torch.Generator().manual_seed(0))
KINDS = {
    "default": {},
    "dora": {"dora": True, "rslora": True},
    "whole layers": {"modules_to_save": ["norm"]},
    "tied head": {"target_modules": ["q_proj", "lm_head"]},
    "tied embeddings": {"modules_to_save": ["embed_tokens"]},
}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def moved(spec):
    model, tokenizer = load_policy(spec)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model, tokenizer


@pytest.fixture
def spec(tiny_model_dir):
    return PolicySpec(str(tiny_model_dir), lora=LoraSpec(r=4))


@pytest.fixture(scope="module")
def run(tiny_model_dir, tmp_path_factory):
    """A run folder with the checkpoint of two steps, and the policy's logits then."""
    import lightning as L

    folder = tmp_path_factory.mktemp("run")
    spec = PolicySpec(str(tiny_model_dir), lora=LoraSpec(r=4, modules_to_save=["norm"]))
    module = SFTModule(spec, batch_size=2, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.05))
    trainer = L.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=folder
    )
    trainer.fit(module, AapaDataModule([Record("abc", ("def",)), Record("ghi", ("jkl",))]))
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    module.export(folder / "export")
    return folder, logits(module.model), module


def from_pretrained(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_compute_what_adapters_do(spec, tmp_path, kind, dtype):
    spec = replace(spec, dtype=dtype, lora=LoraSpec(r=4, **KINDS[kind]))
    model, tokenizer = moved(spec)
    before, on = {name: value.clone() for name, value in model.state_dict().items()}, logits(model)
    save_policy(merged_model(model), tokenizer, tmp_path)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(logits(model), on)
    merged = from_pretrained(tmp_path)
    assert merged.dtype == getattr(torch, dtype)
    assert merged.config.tie_word_embeddings == ("tied" not in kind)
    off = logits(load_policy(replace(spec, lora=None))[0])
    error, change = ((logits(merged) - other).float().norm() for other in (on, off))
    # in 16 bits each merged weight is rounded once more than the sum of two products
    assert error < change * (1e-5 if dtype == "float32" else 0.1)
    assert change > 1
    assert merged.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_run_exports_merged_and_as_adapters(run, tiny_model_dir, tmp_path, capsys):
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoTokenizer

    folder, expected, module = run
    base = logits(from_pretrained(tiny_model_dir))
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(logits(from_pretrained(folder / "export")), expected, rtol=0, atol=2e-4)
    for option in ([], ["--merge"]):
        out = tmp_path / f"merged{len(option)}"
        assert main(["export", str(folder), "--out", str(out), *option]) == 0
        files = [(out / name).read_bytes() for name in ("model.safetensors", "config.json")]
        assert files == [(folder / "export" / name).read_bytes() for name in ("model.safetensors", "config.json")]
    assert main(["export", str(folder), "--out", str(tmp_path / "adapter"), "--adapter"]) == 0
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size < (folder / "export" / "model.safetensors").stat().st_size / 2
    assert torch.equal(logits(PeftModel.from_pretrained(from_pretrained(tiny_model_dir), tmp_path / "adapter")), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model_dir)
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").get_vocab() == module.tokenizer.get_vocab()
    assert "written to" in capsys.readouterr().out


def test_a_policy_starts_from_merged_weights_or_from_adapters(run, tmp_path):
    folder, expected, _ = run
    export_policy(folder / "checkpoints" / "last.ckpt", tmp_path / "adapter", adapter=True)
    for start in (folder / "export", tmp_path / "adapter"):
        model, _ = load_policy(PolicySpec(str(start)))
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-4)
        assert all(p.requires_grad for p in model.parameters())
        again, tokenizer = moved(PolicySpec(str(start), lora=LoraSpec(r=2)))
        torch.testing.assert_close(base_state(again), dict(model.state_dict()), rtol=0, atol=0)
        save_trained(again, tokenizer, tmp_path / f"next-{start.name}", PolicySpec(str(start), lora=LoraSpec(r=2)))
        torch.testing.assert_close(logits(from_pretrained(tmp_path / f"next-{start.name}")), logits(again), rtol=0, atol=2e-4)
    with pytest.raises(ConfigError, match=r"lie on .*adapter with its own adapters merged, which no folder holds; leave --adapter out"):
        save_adapters(again, tokenizer, tmp_path / "more", PolicySpec(str(start), lora=LoraSpec(r=2)))


def test_adapters_that_cannot_be_a_start(run, spec, tmp_path):
    folder, *_ = run
    export_policy(folder / "checkpoints" / "last.ckpt", tmp_path / "adapter", adapter=True)
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())

    def refused(message, **changes):
        file.write_text(json.dumps(settings | changes))
        with pytest.raises(ConfigError, match=message):
            load_policy(PolicySpec(str(tmp_path / "adapter")))

    refused("names None as their base model", base_model_name_or_path=None)
    refused("cannot load a causal LM from 'gone'", base_model_name_or_path="gone")
    refused("cannot merge the adapters of", target_modules=["nothing"])
    refused("lack the weights .*lm_head.lora_A", target_modules=[*settings["target_modules"], "lm_head"])
    refused("cannot merge the adapters of .*size mismatch", r=8)
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="merging them into quantised weights would round"):
        load_policy(PolicySpec(str(tmp_path / "adapter"), lora=LoraSpec(), quantization="nf4"))
    tied = replace(spec, lora=LoraSpec(r=4, target_modules=["q_proj", "lm_head"]))
    save_adapters(*moved(tied), tmp_path / "tied", tied)
    with pytest.raises(ConfigError, match="change lm_head, which shares its weights with another layer"):
        load_policy(PolicySpec(str(tmp_path / "tied")))


def test_what_an_export_refuses(run, spec, tiny_model_dir, tmp_path, capsys):
    folder, *_ = run
    last = folder / "checkpoints" / "last.ckpt"
    other, tokenizer = load_policy(PolicySpec(str(tiny_model_dir)))
    other.model.norm.weight.data.add_(0.1)
    save_policy(other, tokenizer, tmp_path / "other")
    with pytest.raises(ConfigError, match=rf"trained on '{tiny_model_dir}' \(fingerprint .* is '{tmp_path}/other'"):
        export_policy(last, tmp_path / "export", base=str(tmp_path / "other"))
    save_policy(*load_policy(PolicySpec(str(tiny_model_dir))), tmp_path / "moved")
    export_policy(last, tmp_path / "export", base=str(tmp_path / "moved"), adapter=True)
    named = json.loads((tmp_path / "export" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "moved")
    with pytest.raises(
        ConfigError, match=r"what the adapters lie on: policy.model: cannot load .*'gone'.* name it with --base if it has moved"
    ):
        export_policy(last, tmp_path / "none", base="gone")
    saved = torch.load(last, weights_only=True)
    saved["state_dict"].pop(next(name for name in saved["state_dict"] if "lora_A" in name))
    torch.save(saved, tmp_path / "spoilt.ckpt")
    with pytest.raises(ConfigError, match=r"expected the 37 tensors of this policy's adapters; it lacks model\.base_model"):
        export_policy(tmp_path / "spoilt.ckpt", tmp_path / "none")
    del saved["aapa"]["policy"]["lora"]
    torch.save(saved, tmp_path / "whole.ckpt")
    with pytest.raises(ConfigError, match="holds whole weights, no adapters; leave --adapter and --base out"):
        export_policy(tmp_path / "whole.ckpt", tmp_path / "none", adapter=True)
    assert main(["export", str(folder), "--out", str(tmp_path / "none"), "--adapter", "--merge"]) == 2
    assert "not allowed with" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_adapters_on_random_weights_are_exported_merged_alone(tiny_config, tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    spec = PolicySpec(config=tiny_config, tokenizer=str(tmp_path / "tokenizer"), lora=LoraSpec(r=2))
    model, tokenizer = moved(spec)
    with pytest.raises(ConfigError, match="the adapters lie on random weights, which no folder holds"):
        save_adapters(model, tokenizer, tmp_path / "adapter", spec)
    save_trained(model, tokenizer, tmp_path / "merged", spec)
    torch.testing.assert_close(logits(from_pretrained(tmp_path / "merged")), logits(model), rtol=0, atol=2e-4)
