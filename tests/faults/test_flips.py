"""Flipped bits in what a run reads back: every one ends with exit code 2, the file's name and no step of training."""

from __future__ import annotations

import random

import pytest

from aapa_lightning.anchor.bank import ExpertBank
from aapa_lightning.cli import main
from aapa_lightning.data.records import read_records
from aapa_lightning.errors import ConfigError

FLIPS = 100
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
JUDGE = "runs/debug/discriminator/export"


@pytest.fixture(autouse=True)
def folder(debug_runs, monkeypatch):
    monkeypatch.chdir(debug_runs)


def fit(run_dir, *words, files=("base", "grpo")):
    return main(["fit", *(f"--config=configs/debug/{name}.yaml" for name in files), f"--run_dir={run_dir}", *QUIET, *words])


def flipped(path, count, seed=0):
    """Flip one bit at a time, anywhere in a file; afterwards it is as it was."""
    whole, rng = path.read_bytes(), random.Random(seed)
    for place in rng.sample(range(len(whole)), min(count, len(whole))):
        content = bytearray(whole)
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        yield place
    path.write_bytes(whole)


@pytest.mark.slow
def test_a_checkpoint(tmp_path, capsys):
    run = tmp_path / "run"
    assert fit(run) == 0
    rows = (run / "metrics.csv").read_bytes()
    for place in flipped(run / "checkpoints" / "last.ckpt", FLIPS):
        capsys.readouterr()
        assert fit(run, "--resume", "--trainer.max_steps=4") == 2, place
        error = capsys.readouterr().err
        assert "last.ckpt is " in error, place
        assert "damaged" in error, place
        assert "Traceback" not in error, place
        assert (run / "metrics.csv").read_bytes() == rows, place
    assert fit(run, "--resume", "--trainer.max_steps=4") == 0


@pytest.mark.slow
def test_a_bank_in_training(tmp_path, capsys):
    train = "runs/world/train.jsonl"
    bank = tmp_path / "bank"
    assert main(["bank", "build", f"--data={train}", f"--discriminator={JUDGE}", f"--out={bank}"]) == 0
    records = list(read_records(train))
    for name in ("bank.json", "index.arrow", "experts.arrow"):
        for _ in flipped(bank / name, FLIPS):
            with pytest.raises(ConfigError, match=rf"{name} is damaged.*build the bank again"):
                look_at_all(bank, records)
    look_at_all(bank, records)
    anchor = "--trainer.callbacks"
    words = [f"{anchor}.transform=bt_gap", f"{anchor}.bank={bank}"]
    flips = flipped(bank / "experts.arrow", 2)
    next(flips)
    capsys.readouterr()
    assert fit(tmp_path / "anchored", *words, files=("base", "grpo", "anchor")) == 2
    error = capsys.readouterr().err
    assert "experts.arrow is damaged" in error
    assert "Traceback" not in error


def look_at_all(folder, records):
    bank = ExpertBank(folder)
    for record in records:
        assert bank.experts(record)
        assert bank.expert_logits(record) is not None
