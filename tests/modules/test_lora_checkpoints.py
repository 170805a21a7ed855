"""Promise 3 under adapters: checkpoints hold them alone, and a resume from any optimiser step changes no bit."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from aapa_lightning.adapters import LoraSpec, adapter_names, base_state
from aapa_lightning.data.datamodule import AapaDataModule
from aapa_lightning.errors import ConfigError
from aapa_lightning.export import save_policy
from aapa_lightning.modules.inference import InferenceModule
from aapa_lightning.policy import PolicySpec, load_policy

#: Options of a module, accumulation and optimiser steps; eight records and four a window.
RUNS = {
    "sft": ("sft", {"policy.lora": {"modules_to_save": ["norm"]}}, 2, 4),
    "grpo": ("grpo", {"updates_per_window": 2, "minibatches": 2, "beta": 0.2, "reward_kl": 0.1}, 2, 7),
    "chord": ("chord", {"policy.lora": {"dora": True}}, 1, 4),
    "preference": ("preference", {"objective": "dpo"}, 2, 4),
}


@pytest.fixture
def lora(spec):
    return replace(spec, lora=LoraSpec(r=4))


def run(kit, spec, folder, case, *, ckpt=None, steps=None, at=None):
    name, options, accumulate, last = RUNS[case]
    own = dict(options)
    spec = replace(spec, lora=replace(spec.lora, **own.pop("policy.lora", {})))
    rows = kit.Rows()
    module = kit.make_module(name, spec, **own)
    trainer = kit.make_trainer(
        steps or last, accumulate=accumulate, logger=rows, callbacks=[kit.make_anchor(0.5, adaptive=True), kit.SaveAt(folder, at)]
    )
    kit.fit(module, trainer, data=kit.make_records(8), ckpt=ckpt)
    return module, trainer.strategy.optimizer_state(trainer.optimizers[0])["state"], rows.rows


@pytest.mark.parametrize("case", RUNS)
def test_resume_from_every_step(kit, lora, same, tmp_path, case):
    whole, optimizer, rows = run(kit, lora, tmp_path, case)
    for step in range(1, RUNS[case][3]):
        again, found, tail = run(kit, lora, tmp_path / "again", case, ckpt=tmp_path / f"step={step}.ckpt", at=())
        same(kit.weights(whole), kit.weights(again))
        torch.testing.assert_close(optimizer, found, rtol=0, atol=0)
        assert tail == [row for row in rows if row[0] >= step]


def test_a_checkpoint_holds_adapters_alone(kit, lora, spec, tmp_path):
    module, *_ = run(kit, lora, tmp_path, "sft", steps=1)
    saved = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"model.{name}" for name in adapter_names(module.model)}
    trained = [p for p in module.model.parameters() if p.requires_grad]
    assert len(saved["optimizer_states"][0]["state"]) == len(saved["state_dict"]) == len(trained)
    for name, value in saved["state_dict"].items():
        assert torch.equal(value, module.model.state_dict()[name.removeprefix("model.")])
    assert set(module.model.state_dict()) > adapter_names(module.model)  # of the model itself nothing is hidden
    base, _ = load_policy(spec)
    torch.testing.assert_close(base_state(module.model), dict(base.state_dict()), rtol=0, atol=0)


def test_lightnings_own_checkpoints_too(kit, lora, tmp_path):
    module = kit.make_module("sft", lora)
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_weights_only=True)
    kit.fit(module, kit.make_trainer(1, callbacks=[checkpoint], enable_checkpointing=True))
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    assert set(saved["state_dict"]) == {f"model.{name}" for name in adapter_names(module.model)}


def test_another_base_model_is_refused_by_name(kit, lora, tmp_path):
    run(kit, lora, tmp_path, "grpo", steps=1)
    model, tokenizer = load_policy(replace(lora, lora=None))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    save_policy(model, tokenizer, tmp_path / "other")
    other = replace(lora, model=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match=rf"trained on '{lora.model}' \(fingerprint .* and the base model here is '{other.model}' \("):
        run(kit, other, tmp_path, "grpo", ckpt=tmp_path / "step=1.ckpt")
    for change in ({"dtype": "bfloat16"}, {"config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}}):
        with pytest.raises(ConfigError, match="its adapters were trained on"):
            run(kit, replace(lora, **change), tmp_path, "grpo", ckpt=tmp_path / "step=1.ckpt")


def test_the_same_base_model_in_another_place_will_do(kit, lora, same, tmp_path):
    whole, *_ = run(kit, lora, tmp_path, "chord")
    save_policy(*load_policy(replace(lora, lora=None)), tmp_path / "moved")
    again, *_ = run(kit, replace(lora, model=str(tmp_path / "moved")), tmp_path, "chord", ckpt=tmp_path / "step=2.ckpt")
    same(kit.weights(whole), kit.weights(again))


def test_other_adapters_are_refused(kit, lora, spec, tmp_path):
    run(kit, lora, tmp_path, "grpo", steps=1)
    ckpt = tmp_path / "step=1.ckpt"
    with pytest.raises(ConfigError, match=r"other settings: r 4 -> 8, alpha 32.0 -> 16.0"):
        run(kit, replace(lora, lora=LoraSpec(r=8, alpha=16.0)), tmp_path, "grpo", ckpt=ckpt)
    whole = kit.make_module("grpo", spec)
    with pytest.raises(ConfigError, match=r"adapters \(r=4\) of a policy on .*set policy.lora"):
        kit.fit(whole, kit.make_trainer(2), ckpt=ckpt)
    kit.fit(whole, kit.make_trainer(1, callbacks=[kit.SaveAt(tmp_path / "whole")]))
    with pytest.raises(ConfigError, match=r"it holds whole weights, and this policy trains adapters"):
        run(kit, lora, tmp_path, "grpo", ckpt=tmp_path / "whole" / "step=1.ckpt")


@pytest.mark.parametrize("change", ["lacks", "has"])
def test_tensors_too_many_or_too_few_are_refused(kit, lora, tmp_path, change):
    run(kit, lora, tmp_path, "grpo", steps=1)
    saved = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    name = min(saved["state_dict"])
    value = saved["state_dict"].pop(name)
    if change == "has":
        saved["state_dict"] |= {name: value, f"{name}.more": value}
    torch.save(saved, tmp_path / "spoilt.ckpt")
    with pytest.raises(ConfigError, match=rf"expected the 28 tensors of this policy's adapters; it {change} {name}"):
        run(kit, lora, tmp_path, "grpo", ckpt=tmp_path / "spoilt.ckpt")


def test_validation_and_prediction_of_a_checkpoint(kit, lora, tmp_path):
    """A module that only looks at the policy reads the same adapters."""
    trained, *_ = run(kit, lora, tmp_path, "grpo", steps=2)
    seen = []
    for ckpt in (None, tmp_path / "step=2.ckpt"):
        module = InferenceModule(PolicySpec(**{name: getattr(lora, name) for name in ("model", "lora")}), eval_samples=0)
        (figures,) = kit.make_trainer().validate(module, AapaDataModule([], val=kit.make_records(4)), ckpt_path=ckpt, verbose=False)
        seen.append(figures["val/expert_logprob"])
    torch.testing.assert_close(module.model.state_dict(), trained.model.state_dict(), rtol=0, atol=0)
    assert seen[0] != seen[1]
