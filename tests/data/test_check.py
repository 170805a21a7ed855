import json

import pytest

from aapa_lightning.data.check import check_dataset
from aapa_lightning.data.encode import PromptFormat
from aapa_lightning.errors import DataError


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


COMMA = {"id": "punctuation:no_comma", "kwargs": {}}


def test_counts_and_errors(tmp_path):
    path = write(
        tmp_path / "d.jsonl",
        [
            {"prompt": "abcd", "expert": ["xy", "xyz"], "instructions": [COMMA, COMMA]},
            "{",
            {"prompt": "abcd", "chosen": "a", "rejected": "b", "key": 1},
            {"prompt": ""},
            {"prompt": "ab", "instructions": [{"kwargs": {}}]},
        ],
    )
    report = check_dataset(path)
    assert (report.rows, report.valid, report.error_count) == (5, 2, 3)
    assert (report.with_experts, report.experts, report.with_pairs, report.duplicate_prompts) == (1, 2, 1, 1)
    assert report.instructions == {"punctuation:no_comma": 2}
    assert (report.prompt_lengths.minimum, report.prompt_lengths.maximum, report.prompt_lengths.unit) == (4, 4, "characters")
    assert (report.expert_lengths.median, report.expert_lengths.p95) == (2.5, 3)
    assert [error.split(": ")[0] for error in report.errors] == [f"{path}:2", f"{path}:4", f"{path}:5"]
    assert not report.ok
    assert json.loads(json.dumps(report.to_dict()))["error_count"] == 3
    text = "\n".join(report.lines())
    assert "5 rows, 2 valid, 3 errors" in text
    assert "instruction punctuation:no_comma: 2" in text


def test_lists_errors_up_to_a_limit(tmp_path):
    report = check_dataset(write(tmp_path / "d.jsonl", [{"prompt": ""}] * 5), limit=2)
    assert (report.error_count, len(report.errors)) == (5, 2)
    assert report.lines()[-1] == "... and 3 more errors"


def test_lengths_in_tokens_and_limits(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "d.jsonl", [{"prompt": "short", "expert": "ok"}, {"prompt": "z" * 60, "expert": "ok"}])
    report = check_dataset(path, tokenizer=tiny_tokenizer, fmt=PromptFormat(max_prompt_tokens=40))
    assert (report.valid, report.over_limit, report.error_count) == (1, 1, 1)
    assert report.prompt_lengths.unit == "tokens"
    assert report.prompt_lengths.maximum > 60
    assert report.expert_lengths.maximum == len(tiny_tokenizer("ok")["input_ids"]) + 1
    assert "d.jsonl:2: the prompt has" in report.errors[0]
    dropping = check_dataset(path, tokenizer=tiny_tokenizer, fmt=PromptFormat(max_prompt_tokens=40, overlong="drop"))
    assert dropping.ok
    assert dropping.over_limit == 1


def test_joined_experts(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": ""}])
    experts = write(tmp_path / "e.jsonl", [{"prompt": "a", "response": "yes"}])
    report = check_dataset(path, experts=experts)
    assert (report.with_experts, report.error_count) == (1, 1)
    other = write(tmp_path / "o.jsonl", [{"prompt": "z", "response": "yes"}])
    report = check_dataset(path, experts=other)
    assert (report.valid, report.error_count) == (2, 2)
    assert "no response matches a record" in report.errors[1]


def test_empty_and_missing(tmp_path):
    report = check_dataset(write(tmp_path / "d.jsonl", []))
    assert report.errors == [f"{tmp_path / 'd.jsonl'} is empty; expected at least one record"]
    assert not report.ok
    with pytest.raises(DataError, match="cannot read"):
        check_dataset(str(tmp_path / "missing.jsonl"))


def test_real_dataset(aapa_data):
    folder = aapa_data / "ifeval"
    report = check_dataset(str(folder / "prompts.jsonl"), experts=str(folder / "responses" / "gpt-4o.jsonl"))
    assert report.ok
    assert (report.rows, report.with_experts, len(report.instructions), sum(report.instructions.values())) == (541, 540, 25, 834)
