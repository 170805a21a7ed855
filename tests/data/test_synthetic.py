"""The synthetic world: what its expert writes succeeds, and its judges see what its reward does not."""

from __future__ import annotations

import json

import pytest

from aapa_lightning.data.synthetic import (
    ConstraintAccuracy,
    ConstraintReward,
    TrueSuccess,
    WellFormedness,
    generate_records,
    judge,
    split_of,
    split_sentences,
    write_world,
)
from aapa_lightning.data.world_grammar import TOPICS, derives
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Instruction, Record

HARBOR = Record(
    prompt='Describe the harbor in 2 sentences, using calmly, ending with "at dawn".',
    instructions=(
        Instruction("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 2}),
        Instruction("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 3}),
        Instruction("keywords:existence", {"keywords": ["calmly"]}),
        Instruction("startend:end_checker", {"end_phrase": "at dawn."}),
    ),
    extra={"topic": "harbor"},
)


def test_every_expert_response_is_a_true_success():
    for split in ("train", "val", "test"):
        for record in generate_records(400, 3, split):
            verdict = judge(record, record.experts[0])
            assert verdict.true_success, record
            assert (verdict.constraint_accuracy, verdict.well_formed) == (1.0, 1.0)


@pytest.mark.parametrize(
    "sentence",
    [
        "The gull calls.",
        "The gulls call.",
        "Every bright gull calls calmly beside the boats at dawn.",
        "Two sailors sway in winter.",
        "These old cranes creak loudly above the sail.",
    ],
)
def test_grammar_accepts(sentence):
    assert derives("harbor", sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "The gull call.",  # agreement
        "The gulls calls.",
        "Every gulls calls.",
        "Two gull call.",
        "The gull calls",  # no period
        "the gull calls.",  # no capital
        "The gull calmly calls.",  # order
        "The bright old gull calls.",
        "The gull calls calmly slowly.",
        "The gull calls at dawn calmly.",
        "The gull calls beside gulls.",
        "The owl hides.",  # off topic
        "The gull hides.",
        "The gull calls beside the owl.",
        "Calmly.",
        "The gull  calls.",
        "The gull calls. The gull calls.",
        "",
    ],
)
def test_grammar_rejects(sentence):
    assert not derives("harbor", sentence)


@pytest.mark.parametrize(
    ("response", "constraints", "well_formed", "success"),
    [
        ("The gull calls calmly. Two boats drift at dawn.", 1.0, 1.0, True),
        (" The gull calls calmly. Two boats drift at dawn.\n", 1.0, 1.0, True),
        ("Calmly calmly. At dawn.", 1.0, 0.0, False),  # the game: all constraints, no language
        ("The gull calls calmly. Two boat drift at dawn.", 1.0, 0.5, False),
        ("The owl hides calmly. Two owls hide at dawn.", 1.0, 0.0, False),  # another topic
        ("The gull calls calmly.Two boats drift at dawn.", 1.0, 1.0, False),  # no space between
        ("The gull calls. Two boats drift at dawn.", 0.75, 1.0, False),
        ("The gull calls calmly. Two boats drift.", 0.75, 1.0, False),
        ("The gull calls calmly. Two boats drift. The crane sways at dawn.", 0.75, 1.0, False),
        ("The gull calls calmly at dawn", 0.25 * 2, 0.0, False),
        ("", 0.25, 0.0, False),
        ("...", 0.25, 0.0, False),
    ],
)
def test_judge_by_hand(response, constraints, well_formed, success):
    verdict = judge(HARBOR, response)
    assert verdict.constraint_accuracy == pytest.approx(constraints)
    assert verdict.well_formed == pytest.approx(well_formed)
    assert verdict.true_success is success


def test_must_use_words_are_whole_words_in_any_case():
    assert judge(HARBOR, "CALMLY. X at dawn.").constraint_accuracy == 1.0
    assert judge(HARBOR, "Uncalmly. X at dawn.").constraint_accuracy < 1.0


def test_split_sentences():
    assert split_sentences("A b. C! D?? e") == ["A b.", "C!", "D??", "e"]
    assert split_sentences(" \n") == []


def test_reward_is_blind_where_the_judges_see():
    responses = ["Calmly. At dawn.", "The gull calls calmly. Two boats drift at dawn.", "The gull calls."]
    records = [HARBOR] * 3
    assert ConstraintReward()(responses, records) == [1.0, 1.0, 0.25]
    assert ConstraintAccuracy()(responses, records) == [1.0, 1.0, 0.25]
    assert WellFormedness()(responses, records) == [0.0, 1.0, 1.0]
    assert TrueSuccess()(responses, records) == [0.0, 1.0, 0.0]
    assert TrueSuccess()([], []) == []


def test_records_are_a_function_of_seed_and_split():
    assert generate_records(50, 1, "val") == generate_records(50, 1, "val")
    assert generate_records(50, 1, "val") != generate_records(50, 2, "val")
    assert generate_records(50, 1, "val")[:20] == generate_records(20, 1, "val")


def test_splits_are_disjoint_across_seeds():
    prompts = {split: {str(r.prompt) for seed in (0, 1) for r in generate_records(300, seed, split)} for split in ("train", "val", "test")}
    assert not prompts["train"] & prompts["val"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["val"] & prompts["test"]
    assert all(split_of(prompt) == split for split, group in prompts.items() for prompt in group)
    records = generate_records(300, 0, "train")
    assert len({record.prompt for record in records}) == 300
    assert {record.extra["topic"] for record in records} == set(TOPICS)


def test_topics_share_no_word():
    words = [word for nouns, verbs in TOPICS.values() for word in nouns + verbs]
    assert len(words) == len(set(words))


def test_errors_name_the_mistake():
    with pytest.raises(ConfigError, match="split among train, val, test, found 'dev'"):
        generate_records(1, 0, "dev")
    with pytest.raises(ConfigError, match=r"Expected at most \d+ prompts in the val split, found a request for 1000000"):
        generate_records(1_000_000, 0, "val")
    with pytest.raises(DataError, match="synthetic world"):
        judge(Record(prompt="x", source="a.jsonl:3"), "y")
    unknown = Record(prompt="x", instructions=(Instruction("keywords:frequency", {}),), extra={"topic": "harbor"}, source="a.jsonl:3")
    with pytest.raises(DataError, match=r"a.jsonl:3.*keywords:frequency"):
        judge(unknown, "y")


def test_write_world(tmp_path):
    from transformers import AutoTokenizer

    write_world(tmp_path, train=200, val=20, test=20, seed=5, vocab_size=500)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    expected = generate_records(20, 5, "test")
    assert [row["prompt"] for row in rows] == [record.prompt for record in expected]
    assert [row["expert"] for row in rows] == [list(record.experts) for record in expected]
    assert [row["topic"] for row in rows] == [record.extra["topic"] for record in expected]
    assert rows[0]["instructions"] == [{"id": i.id, "kwargs": dict(i.kwargs)} for i in expected[0].instructions]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) <= 500
    assert tokenizer.chat_template is None
    text = str(rows[0]["prompt"]) + rows[0]["expert"][0]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
