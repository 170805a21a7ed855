"""The promises under adapters: a reference without a copy, ratio 1, an anchor of weight 0, base weights that nothing moves."""

from dataclasses import replace

import pytest
import torch

from aapa_lightning.adapters import LoraSpec, adapter_names, base_state
from aapa_lightning.errors import ConfigError
from aapa_lightning.export import save_policy
from aapa_lightning.modules.preference import StressOptions
from aapa_lightning.policy import PolicySpec, load_policy


@pytest.fixture
def lora(spec):
    return replace(spec, lora=LoraSpec(r=4, modules_to_save=["norm"]))


def plain(spec):
    return load_policy(replace(spec, lora=None))[0].eval().requires_grad_(False)


def train(kit, spec, name, steps=3, *, frozen=None, callbacks=(), trainer=None, **options):
    """Train, with the reference that ``frozen`` makes where it is given; the module and its rows."""
    rows = kit.Rows()
    module = kit.make_module(name, spec, **options)
    if frozen is not None:
        module.frozen_copy = frozen
    kit.fit(module, kit.make_trainer(steps, logger=rows, callbacks=callbacks, **(trainer or {})))
    return module, rows.rows


@pytest.mark.parametrize("name", ["grpo", "uniapl"])
def test_the_reference_is_the_policy_without_adapters(kit, lora, same, differ, name):
    options = {"beta": 0.2, "reward_kl": 0.1, "updates_per_window": 2, "trainer": {"accumulate": 2}}
    module, rows = train(kit, lora, name, **options)
    assert module._reference == [module.model]
    copied, copied_rows = train(kit, lora, name, frozen=lambda: plain(lora), **options)
    same(kit.weights(module), kit.weights(copied))
    assert rows == copied_rows
    assert differ(kit.weights(module), kit.weights(train(kit, lora, name, **options | {"beta": 0.0})[0]))
    assert max(row["train/policy/kl"] for _, row in rows) > 0


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_preferences_ask_the_policy_without_adapters(kit, lora, spec, same, objective):
    shared, rows = train(kit, lora, "preference", objective=objective, trainer={"accumulate": 2})
    assert shared._reference.model is shared.model
    assert shared.model.training
    copied, copied_rows = train(kit, lora, "preference", objective=objective, reference=spec, trainer={"accumulate": 2})
    assert copied._reference.model is not copied.model
    same(kit.weights(shared), kit.weights(copied))
    assert rows == copied_rows


def test_a_cache_belongs_to_the_base_model(kit, lora, spec, same, tmp_path, monkeypatch):
    """A run without adapters fills it, one with adapters reads it, after a resume too."""
    options = {"objective": "dpo", "sgd": True, "reference_cache": str(tmp_path / "cache")}
    train(kit, spec, "preference", 1, **options)
    monkeypatch.setattr("aapa_lightning.loop.reference.response_sums", lambda *args: pytest.fail("the reference was asked"))
    cached, _ = train(kit, lora, "preference", callbacks=[kit.SaveAt(tmp_path)], **options)
    again = kit.make_module("preference", lora, **options)
    kit.fit(again, kit.make_trainer(3), ckpt=tmp_path / "step=2.ckpt")
    same(kit.weights(cached), kit.weights(again))
    monkeypatch.undo()
    kit.fit(again, kit.make_trainer(1), data=kit.separable())  # nothing was dropped, so other data is no trouble
    live, _ = train(kit, lora, "preference", objective="dpo", sgd=True)
    same(kit.weights(live), kit.weights(cached), atol=1e-5)
    save_policy(*load_policy(replace(spec, config={"rms_norm_eps": 1e-3})), tmp_path / "other")
    with pytest.raises(ConfigError, match="another model"):
        train(kit, replace(lora, model=str(tmp_path / "other")), "preference", **options)


def test_a_reference_of_ones_own_has_no_adapters_to_train(kit, lora):
    with pytest.raises(ConfigError, match=r"reference.lora: a reference is not trained"):
        kit.make_module("preference", lora, reference=lora)


@pytest.mark.parametrize("name", ["sft", "grpo", "preference"])
def test_an_anchor_of_weight_zero_changes_nothing(kit, lora, same, name):
    bare, rows = train(kit, lora, name, trainer={"accumulate": 2})
    off, anchored = train(kit, lora, name, trainer={"accumulate": 2}, callbacks=[kit.make_anchor(0.0)])
    same(kit.weights(bare), kit.weights(off))
    assert [{key: after[key] for key in before} for (_, before), (_, after) in zip(rows, anchored, strict=True)] == [row for _, row in rows]


@pytest.mark.parametrize(
    ("dtype", "trainer"), [("float32", {"accumulate": 2}), ("bfloat16", {}), ("bfloat16", {"precision": "bf16-mixed"})]
)
def test_one_update_per_window_has_ratio_one(kit, lora, dtype, trainer):
    spec = replace(lora, dtype=dtype, activation_checkpointing=True)
    _, rows = train(kit, spec, "grpo", 2, callbacks=[kit.make_anchor()], trainer=trainer, beta=0.1, reward_kl=0.1)
    assert [row["train/policy/ratio"] for _, row in rows] == [row["train/anchor/ratio"] for _, row in rows] == [1.0] * 2
    _, rows = train(kit, spec, "grpo", 3, trainer=trainer, updates_per_window=3)
    assert [row["train/policy/ratio"] == 1.0 for _, row in rows] == [True, False, False]


def test_dropout_leaves_the_ratio_of_a_single_update_alone(kit, lora):
    spec = replace(lora, disable_dropout=False, lora=replace(lora.lora, dropout=0.5))
    _, rows = train(kit, spec, "grpo", 2, callbacks=[kit.make_anchor()])
    assert [row["train/policy/ratio"] for _, row in rows] == [1.0] * 2
    _, rows = train(kit, spec, "grpo", 2, updates_per_window=2)
    assert rows[0][1]["train/policy/ratio"] == 1.0  # fresh adapters add nothing, dropped or not
    _, rows = train(kit, spec, "grpo", 4, updates_per_window=2)
    assert rows[2][1]["train/policy/ratio"] != 1.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_moves_adapters_and_nothing_else(kit, lora, dtype):
    spec = replace(lora, dtype=dtype)
    start = kit.make_module("grpo", spec)
    start.configure_model()
    module, _ = train(kit, spec, "grpo", 2)
    before, after = start.model.state_dict(), module.model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == adapter_names(module.model)
    torch.testing.assert_close(base_state(module.model), dict(plain(lora).to(getattr(torch, dtype)).state_dict()), rtol=0, atol=0)
    trained = [p for p in module.model.parameters() if p.requires_grad]
    (group,) = module.trainer.optimizers[0].param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in trained}
    assert {p.dtype for p in trained} == {torch.float32}


@pytest.mark.parametrize("layer", [0, 1])
def test_gapo_perturbs_adapters_and_puts_them_back(kit, lora, layer):
    module, rows = train(kit, lora, "preference", 3, objective="gapo", stress=StressOptions(rho=0.3, start_layer=layer))
    assert all(row["train/stress/changed_fraction"] > 0 for _, row in rows[1:])
    assert torch.equal(base_state(module.model)["model.layers.0.mlp.up_proj.weight"], plain(lora).model.layers[0].mlp.up_proj.weight)


def test_a_start_from_random_weights(kit, tiny_config, tiny_tokenizer, tmp_path, same):
    tiny_tokenizer.save_pretrained(tmp_path)
    spec = PolicySpec(config=tiny_config, tokenizer=str(tmp_path), seed=3, lora=LoraSpec(r=2))
    runs = [train(kit, spec, "grpo", 2, callbacks=[kit.SaveAt(tmp_path)])[0] for _ in range(2)]
    same(kit.weights(runs[0]), kit.weights(runs[1]))
    with pytest.raises(ConfigError, match=r"trained on random weights of seed 3 \(.* base model here is random weights of seed 4"):
        kit.fit(kit.make_module("grpo", replace(spec, seed=4)), kit.make_trainer(3), ckpt=tmp_path / "step=1.ckpt")


@pytest.mark.parametrize("packing", [False, True])
def test_a_reference_reads_prompts_and_rows_as_the_policy_does(kit, spec, same, monkeypatch, packing):
    """Prompts read once for their group, packed rows, a head with adapters: to the bit as with a copied reference."""
    lora = replace(spec, packing=packing, lora=LoraSpec(r=4, target_modules=["q_proj", "up_proj", "lm_head"]))
    options = {"beta": 0.1, "reward_kl": 0.1, "updates_per_window": 2}
    monkeypatch.setattr("aapa_lightning.logprobs.prefix.LEAST_SAVED", 1)
    shared, rows = train(kit, lora, "grpo", **options)
    copied, copied_rows = train(kit, lora, "grpo", frozen=lambda: plain(lora), **options)
    same(kit.weights(shared), kit.weights(copied))
    assert rows == copied_rows
