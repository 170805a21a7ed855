"""Datasets with columns of other names, on the command line."""

from __future__ import annotations

import json

import pytest
import torch

from aapa_lightning.cli import main


class Judge:
    needs_experts = False
    whole_response = True

    def score(self, responses, records, spans):
        return torch.zeros(len(responses))

    def fingerprint(self):
        return "judge"

    def to(self, device):
        return self


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"question": "What is tau?", "answer": "A temperature."}, {"question": "And lambda?", "answer": None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_check_and_tokenizer_take_columns(questions, tmp_path, capsys):
    assert main(["data", "check", str(questions)]) == 2
    columns = ["--column", "prompt=question", "--column", "expert=answer"]
    assert main(["data", "check", str(questions), *columns]) == 0
    assert "2 rows, 2 valid" in capsys.readouterr().out
    assert main(["data", "tokenizer", str(questions), *columns, "--vocab-size", "280", "--out", str(tmp_path / "tokenizer")]) == 0


def test_a_column_without_a_name_is_refused(questions, capsys):
    assert main(["data", "check", str(questions), "--column", "prompt"]) == 2
    assert "expert=response, found 'prompt'" in capsys.readouterr().err


def test_a_bank_takes_columns_and_may_drop_records_without_an_expert(questions, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("aapa_lightning.anchor.load.load_discriminator", lambda *args, **kwargs: Judge())
    columns = ["--column", "prompt=question", "--column", "expert=answer"]
    words = ["bank", "build", "--data", str(questions), "--discriminator", "judge", "--out", str(tmp_path / "bank"), *columns]
    assert main(words) == 2
    assert "questions.jsonl:2: no expert response" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["questions.jsonl"]  # nothing half-built is left
    assert main([*words, "--missing-experts", "drop"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 records")
    assert "trained on these very experts" in out
