"""The commands beside training: data, bank, export, doctor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aapa_lightning.cli import main


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "world"
    assert main(["data", "synthetic", "--out", str(folder), "--train", "30", "--val", "5", "--test", "5", "--vocab-size", "300"]) == 0
    return folder


def test_the_world_passes_its_own_check(world, capsys):
    assert main(["data", "check", str(world / "train.jsonl"), "--tokenizer", str(world / "tokenizer"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["valid"], report["with_experts"]) == (30, 30, 30)
    assert report["prompt_lengths"]["unit"] == "tokens"


def test_a_malformed_record_is_named_with_its_line(tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "ok", "expert": "fine"}\n{"expert": "no prompt"}\n')
    assert main(["data", "check", str(path)]) == 2
    assert f"{path}:2" in capsys.readouterr().out


def test_a_tokenizer_is_trained_on_records(world, tmp_path):
    from transformers import AutoTokenizer

    assert main(["data", "tokenizer", str(world / "train.jsonl"), "--vocab-size", "280", "--out", str(tmp_path / "tok")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert 259 < len(tokenizer) <= 280
    assert tokenizer.decode(tokenizer("Describe the harbor.")["input_ids"]) == "Describe the harbor."


def test_export_refuses_what_is_not_there_and_what_is(tmp_path, capsys):
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "new")]) == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "full")]) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_bank_needs_a_discriminator(world, tmp_path, capsys):
    words = ["bank", "build", "--data", str(world / "train.jsonl"), "--discriminator", str(tmp_path), "--out", str(tmp_path / "bank")]
    assert main(words) == 2
    assert "DiscriminatorModule" in capsys.readouterr().err


def test_doctor_reports_and_tests_itself(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["self_test"].values()) == {"ok"}
    assert {"sentence_pool", "anchor_advantage"} <= set(report["kernels"])
    assert report["packages"]["torch"]
    assert report["devices"][0].startswith("cpu")
    assert main(["doctor"]) == 0
    assert "self-test: policy_loss: ok" in capsys.readouterr().out


def test_doctor_fails_when_a_self_test_does(monkeypatch, capsys):
    def broken():
        raise RuntimeError("wrong numbers")

    monkeypatch.setattr("aapa_lightning.commands.doctor._test_loss", broken)
    assert main(["doctor"]) == 1
    assert "self-test: policy_loss: RuntimeError: wrong numbers" in capsys.readouterr().out
