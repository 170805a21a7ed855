"""PreferenceModule: every objective trains, divides by the right counts, and keeps its reference as it was."""

from dataclasses import replace

import pytest
import torch

from aapa_lightning.data.datamodule import AapaDataModule
from aapa_lightning.logprobs import sequence_logprobs
from aapa_lightning.objectives.preference import PREFERENCES
from aapa_lightning.policy import PolicySpec
from aapa_lightning.types import Record

#: Options under which a few steps at a high rate tell two words apart.
EAGER = {"dpo": {"beta": 1.0}, "ipo": {"beta": 0.1}, "rpo": {"beta": 1.0}, "kto": {"beta": 1.0}, "sympo": {"beta": 1.0}}


def separable(count=8):
    """One word is better than another to every prompt."""
    words = ("calm sea.", "a storm!")
    return [Record(f"Describe the harbor {i}.", chosen=words[0], rejected=words[1], source=f"data.jsonl:{i + 1}") for i in range(count)]


def run(kit, spec, steps, data=None, callbacks=(), trainer=None, **options):
    rows = kit.Rows()
    module = kit.make_module("preference", spec, **options)
    kit.fit(module, kit.make_trainer(steps, callbacks=callbacks, logger=rows, **(trainer or {})), data=data)
    return module, [row for _, row in rows.rows]


@pytest.mark.parametrize("name", PREFERENCES)
def test_every_objective_learns_a_separable_task(kit, spec, name):
    _, rows = run(kit, spec, 12, separable(), objective=name, options=EAGER.get(name), lr_scheduler=None)
    assert rows[-1]["train/preference/accuracy"] == 1.0
    assert all(row["train/skipped_steps"] == 0 for row in rows)
    assert {"train/preference/margin", "train/preference/weight", "train/loss/preference"} <= rows[0].keys()
    if name != "kto":
        gaps = [row["train/preference/chosen_logprob"] - row["train/preference/rejected_logprob"] for row in rows]
        assert gaps[-1] > gaps[0] + 0.5
    if PREFERENCES[name].sft_weight:
        assert rows[-1]["train/preference/chosen_logprob"] > rows[0]["train/preference/chosen_logprob"]
        assert rows[-1]["train/sft/nll"] < rows[0]["train/sft/nll"]


def test_the_first_step_starts_at_the_reference(kit, spec):
    _, rows = run(kit, spec, 1, objective="dpo")
    assert rows[0]["train/preference/margin"] == pytest.approx(0.0, abs=1e-4)
    assert rows[0]["train/loss/preference"] == pytest.approx(0.6931, abs=1e-4)


def test_the_reference_stays_as_it_was_and_out_of_checkpoints(kit, spec, same, differ, tmp_path):
    module, _ = run(kit, spec, 3, objective="dpo", callbacks=[kit.SaveAt(tmp_path)])
    fresh = kit.make_module("preference", spec)
    fresh.configure_model()
    same(module._reference.model.state_dict(), fresh.model.state_dict())
    assert differ(kit.weights(module), kit.weights(fresh))
    assert not any(p.requires_grad or p.grad is not None for p in module._reference.model.parameters())
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {f"model.{name}" for name in module.model.state_dict()}


def _save_moved(spec, folder):
    """Another policy of the same family."""
    from aapa_lightning.policy import load_policy, save_policy

    model, tokenizer = load_policy(spec)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    save_policy(model, tokenizer, folder)
    return PolicySpec(str(folder))


def _sum(model, module, record, text):
    row = module.encode(replace(record, chosen=text, rejected=None)).chosen
    ids, learned = torch.tensor([row.input_ids]), torch.tensor([row.response_mask])
    with torch.no_grad():
        return float(sequence_logprobs(model, ids, torch.ones_like(learned), learned).sum())


def test_a_reference_of_ones_own_choice(kit, spec, tmp_path):
    other = _save_moved(spec, tmp_path)
    module, rows = run(kit, spec, 1, objective="dpo", reference=other, batch_size=12, options={"beta": 0.5})
    start = kit.make_module("preference", spec)
    start.configure_model()
    margins = [
        _sum(start.model, start, record, record.chosen)
        - _sum(start.model, start, record, record.rejected)
        - _sum(module._reference.model, start, record, record.chosen)
        + _sum(module._reference.model, start, record, record.rejected)
        for record in kit.make_records()
    ]
    assert max(map(abs, margins)) > 0.1
    assert rows[0]["train/preference/margin"] == pytest.approx(sum(margins) / 12, abs=1e-3)
    expected = -torch.nn.functional.logsigmoid(0.5 * torch.tensor(margins)).mean()
    assert rows[0]["train/loss/preference"] == pytest.approx(float(expected), abs=1e-4)


def test_the_chosen_responses_likelihood_is_a_mean_over_the_steps_tokens(kit, spec):
    records = kit.make_records()
    for accumulate in (1, 3):
        _, rows = run(kit, spec, 1, records, objective="simpo", sft_weight=0.5, batch_size=12, sgd=True, trainer={"accumulate": accumulate})
        start = kit.make_module("preference", spec)
        start.configure_model()
        total = sum(_sum(start.model, start, record, record.chosen) for record in records)
        tokens = sum(sum(start.encode(record).chosen.response_mask) for record in records)
        assert rows[0]["train/loss/sft"] == pytest.approx(-total / tokens, rel=1e-5)
        assert rows[0]["train/loss"] == pytest.approx(rows[0]["train/loss/preference"] + 0.5 * rows[0]["train/loss/sft"], rel=1e-5)


def test_an_imitation_weight_of_zero_leaves_the_term_out(kit, spec):
    _, rows = run(kit, spec, 1, objective="orpo", sft_weight=0.0)
    assert "train/loss/sft" not in rows[0]
    _, rows = run(kit, spec, 1, objective="orpo")
    assert "train/loss/sft" in rows[0]


def test_an_empty_rejected_response_is_its_end_alone(kit, spec):
    data = [Record(f"Describe {i}.", chosen="The boats rest.", rejected="", source=f"data.jsonl:{i + 1}") for i in range(4)]
    module, rows = run(kit, spec, 2, data, objective="simpo")
    assert sum(module.encode(data[0]).rejected.response_mask) == 1
    assert rows[-1]["train/skipped_steps"] == 0


def test_pairs_over_the_limits_are_left_out(kit, spec, caplog):
    data = [*separable(8), Record("Describe.", chosen="calm", rejected="storm " * 40, source="data.jsonl:9")]
    module, _ = run(
        kit,
        spec,
        3,
        data,
        prompt_format=replace(kit.make_module("preference", spec).prompt_format, max_response_tokens=40, overlong="drop"),
    )
    assert "1 of 9 records are over the length limits" in caplog.text
    assert module.trainer.global_step == 3


def test_earlier_assistant_turns_are_no_part_of_a_response(kit, spec):
    from aapa_lightning.data.prompt_format import PromptFormat

    turns = (
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day"},
        {"role": "user", "content": "Describe the sea"},
    )
    data = [Record(turns, chosen="calm", rejected="storm", source=f"data.jsonl:{i + 1}") for i in range(4)]
    masks = []
    for which in ("last", "all"):
        module, _ = run(kit, spec, 1, data, prompt_format=PromptFormat(assistant_turns=which))
        masks.append(module.encode(data[0]).chosen.response_mask)
    assert masks[0] == masks[1]


@pytest.mark.parametrize("paired", [True, False])
def test_labels_need_no_counterpart(kit, spec, paired):
    """KTO: three desirable responses and nine that are not, or both to each prompt."""
    data = (
        separable(12)
        if paired
        else [replace(record, **({"rejected": None} if i % 4 == 0 else {"chosen": None})) for i, record in enumerate(separable(12))]
    )
    _, rows = run(kit, spec, 12, data, objective="kto", options={"beta": 1.0}, lr_scheduler=None, trainer={"accumulate": 2})
    shares = [row["train/preference/desirable"] for row in rows]
    assert sum(shares[:3]) / 3 == pytest.approx(0.5 if paired else 0.25)
    assert rows[-1]["train/preference/accuracy"] == 1.0


@pytest.mark.parametrize("sft_weight", [0.0, 0.3])
def test_a_micro_step_of_undesirable_responses_alone(kit, spec, sft_weight):
    data = [replace(record, **({"rejected": None} if i == 0 else {"chosen": None})) for i, record in enumerate(separable(8))]
    _, rows = run(kit, spec, 4, data, objective="kto", sft_weight=sft_weight, trainer={"accumulate": 2})
    assert all(row["train/skipped_steps"] == 0 for row in rows)
    assert min(row["train/preference/desirable"] for row in rows) == 0.0


def test_the_cache_gives_the_run_of_the_live_reference(kit, spec, same, tmp_path):
    live, _ = run(kit, spec, 4, objective="dpo", sgd=True)
    cached, _ = run(kit, spec, 4, objective="dpo", sgd=True, reference_cache=str(tmp_path))
    same(kit.weights(live), kit.weights(cached), atol=1e-5)
    assert cached._reference.model is None
    again, _ = run(kit, spec, 4, objective="dpo", sgd=True, reference_cache=str(tmp_path))
    same(kit.weights(cached), kit.weights(again))


def test_a_run_that_has_its_cache_asks_no_reference(kit, spec, tmp_path, monkeypatch):
    run(kit, spec, 1, objective="ipo", reference_cache=str(tmp_path))
    monkeypatch.setattr("aapa_lightning.loop.reference.response_sums", lambda *args: pytest.fail("the reference was asked"))
    module, _ = run(kit, spec, 2, objective="hypo", reference_cache=str(tmp_path))
    assert module._reference.model is None


def test_the_cache_in_the_precision_of_training(kit, spec, tmp_path):
    """Policy and reference round alike, so the first margins are zero to what padding changes."""
    _, rows = run(kit, spec, 1, objective="dpo", reference_cache=str(tmp_path / "a"), trainer={"precision": "bf16-mixed"})
    _, live = run(kit, spec, 1, objective="dpo", trainer={"precision": "bf16-mixed"})
    assert rows[0]["train/preference/margin"] == pytest.approx(live[0]["train/preference/margin"], abs=0.02)


def test_evaluation_needs_no_reference(kit, spec, tmp_path):
    module = kit.make_module("preference", spec, reference_cache=str(tmp_path), eval_samples=0)
    (figures,) = kit.make_trainer(1).validate(module, AapaDataModule(kit.make_records(), val=kit.make_records(5)), verbose=False)
    assert {"val/pair_accuracy", "val/chosen_logprob", "val/rejected_logprob"} <= figures.keys()
    assert module._reference is None
    assert not list(tmp_path.iterdir())


def test_a_second_fit(kit, spec, tmp_path):
    """The reference is still the start of the first one; a cache whose copy has gone refuses other data."""
    from aapa_lightning.errors import ConfigError

    for cache in (None, str(tmp_path)):
        module, _ = run(kit, spec, 2, objective="dpo", reference_cache=cache)
        rows = kit.Rows()
        kit.fit(module, kit.make_trainer(1, logger=rows))
        assert abs(rows.rows[0][1]["train/preference/margin"]) > 1e-2
    with pytest.raises(ConfigError, match="build the module anew for other data"):
        kit.fit(module, kit.make_trainer(1), data=separable())
