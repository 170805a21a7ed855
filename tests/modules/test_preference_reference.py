"""The reference of a preference objective: frozen, of one's own choice, or out of a cache."""

from dataclasses import replace

import pytest
import torch

from aapa_lightning.data.datamodule import AapaDataModule
from aapa_lightning.errors import ConfigError
from aapa_lightning.export import save_policy
from aapa_lightning.policy import PolicySpec, load_policy


def test_the_first_step_starts_at_the_reference(kit, spec):
    _, rows = kit.run_preference(spec, 1, objective="dpo")
    assert rows[0]["train/preference/margin"] == pytest.approx(0.0, abs=1e-4)
    assert rows[0]["train/losses/preference"] == pytest.approx(0.6931, abs=1e-4)


def test_the_reference_stays_as_it_was_and_out_of_checkpoints(kit, spec, same, differ, tmp_path):
    module, _ = kit.run_preference(spec, 3, objective="dpo", callbacks=[kit.SaveAt(tmp_path)])
    fresh = kit.make_module("preference", spec)
    fresh.configure_model()
    same(module._reference.model.state_dict(), fresh.model.state_dict())
    assert differ(kit.weights(module), kit.weights(fresh))
    assert not any(p.requires_grad or p.grad is not None for p in module._reference.model.parameters())
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {f"model.{name}" for name in module.model.state_dict()}


def _save_moved(spec, folder):
    """Another policy of the same family."""
    model, tokenizer = load_policy(spec)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    save_policy(model, tokenizer, folder)
    return PolicySpec(str(folder))


def test_a_reference_of_ones_own_choice(kit, spec, tmp_path):
    other = _save_moved(spec, tmp_path)
    module, rows = kit.run_preference(spec, 1, objective="dpo", reference=other, batch_size=12, options={"beta": 0.5})
    start = kit.make_module("preference", spec)
    start.configure_model()
    margins = [
        kit.response_sum(start.model, start, record, record.chosen)
        - kit.response_sum(start.model, start, record, record.rejected)
        - kit.response_sum(module._reference.model, start, record, record.chosen)
        + kit.response_sum(module._reference.model, start, record, record.rejected)
        for record in kit.make_records()
    ]
    assert max(map(abs, margins)) > 0.1
    assert rows[0]["train/preference/margin"] == pytest.approx(sum(margins) / 12, abs=1e-3)
    expected = -torch.nn.functional.logsigmoid(0.5 * torch.tensor(margins)).mean()
    assert rows[0]["train/losses/preference"] == pytest.approx(float(expected), abs=1e-4)


def test_the_cache_gives_the_run_of_the_live_reference(kit, spec, same, tmp_path):
    live, _ = kit.run_preference(spec, 4, objective="dpo", sgd=True)
    cached, _ = kit.run_preference(spec, 4, objective="dpo", sgd=True, reference_cache=str(tmp_path))
    same(kit.weights(live), kit.weights(cached), atol=1e-5)
    assert cached._reference.model is None
    again, _ = kit.run_preference(spec, 4, objective="dpo", sgd=True, reference_cache=str(tmp_path))
    same(kit.weights(cached), kit.weights(again))


def test_a_run_that_has_its_cache_asks_no_reference(kit, spec, tmp_path, monkeypatch):
    kit.run_preference(spec, 1, objective="ipo", reference_cache=str(tmp_path))
    monkeypatch.setattr("aapa_lightning.loop.reference.response_sums", lambda *args: pytest.fail("the reference was asked"))
    module, _ = kit.run_preference(spec, 2, objective="hypo", reference_cache=str(tmp_path))
    assert module._reference.model is None


def test_the_cache_in_the_precision_of_training(kit, spec, tmp_path):
    """Policy and reference round alike, so the first margins are zero to what padding changes."""
    _, rows = kit.run_preference(spec, 1, objective="dpo", reference_cache=str(tmp_path / "a"), trainer={"precision": "bf16-mixed"})
    _, live = kit.run_preference(spec, 1, objective="dpo", trainer={"precision": "bf16-mixed"})
    assert rows[0]["train/preference/margin"] == pytest.approx(live[0]["train/preference/margin"], abs=0.02)


def test_evaluation_needs_no_reference(kit, spec, tmp_path):
    module = kit.make_module("preference", spec, reference_cache=str(tmp_path), eval_samples=0)
    (figures,) = kit.make_trainer(1).validate(module, AapaDataModule(kit.make_records(), val=kit.make_records(5)), verbose=False)
    assert {"val/pair_accuracy", "val/chosen_logprob", "val/rejected_logprob"} <= figures.keys()
    assert module._reference is None
    assert not list(tmp_path.iterdir())


def test_a_second_fit(kit, spec, tmp_path):
    """The reference is still the start of the first one; a cache whose copy has gone refuses other data."""
    for cache in (None, str(tmp_path)):
        module, _ = kit.run_preference(spec, 2, objective="dpo", reference_cache=cache)
        rows = kit.Rows()
        kit.fit(module, kit.make_trainer(1, logger=rows))
        assert abs(rows.rows[0][1]["train/preference/margin"]) > 1e-2
    with pytest.raises(ConfigError, match="build the module anew for other data"):
        kit.fit(module, kit.make_trainer(1), data=kit.separable())


def test_a_fit_after_a_validation_of_a_checkpoint_has_the_reference_of_a_plain_resume(kit, spec, same, tmp_path):
    kit.run_preference(spec, 2, objective="dpo", callbacks=[kit.SaveAt(tmp_path)])
    found = []
    for validates in (False, True):
        module = kit.make_module("preference", spec, objective="dpo", eval_samples=0)
        trainer = kit.make_trainer(4)
        data = AapaDataModule(kit.make_records(), val=kit.make_records(3))
        if validates:
            trainer.validate(module, data, ckpt_path=tmp_path / "step=2.ckpt", verbose=False)
        trainer.fit(module, data, ckpt_path=tmp_path / "step=2.ckpt")
        found.append((module._reference.model.state_dict(), kit.weights(module)))
    same(found[0][0], found[1][0])
    same(found[0][1], found[1][1])


def test_a_cache_belongs_to_a_configuration_too(kit, spec, tmp_path):
    kit.run_preference(spec, 1, objective="dpo", reference_cache=str(tmp_path / "cache"))
    other = replace(spec, config={"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}})
    with pytest.raises(ConfigError, match="another model"):
        kit.run_preference(other, 1, objective="dpo", reference_cache=str(tmp_path / "cache"))
