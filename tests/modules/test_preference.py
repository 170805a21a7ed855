"""PreferenceModule: every objective trains, divides by the right counts, and leaves out what does not fit."""

from dataclasses import replace

import pytest

from aapa_lightning.objectives.preference import PREFERENCES
from aapa_lightning.types import Record

#: Options under which a few steps at a high rate tell two words apart.
EAGER = {"dpo": {"beta": 1.0}, "ipo": {"beta": 0.1}, "rpo": {"beta": 1.0}, "kto": {"beta": 1.0}, "sympo": {"beta": 1.0}}


@pytest.mark.parametrize("name", PREFERENCES)
def test_every_objective_learns_a_separable_task(kit, spec, name):
    _, rows = kit.run_preference(spec, 12, kit.separable(), objective=name, options=EAGER.get(name), lr_scheduler=None)
    assert rows[-1]["train/preference/accuracy"] == 1.0
    assert all(row["train/skipped_steps"] == 0 for row in rows)
    assert {"train/preference/margin", "train/preference/weight", "train/losses/preference"} <= rows[0].keys()
    if name != "kto":
        gaps = [row["train/preference/chosen_logprob"] - row["train/preference/rejected_logprob"] for row in rows]
        assert gaps[-1] > gaps[0] + 0.5
    if PREFERENCES[name].sft_weight:
        assert rows[-1]["train/preference/chosen_logprob"] > rows[0]["train/preference/chosen_logprob"]
        assert rows[-1]["train/sft/nll"] < rows[0]["train/sft/nll"]


def test_the_chosen_responses_likelihood_is_a_mean_over_the_steps_tokens(kit, spec):
    records = kit.make_records()
    for accumulate in (1, 3):
        _, rows = kit.run_preference(
            spec, 1, records, objective="simpo", sft_weight=0.5, batch_size=12, sgd=True, trainer={"accumulate": accumulate}
        )
        start = kit.make_module("preference", spec)
        start.configure_model()
        total = sum(kit.response_sum(start.model, start, record, record.chosen) for record in records)
        tokens = sum(sum(start.encode(record).chosen.response_mask) for record in records)
        assert rows[0]["train/losses/sft"] == pytest.approx(-total / tokens, rel=1e-5)
        assert rows[0]["train/loss"] == pytest.approx(rows[0]["train/losses/preference"] + 0.5 * rows[0]["train/losses/sft"], rel=1e-5)


def test_an_imitation_weight_of_zero_leaves_the_term_out(kit, spec):
    _, rows = kit.run_preference(spec, 1, objective="orpo", sft_weight=0.0)
    assert "train/losses/sft" not in rows[0]
    _, rows = kit.run_preference(spec, 1, objective="orpo")
    assert "train/losses/sft" in rows[0]


def test_an_empty_rejected_response_is_its_end_alone(kit, spec):
    data = [Record(f"Describe {i}.", chosen="The boats rest.", rejected="", source=f"data.jsonl:{i + 1}") for i in range(4)]
    module, rows = kit.run_preference(spec, 2, data, objective="simpo")
    assert sum(module.encode(data[0]).rejected.response_mask) == 1
    assert rows[-1]["train/skipped_steps"] == 0


def test_pairs_over_the_limits_are_left_out(kit, spec, caplog):
    data = [*kit.separable(8), Record("Describe.", chosen="calm", rejected="storm " * 40, source="data.jsonl:9")]
    module, _ = kit.run_preference(
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
        module, _ = kit.run_preference(spec, 1, data, prompt_format=PromptFormat(assistant_turns=which))
        masks.append(module.encode(data[0]).chosen.response_mask)
    assert masks[0] == masks[1]


@pytest.mark.parametrize("paired", [True, False])
def test_labels_need_no_counterpart(kit, spec, paired):
    """KTO: three desirable responses and nine that are not, or both to each prompt."""
    data = (
        kit.separable(12)
        if paired
        else [replace(record, **({"rejected": None} if i % 4 == 0 else {"chosen": None})) for i, record in enumerate(kit.separable(12))]
    )
    _, rows = kit.run_preference(spec, 12, data, objective="kto", options={"beta": 1.0}, lr_scheduler=None, trainer={"accumulate": 2})
    shares = [row["train/preference/desirable"] for row in rows]
    assert sum(shares[:3]) / 3 == pytest.approx(0.5 if paired else 0.25)
    assert rows[-1]["train/preference/accuracy"] == 1.0


@pytest.mark.parametrize("sft_weight", [0.0, 0.3])
def test_a_micro_step_of_undesirable_responses_alone(kit, spec, sft_weight):
    data = [replace(record, **({"rejected": None} if i == 0 else {"chosen": None})) for i, record in enumerate(kit.separable(8))]
    _, rows = kit.run_preference(spec, 4, data, objective="kto", sft_weight=sft_weight, trainer={"accumulate": 2})
    assert all(row["train/skipped_steps"] == 0 for row in rows)
    assert min(row["train/preference/desirable"] for row in rows) == 0.0


def test_kto_divides_by_responses_not_by_records(kit, spec):
    """At the start every loss is 1 - sigma(0), however many responses the records of a step have."""
    for data in (
        kit.separable(4),
        [replace(record, rejected=None) if i else record for i, record in enumerate(kit.separable(4))],
    ):
        for accumulate in (1, 2):
            _, rows = kit.run_preference(spec, 1, data, objective="kto", trainer={"accumulate": accumulate})
            assert rows[0]["train/losses/preference"] == pytest.approx(0.5, abs=1e-5)
