"""``aapa bank``: shards, joining, resuming, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from aapa_lightning.anchor.bank import ExpertBank
from aapa_lightning.anchor.base import Discriminator
from aapa_lightning.cli import main
from aapa_lightning.types import Record


class LengthJudge(Discriminator):
    """Logit of a sentence: its length."""

    def score(self, responses, records, spans):
        return torch.tensor([float(end - start) for row in spans.char_spans for start, end in row])

    def fingerprint(self):
        return "judge"


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Run ``aapa bank build`` on seven records, the fourth without an expert."""
    monkeypatch.setattr("aapa_lightning.anchor.load.load_discriminator", lambda *args, **kwargs: LengthJudge())
    rows = [{"prompt": f"prompt {i}", **({} if i == 3 else {"expert": f"One {i}. Two."})} for i in range(7)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = ["--data", str(tmp_path / "train.jsonl"), "--discriminator", "d", "--out", str(tmp_path / "bank")]
    return lambda *words: main(["bank", "build", *paths, "--missing-experts=drop", *words])


def test_shards_are_built_and_joined(build, tmp_path, capsys):
    assert build("--shard=2/2") == build("--shard=1/2") == 0
    assert f"when all are: aapa bank join --out {tmp_path / 'bank'} --shards 2" in capsys.readouterr().out
    assert main(["bank", "join", "--out", str(tmp_path / "bank"), "--shards=2"]) == 0
    assert "6 records, written to" in capsys.readouterr().out
    bank = ExpertBank(tmp_path / "bank", "judge")
    assert bank.experts(Record("prompt 6")) == ["One 6. Two."]
    assert bank.expert_logits(Record("prompt 3")) is None


def test_resume_starts_anew_where_there_is_nothing(build, tmp_path, capsys):
    assert build("--resume") == 0
    assert len(ExpertBank(tmp_path / "bank")) == 6
    assert "may have been trained on these very experts" in capsys.readouterr().out


@pytest.mark.parametrize("shard", ["3/2", "0/2", "x", "1", "1/0", "-1/2"])
def test_a_shard_that_is_none(shard, build, capsys):
    assert build(f"--shard={shard}") == 2
    assert f"expected I/N with I from 1 to N, such as 2/4, found '{shard}'" in capsys.readouterr().err


def test_other_mistakes(build, tmp_path, capsys):
    assert build("--batch-size=0") == 2
    assert main(["bank", "join", "--out", str(tmp_path / "bank"), "--shards=0"]) == 2
    assert main(["bank", "join", "--out", str(tmp_path / "bank"), "--shards=3"]) == 2
    errors = capsys.readouterr().err
    assert "--batch-size: expected a whole number above 0, found 0" in errors
    assert "--shards: expected a whole number above 0, found 0" in errors
    assert "expected 3 whole shards, found that [1, 2, 3] are missing" in errors
