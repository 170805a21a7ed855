"""What stands for a policy's spec, parts that are frozen, and optimiser settings that cannot work."""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from aapa_lightning.adapters import LoraSpec
from aapa_lightning.errors import ConfigError
from aapa_lightning.export import save_policy
from aapa_lightning.modules.grpo import GRPOModule
from aapa_lightning.modules.precision import allow_clipping
from aapa_lightning.modules.preference import PreferenceModule
from aapa_lightning.modules.reward_model import RewardModelModule
from aapa_lightning.modules.specs import as_spec
from aapa_lightning.policy import PolicySpec, load_policy


@pytest.mark.parametrize("module", [GRPOModule, PreferenceModule])
def test_a_folder_or_a_mapping_is_a_spec(module, tiny_model_dir, tmp_path):
    assert module(str(tiny_model_dir)).policy == PolicySpec(str(tiny_model_dir))
    assert module(tmp_path).policy == PolicySpec(str(tmp_path))
    wanted = PolicySpec("x", dtype="bfloat16", lora=LoraSpec(r=3))
    fields = {"model": "x", "dtype": "bfloat16", "lora": {"r": 3}}
    for given in (fields, {"class_path": "aapa_lightning.PolicySpec", "init_args": fields}, argparse.Namespace(**fields)):
        assert module(given).policy == wanted
    for wrong, message in ((3, "policy: expected a PolicySpec.*found 3"), ({"modle": "x"}, "expected fields of PolicySpec .*found modle")):
        with pytest.raises(ConfigError, match=message):
            module(wrong)
    with pytest.raises(ConfigError, match=r"policy.lora: TypeError.*rank"):
        module({"model": "x", "lora": {"rank": 3}})


def test_so_it_is_for_references_and_bases():
    assert PreferenceModule("x", reference="y").reference == PolicySpec("y")
    assert PreferenceModule("x", reference={"model": "y"}).reference == PolicySpec("y")
    assert RewardModelModule("x").base == PolicySpec("x")
    with pytest.raises(ConfigError, match="base: expected a PolicySpec"):
        RewardModelModule(1)
    assert as_spec(PolicySpec("z"), "policy") == PolicySpec("z")


FROZEN = ["model.embed_tokens", "model.layers.0", "*.norm.weight"]


@pytest.mark.parametrize("name", ["sft", "grpo", "preference"])
def test_frozen_parts_stay_and_the_rest_moves(kit, name, tiny_model_dir):
    spec = PolicySpec(str(tiny_model_dir), freeze=FROZEN, activation_checkpointing=True)
    before = load_policy(spec)[0].state_dict()
    options = {"objective": "gapo"} if name == "preference" else {}
    module = kit.fit(kit.make_module(name, spec, **options), kit.make_trainer(2))
    moved = {key for key, value in module.model.state_dict().items() if not torch.equal(value, before[key])}
    frozen = {key for key in before if key.startswith(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"))}
    assert moved == set(before) - frozen
    groups = module.trainer.optimizers[0].param_groups
    assert sum(len(group["params"]) for group in groups) == len(moved)


def test_frozen_adapters(tiny_model_dir):
    model, _ = load_policy(PolicySpec(str(tiny_model_dir), lora=LoraSpec(r=2), freeze=["model.layers.0"]))
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".layers.1." in key for key in trained)


def test_a_run_with_frozen_parts_goes_on_where_it_stopped(kit, tiny_model_dir, tmp_path):
    spec = PolicySpec(str(tiny_model_dir), freeze=FROZEN)
    whole = kit.fit(kit.make_module("sft", spec), kit.make_trainer(4)).model.state_dict()
    trainer = kit.make_trainer(2)
    module = kit.fit(kit.make_module("sft", spec), trainer)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = kit.fit(kit.make_module("sft", spec), kit.make_trainer(4), ckpt=tmp_path / "half.ckpt")
    torch.testing.assert_close(dict(again.model.state_dict()), dict(whole), rtol=0, atol=0)
    with pytest.raises(ConfigError, match=r"policy.freeze was \['model.embed_tokens', .* found \[\]"):
        kit.fit(kit.make_module("sft", PolicySpec(str(tiny_model_dir))), kit.make_trainer(4), ckpt=tmp_path / "half.ckpt")
    save_policy(module.model, module.tokenizer, tmp_path / "export")
    exported, _ = load_policy(PolicySpec(str(tmp_path / "export")))
    torch.testing.assert_close(dict(exported.state_dict()), dict(module.model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["model.layers.7"], r"policy.freeze: 'model.layers.7' matches no trainable parameter .* model.embed_tokens.weight, "),
        (["model.embed_tokens", "lm-head"], "'lm-head' matches no trainable parameter"),
        (["*"], "leave nothing to train"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(tiny_model_dir, patterns, message):
    with pytest.raises(ConfigError, match=message):
        load_policy(PolicySpec(str(tiny_model_dir), freeze=patterns))


@pytest.mark.parametrize(
    ("name", "rate", "lora", "warned"),
    [
        ("grpo", 1e-6, True, "1e-05"),
        ("grpo", 1e-5, True, None),
        ("grpo", 1e-6, False, None),
        ("sft", 1e-5, True, "0.0001"),
        ("sft", 1e-4, True, None),
    ],
)
def test_a_rate_under_which_adapters_hardly_move_is_a_warning(kit, tiny_model_dir, name, rate, lora, warned):
    spec = PolicySpec(str(tiny_model_dir), lora=LoraSpec(r=2) if lora else None)
    scheduler = partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.1)  # a warm-up is no low rate
    module = kit.make_module(name, spec, optimizer=partial(torch.optim.AdamW, lr=rate), lr_scheduler=scheduler)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kit.fit(module, kit.make_trainer(1))
    texts = [str(warning.message) for warning in said if "adapters need about 10 times" in str(warning.message)]
    assert len(texts) == (warned is not None)
    assert all(f"lr: {warned}" in text for text in texts)


def test_precisions_and_fused_optimisers(kit, tiny_model_dir):
    spec = PolicySpec(str(tiny_model_dir))
    for module in (kit.make_module("grpo", spec), RewardModelModule(spec, batch_size=4)):
        with pytest.raises(ConfigError, match="64-true makes new tensors 64-bit"):
            kit.fit(module, kit.make_trainer(1, precision="64-true"))
    fused = partial(torch.optim.AdamW, lr=1e-2, fused=True)
    options = {"precision": "bf16-mixed", "gradient_clip_val": 1e-3}
    found, expected, loose = (
        kit.fit(
            kit.make_module("sft", spec, optimizer=partial(torch.optim.SGD, lr=1.0, fused=on)), kit.make_trainer(1, **chosen)
        ).model.state_dict()
        for on, chosen in ((True, options), (False, options), (False, {"precision": "bf16-mixed"}))
    )
    torch.testing.assert_close(dict(found), dict(expected), rtol=1e-5, atol=1e-7)
    assert any(not torch.allclose(loose[name], value, atol=1e-4) for name, value in expected.items())  # it was clipped
    kit.fit(kit.make_module("grpo", spec, optimizer=fused), kit.make_trainer(1, **options))
    scaled = SimpleNamespace(precision="16-mixed", gradient_clip_val=1.0)  # on a CPU Lightning makes bf16-mixed of it
    with pytest.raises(ConfigError, match=r"gradient_clip_val=1.0 with a fused AdamW in 16-mixed"):
        allow_clipping(fused([torch.nn.Parameter(torch.zeros(2))]), scaled)
