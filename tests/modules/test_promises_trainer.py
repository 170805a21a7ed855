"""Promise 8 of the loop: the Trainer's own features work, and what cannot work is refused before the first step."""

from collections import Counter

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader

from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Record

NAMES = ["sft", "grpo", "chord", "uniapl", "preference"]


def _prompts(module, start=0):
    return [prompt for prompt, _ in module.rewards.rewards[0].seen][start::3]


@pytest.mark.parametrize("name", NAMES)
def test_validation_in_between_changes_nothing(kit, spec, same, name):
    def run(val, **options):
        module = kit.make_module(name, spec, eval_samples=2)
        kit.fit(module, kit.make_trainer(4, accumulate=2, **options), val=val, data=kit.make_records(16))
        return kit.weights(module)

    bare = run(None)
    same(bare, run(kit.make_records(5), val_check_interval=3, num_sanity_val_steps=2))
    same(bare, run(kit.make_records(5), val_check_interval=1, limit_val_batches=1))


@pytest.mark.parametrize("name", NAMES)
def test_epochs_and_limits_change_nothing(kit, spec, same, name):
    def run(**options):
        module = kit.make_module(name, spec, **({} if name in ("sft", "preference") else {"updates_per_window": 2}))
        kit.fit(module, kit.make_trainer(6, accumulate=2, **options))
        return kit.weights(module)

    whole = run()
    for limit in (2, 4, 8, 0.34):
        same(whole, run(limit_train_batches=limit))


def test_epochs_cover_the_data(kit, spec):
    module = kit.make_module("grpo", spec)
    trainer = kit.make_trainer(max_epochs=3, accumulate=2)
    kit.fit(module, trainer)
    assert (trainer.global_step, trainer.current_epoch) == (9, 3)
    prompts = _prompts(module)
    for epoch in range(3):
        assert sorted(prompts[12 * epoch : 12 * (epoch + 1)]) == sorted(str(record.prompt) for record in kit.make_records())
    assert prompts[:12] != prompts[12:24]


@pytest.mark.parametrize("name", NAMES)
def test_limited_epochs_have_their_length(kit, spec, name):
    """Epochs of four micro-steps out of six: each has two optimiser steps and ends with a validation."""
    rows = kit.Rows()
    trainer = kit.make_trainer(max_epochs=3, accumulate=2, limit_train_batches=4, logger=rows)
    kit.fit(kit.make_module(name, spec, eval_samples=0), trainer, val=kit.make_records(2))
    assert (trainer.global_step, trainer.current_epoch) == (6, 3)
    assert [step for step, row in rows.rows if "val/expert_logprob" in row] == [1, 3, 5]


def test_a_remainder_is_not_lost(kit, spec):
    """Ten prompts in windows of four: after five windows every prompt was seen twice."""
    module = kit.make_module("grpo", spec)
    kit.fit(module, kit.make_trainer(5), data=kit.make_records(10))
    assert set(Counter(_prompts(module)).values()) == {2}


def test_fewer_prompts_than_a_window(kit, spec):
    module = kit.make_module("chord", spec)
    kit.fit(module, kit.make_trainer(3), data=kit.make_records(3))
    assert set(Counter(_prompts(module)).values()) == {4}


@pytest.mark.parametrize("name", NAMES)
def test_clipping_and_precision(kit, spec, differ, name):
    def run(**options):
        rows = kit.Rows()
        module = kit.make_module(name, spec, sgd=True)
        kit.fit(module, kit.make_trainer(2, accumulate=2, logger=rows, **options))
        return kit.weights(module), rows.rows[0][1]

    plain, row = run()
    clipped, clipped_row = run(gradient_clip_val=1e-3)
    assert row["train/grad_norm"] == clipped_row["train/grad_norm"] > 1e-2
    module = kit.make_module(name, spec)
    module.configure_model()
    start = module.model.state_dict()
    step = torch.cat([(clipped[key] - start[key]).flatten() for key in start if key != "lm_head.weight"]).norm()
    assert 0 < float(step) <= 2 * 0.5 * 1e-3 * 1.01
    mixed, mixed_row = run(precision="bf16-mixed")
    assert differ(plain, mixed)
    assert all(value.dtype == torch.float32 for value in mixed.values())
    assert mixed_row["train/loss"] == pytest.approx(row["train/loss"], rel=0.05, abs=0.05)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fast", [True, 3])
def test_fast_dev_run(kit, spec, name, fast):
    trainer = kit.make_trainer(callbacks=[kit.make_anchor()], accumulate=2, fast_dev_run=fast)
    module = kit.fit(kit.make_module(name, spec), trainer, val=kit.make_records(3))
    assert trainer.global_step == (1 if fast is True else 2)
    assert module.window is not None


def test_a_module_can_be_fitted_again(kit, spec, same):
    """A second fit starts with rollouts of its own, not with those left over from the first."""
    module = kit.make_module("grpo", spec, updates_per_window=2)
    kit.fit(module, kit.make_trainer(1))
    between = kit.weights(module)
    kit.fit(module, kit.make_trainer(1))
    fresh = kit.make_module("grpo", spec, updates_per_window=2)
    fresh.configure_model()
    fresh.model.load_state_dict(between)
    kit.fit(fresh, kit.make_trainer(1))
    same(kit.weights(module), kit.weights(fresh))


def _refused(kit, spec, name, match, *, error=ConfigError, data=None, trainer=None, anchor=None, **options):
    callbacks = [kit.make_anchor(**anchor)] if anchor is not None else []
    trainer = dict(trainer or {})
    callbacks += trainer.pop("callbacks", [])
    with pytest.raises(error, match=match):
        kit.fit(kit.make_module(name, spec, **options), kit.make_trainer(2, callbacks=callbacks, **trainer), data=data)


@pytest.mark.parametrize("name", NAMES)
def test_refusals_of_every_module(kit, spec, name):
    scheduler = {"callbacks": [GradientAccumulationScheduler({0: 1, 4: 2})]}
    _refused(kit, spec, name, "GradientAccumulationScheduler", trainer=scheduler)
    uneven = {"accumulate": 2, "limit_train_batches": 3}
    _refused(kit, spec, name, "limit_train_batches=3 does not divide by accumulate_grad_batches=2", trainer=uneven)
    rare = {"val_check_interval": 1000}
    _refused(kit, spec, name, "val_check_interval=1000 micro-steps is more than the", trainer=rare)
    share = {"accumulate": 2, "limit_train_batches": 0.6}
    _refused(kit, spec, name, "limit_train_batches=0.6 .* it leaves 3 micro-steps", trainer=share)
    _refused(kit, spec, name, "=4 does not divide by", trainer={"accumulate": 3})
    _refused(kit, spec, name, "sentence", anchor={"granularity": "sentence", "combine": "reward"})
    _refused(kit, spec, name, "empty dataset", error=DataError, data=[])


@pytest.mark.parametrize("name", ["sft", "chord", "uniapl"])
def test_missing_experts_name_the_line(kit, spec, name):
    data = [*kit.make_records(5), Record("Describe the harbor", source="train.jsonl:6")]
    _refused(kit, spec, name, r"train\.jsonl:6", error=DataError, data=data)


@pytest.mark.parametrize("name", ["grpo", "chord"])
def test_refusals_of_groups_and_rewards(kit, spec, name):
    _refused(kit, spec, name, "expected group_size >= 2, found 1", group_size=1)
    _refused(kit, spec, name, "expected at least one reward", rewards=None)
    _refused(kit, spec, name, "minibatches x devices", minibatches=3)
    _refused(kit, spec, name, "sequence", ratio_level="sequence", anchor={"granularity": "sentence"})


def test_anchored_sft_refusals(kit, spec):
    _refused(kit, spec, "sft", "group", anchor={}, anchor_group_size=1)
    _refused(kit, spec, "sft", "combine=reward", anchor={"combine": "reward"})


def test_a_plain_dataloader_is_refused(kit, spec):
    module = kit.make_module("grpo", spec)
    with pytest.raises(ConfigError, match="train_loader"):
        kit.make_trainer(2).fit(module, DataLoader(["a", "b"]))


def test_a_figure_that_a_step_has_none_of_is_not_repeated(kit, spec, monkeypatch):
    rows = kit.Rows()
    module = kit.make_module("grpo", spec)
    always = module.step_metrics
    monkeypatch.setattr(module, "step_metrics", lambda: always() | ({"now_and_then": 1.0} if module.global_step in (1, 3) else {}))
    kit.fit(module, kit.make_trainer(5, logger=rows))
    assert [step for step, row in rows.rows if "train/loss" in row] == [0, 1, 2, 3, 4]
    assert [step for step, row in rows.rows if "train/now_and_then" in row] == [1, 3]
