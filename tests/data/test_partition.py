"""Datasets divided by prompt, and rows that are read back as they were."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace

import pytest

from aapa_lightning.data.partition import require_disjoint, split_by_prompt
from aapa_lightning.data.records import parse_record, prompt_hash, split_records
from aapa_lightning.data.responses import parse_response
from aapa_lightning.data.rows import answer_row, record_row, write_rows
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Record

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello."}
RECORDS = [Record(f"p{i % 50}", key=str(i), source=f"d:{i}") for i in range(100)] + [
    Record(({"role": "user", "content": "p0"},), key="chat")
]


def prompts(records):
    return {prompt_hash(record.prompt) for record in records}


def test_parts_share_no_prompt_and_lose_none():
    parts = split_by_prompt(RECORDS, {"rm": 0.5, "policy": 0.3, "rest": 0.2}, seed=0)
    assert {name: len(prompts(part)) for name, part in parts.items()} == {"rm": 25, "policy": 15, "rest": 10}
    assert sorted(record.key for part in parts.values() for record in part) == sorted(record.key for record in RECORDS)
    require_disjoint(parts["rm"], parts["policy"])
    again = split_by_prompt(RECORDS[::-1], {"rm": 0.5, "policy": 0.3, "rest": 0.2}, seed=0)
    assert {name: prompts(part) for name, part in again.items()} == {name: prompts(part) for name, part in parts.items()}
    assert prompts(split_by_prompt(RECORDS, {"rm": 0.5, "policy": 0.5}, seed=1)["rm"]) != prompts(parts["rm"])


def test_a_validation_split_of_a_part_is_drawn_anew():
    """With one seed for both, the validation prompts of the whole must not all lie in one part."""
    rm = prompts(split_by_prompt(RECORDS, {"rm": 0.5, "policy": 0.5}, seed=0)["rm"])
    val = prompts(split_records(RECORDS, 0.4, seed=0)[1])
    assert 0 < len(rm & val) < 20


@pytest.mark.parametrize("shares", [{}, {"a": 0.5}, {"a": 0.5, "b": 0.6}, {"a": 1.5, "b": -0.5}, {"a": float("nan"), "b": 1.0}])
def test_shares_that_do_not_divide(shares):
    with pytest.raises(ConfigError, match="parts: expected shares above 0 that are 1 together"):
        split_by_prompt(RECORDS, shares, 0)


def test_too_few_prompts():
    with pytest.raises(DataError, match="1 different prompts are too few: none is left for the part 'b'"):
        split_by_prompt([RECORDS[0], RECORDS[50]], {"a": 0.9, "b": 0.1}, 0)


def test_the_first_shared_prompt_is_named():
    with pytest.raises(DataError, match=r"e:2: its prompt is also that of d:0: 'p0'; .*aapa data split"):
        require_disjoint(RECORDS[:50], [Record("new", source="e:1"), Record((USER | {"content": "p0"},), source="e:2")])


@pytest.mark.parametrize(
    "row",
    [
        {"key": 7, "prompt": "p", "expert": ["a", "b"], "chosen": "a", "rejected": "", "topic": {"deep": [1, None]}},
        {"prompt": [{"role": "system", "content": ""}, USER, REPLY, USER], "chosen": "a", "rejected": "b"},
        {"prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"prompt": "p", "instructions": [], "instruction_id_list": ["a:b"], "kwargs": [{}]},
        {"prompt": "p", "ground_truth": '{"func_name": "validate_placeholders", "N": 2}', "chosen": "a"},
        {"prompt": "p", "ground_truth": "42", "instructions": [{"id": "a:b", "kwargs": {"n": 1}}]},
        {"prompt": "p", "completion": "a", "label": False, "kwargs": "odd"},
        {"prompt": "p", "expert": [], "completion": "a", "label": True},
        {"prompt": "p", "expert": ["e"], "messages": [USER, REPLY], "label": False},
        {"prompt": "p", "chosen": "a", "rejected": "b", "label": True},
        {"messages": [USER, REPLY], "chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": "No\u2028."}]},
    ],
)
def test_a_record_is_read_back(tmp_path, row):
    record = parse_record(row, "d:1")
    write_rows(tmp_path / "d.jsonl", [("d:1", record_row(record))])
    read = parse_record(json.loads((tmp_path / "d.jsonl").read_text(encoding="utf-8").removesuffix("\n")), "d:1")
    assert read == record


def test_a_response_is_read_back_with_the_key_and_prompt_of_its_record():
    response = parse_response({"key": 7, "response": "a", "sample": 2, "reward": 0.5}, "r:1")
    row = answer_row(Record((USER,), key="7"), response)
    read = parse_response(row, "r:1")
    assert read == replace(response, prompt_hash=prompt_hash("Hi"))
    assert answer_row(Record("Hi"), response) == {
        "prompt": "Hi",
        "response": "a",
        "temperature": None,
        "sample": 2,
        "truncated": False,
        "reward": 0.5,
    }


@pytest.mark.parametrize("value", [datetime.date(2026, 1, 1), b"bytes", "half \ud800"])
def test_a_column_that_json_cannot_hold_is_named(tmp_path, value):
    path = tmp_path / "d.jsonl"
    path.write_text("kept")
    with pytest.raises(DataError, match="d:2: a column cannot be written as JSON"):
        write_rows(path, [("d:1", {"prompt": "p"}), ("d:2", {"prompt": "p", "odd": value})])
    assert path.read_text() == "kept"
    assert [file.name for file in tmp_path.iterdir()] == ["d.jsonl"]
