"""Building a bank: killed and resumed, by several processes, out of bounded memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aapa_lightning.anchor import bank_build
from aapa_lightning.anchor.bank import ExpertBank
from aapa_lightning.anchor.bank_build import INDEX, ROWS, STAMP
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Record

RECORDS = [Record(f"prompt {i}", experts=(f"One {i}. Two {'x' * (i % 7)}.",), source=f"data.jsonl:{i + 1}") for i in range(100)]


class LengthJudge:
    """Logit of a sentence: its length. Gives up after ``patience`` batches."""

    needs_experts = False
    whole_response = False

    def __init__(self, name="judge", patience=10**9):
        self.name, self.patience, self.scored = name, patience, 0

    def score(self, responses, records, spans):
        self.patience -= 1
        if self.patience < 0:
            raise KeyboardInterrupt
        self.scored += len(responses)
        return torch.tensor([float(end - start) for row in spans.char_spans for start, end in row])

    def fingerprint(self):
        return self.name


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(bank_build, "PART_BATCHES", 2)


@pytest.fixture
def whole(tmp_path):
    """The files of an uninterrupted build."""
    bank = ExpertBank.build(tmp_path / "whole", RECORDS, LengthJudge(), batch_size=8)
    assert len(bank) == 100
    return files_of(tmp_path / "whole")


def files_of(folder: Path):
    return {name: (folder / name).read_bytes() for name in (ROWS, INDEX, STAMP)}


def interrupt(target, batches, records=RECORDS):
    with pytest.raises(KeyboardInterrupt):
        ExpertBank.build(target, records, LengthJudge(patience=batches), batch_size=8)


@pytest.mark.parametrize("batches", [0, 1, 2, 7, 12])
def test_a_resumed_build_is_an_uninterrupted_one(batches, whole, tmp_path):
    target, judge = tmp_path / "bank", LengthJudge()
    interrupt(target, batches)
    assert not target.exists()
    assert (tmp_path / "bank.partial").exists() == (batches >= 2)
    ExpertBank.build(target, RECORDS, judge, batch_size=8, resume=True)
    assert judge.scored == 100 - batches // 2 * 16
    assert files_of(target) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank", "whole"]


def test_interrupted_twice_and_in_the_join(whole, tmp_path, monkeypatch):
    target = tmp_path / "bank"
    interrupt(target, 3)
    with pytest.raises(KeyboardInterrupt):
        ExpertBank.build(target, RECORDS, LengthJudge(patience=5), batch_size=8, resume=True)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bank_build, "write_sealed_json", lambda path, value: full_disk() if path.name == STAMP else None)
        with pytest.raises(OSError, match="No space"):
            ExpertBank.build(target, RECORDS, LengthJudge(), batch_size=8, resume=True)
    judge = LengthJudge()
    ExpertBank.build(target, RECORDS, judge, batch_size=8, resume=True)
    assert judge.scored == 0
    assert files_of(target) == whole


def test_without_resume_it_starts_anew(whole, tmp_path):
    interrupt(tmp_path / "bank", 4, [replace(record, experts=("Other.",)) for record in RECORDS])
    judge = LengthJudge()
    ExpertBank.build(tmp_path / "bank", RECORDS, judge, batch_size=8)
    assert judge.scored == 100
    assert files_of(tmp_path / "bank") == whole


def test_resume_refuses_what_is_not_the_same(tmp_path):
    target = tmp_path / "bank"
    interrupt(target, 4)
    other = [*RECORDS[:9], replace(RECORDS[9], experts=("Other.",)), *RECORDS[10:]]
    with pytest.raises(DataError, match=r"records behind .*part-0000.* are not those it was made from; build without --resume"):
        ExpertBank.build(target, other, LengthJudge(), batch_size=8, resume=True)
    with pytest.raises(ConfigError, match=r"another value of fingerprint: expected judge, found new; resume with the same"):
        ExpertBank.build(target, RECORDS, LengthJudge("new"), batch_size=8, resume=True)
    with pytest.raises(ConfigError, match=r"another value of rows: expected 100, found 99"):
        ExpertBank.build(target, RECORDS[:-1], LengthJudge(), batch_size=8, resume=True)
    (part,) = (tmp_path / "bank.partial").glob("part-000000000000-*.arrow")
    whole = part.read_bytes()
    for place in (8, len(whole) // 2, len(whole) - 4):  # a logit as well as what Arrow reads
        part.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ConfigError, match=r"part-.* is damaged .*; remove it and resume"):
            ExpertBank.build(target, RECORDS, LengthJudge(), batch_size=8, resume=True)
    note = tmp_path / "bank.partial" / "build.json"
    note.write_text(note.read_text().replace("100", "101"))
    with pytest.raises(ConfigError, match=r"build.json is damaged .*; build without --resume to start anew"):
        ExpertBank.build(target, RECORDS, LengthJudge(), batch_size=8, resume=True)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_shards_make_the_same_bank(count, whole, tmp_path):
    target = tmp_path / "bank"
    judges = [LengthJudge() for _ in range(count)]
    for number in reversed(range(count)):
        ExpertBank.build_shard(target, RECORDS, judges[number], None, (number + 1, count), batch_size=8)
        assert not target.exists()
    assert len(ExpertBank.join(target, count)) == 100
    assert sum(judge.scored for judge in judges) == 100
    own = {"index", "sha256"}  # shards cut the batches elsewhere
    found, expected = ({k: v for k, v in json.loads(files[STAMP]).items() if k not in own} for files in (files_of(target), whole))
    assert found == expected
    bank, reference = ExpertBank(target), ExpertBank(tmp_path / "whole")
    for record in RECORDS:
        assert bank.experts(record) == list(record.experts)
        assert torch.equal(bank.expert_logits(record), reference.expert_logits(record))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank", "whole"]


def test_more_shards_than_records(tmp_path):
    for number in (1, 2, 3):
        ExpertBank.build_shard(tmp_path / "bank", RECORDS[:2], LengthJudge(), None, (number, 3))
    assert len(ExpertBank.join(tmp_path / "bank", 3)) == 2


def test_shards_that_do_not_fit(tmp_path):
    target = tmp_path / "bank"
    ExpertBank.build_shard(target, RECORDS, LengthJudge(), None, (1, 2), batch_size=8)
    with pytest.raises(ConfigError, match=r"expected 2 whole shards, found that \[2\] are missing or not whole; .*--shard I/2"):
        ExpertBank.join(target, 2)
    with pytest.raises(KeyboardInterrupt):
        ExpertBank.build_shard(target, RECORDS, LengthJudge(patience=3), None, (2, 2), batch_size=8)
    with pytest.raises(ConfigError, match=r"\[2\] are missing or not whole"):
        ExpertBank.join(target, 2)
    ExpertBank.build_shard(target, RECORDS, LengthJudge("new"), None, (2, 2), batch_size=8)
    with pytest.raises(ConfigError, match="built with different settings"):
        ExpertBank.join(target, 2)
    with pytest.raises(ConfigError, match="expected a shard from 1 to 2"):
        ExpertBank.build_shard(target, RECORDS, LengthJudge(), None, (3, 2))
    assert not target.exists()


def test_two_processes_do_not_write_the_same_parts(tmp_path):
    (tmp_path / "bank.partial").mkdir()
    with bank_build._locked(tmp_path / "bank.partial"), pytest.raises(ConfigError, match="being written by another process"):
        ExpertBank.build(tmp_path / "bank", RECORDS, LengthJudge())


SCRIPT = """
import sys, time, torch
from aapa_lightning.anchor import bank_build
from aapa_lightning.anchor.bank import ExpertBank
from test_bank_build import RECORDS, LengthJudge
class Slow(LengthJudge):
    def score(self, *args):
        time.sleep(0.05)
        return super().score(*args)
bank_build.PART_BATCHES = 2
ExpertBank.build(sys.argv[1], RECORDS, Slow(), batch_size=8)
"""


def test_killed_and_resumed(whole, tmp_path):
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "bank")], env={**os.environ, "PYTHONPATH": paths})
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("bank.partial/part-*.arrow"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "bank").exists()
    judge = LengthJudge()
    ExpertBank.build(tmp_path / "bank", RECORDS, judge, batch_size=8, resume=True)
    assert 0 < judge.scored < 100
    assert files_of(tmp_path / "bank") == whole
