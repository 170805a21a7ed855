"""The run folder's files: metrics that survive kills, checkpoints and other files that are whole or not there."""

from __future__ import annotations

import csv
import math
import os
import stat

import pytest
import torch

from aapa_lightning.checkpoint_io import AtomicCheckpointIO
from aapa_lightning.errors import ConfigError
from aapa_lightning.files import atomic_write, write_json
from aapa_lightning.runs import MetricsCSV


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_is_on_disk_at_once_and_reads_back_exactly(tmp_path):
    MetricsCSV(tmp_path).log_metrics({"loss": 0.1 + 0.2, "n": 3, "bad": math.nan}, step=0)
    (row,) = rows(tmp_path)
    assert float(row["loss"]) == 0.1 + 0.2
    assert (row["n"], row["bad"]) == ("3", "nan")


def test_what_is_logged_twice_for_a_step_is_one_row(tmp_path):
    log = MetricsCSV(tmp_path)
    for step in range(3):
        log.log_metrics({"loss": step / 3}, step=step)
        log.log_metrics({"loss": step / 3}, step=step)
    log.log_metrics({"val": 0.5}, step=2)
    log.log_metrics({"loss": 0.25}, step=3)
    assert [(row["step"], row["val"]) for row in rows(tmp_path)] == [("0", ""), ("1", ""), ("2", "0.5"), ("3", "")]
    assert rows(tmp_path)[2]["loss"] == repr(2 / 3)


def test_a_shorter_value_leaves_nothing_of_the_longer_one(tmp_path):
    log = MetricsCSV(tmp_path)
    log.log_metrics({"loss": 0.123456789}, step=0)
    log.log_metrics({"loss": 0.5}, step=0)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n0,0.5\n"


@pytest.mark.parametrize("killed_after", [2, 3, 5])
@pytest.mark.parametrize("torn", ["", "7,0.", "7"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, killed_after, torn):
    def train(folder, begin, end):
        log = MetricsCSV(folder)
        log.trim(begin)
        for step in range(begin, end):
            log.log_metrics({"loss": 1 / (step + 1)}, step=step)
            if step % 2:
                log.log_metrics({"val/loss": step / 7}, step=step)

    train(tmp_path / "whole", 0, 6)
    train(tmp_path / "killed", 0, killed_after)
    with open(tmp_path / "killed" / "metrics.csv", "a") as file:
        file.write(torn)
    train(tmp_path / "killed", 2, 6)  # the last checkpoint was taken after two steps
    assert (tmp_path / "killed" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero.rank_zero_only.rank", 1)
    log = MetricsCSV(tmp_path)
    log.log_metrics({"loss": 1.0}, step=0)
    log.trim(0)
    assert not (tmp_path / "metrics.csv").exists()


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def fail_halfway():
        with atomic_write(target) as file:
            file.write(b"new")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_written_files_get_ordinary_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "sub" / "a.json", {"a": [1]})
    assert stat.S_IMODE((tmp_path / "sub" / "a.json").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_checkpoint_that_fails_midway_leaves_the_old_one(tmp_path, monkeypatch):
    path, store = tmp_path / "last.ckpt", AtomicCheckpointIO()
    store.save_checkpoint({"w": torch.arange(3)}, path)

    def half(value, file):
        file.write(b"half a checkpoint")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        store.save_checkpoint({"w": torch.zeros(3)}, path)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert store.load_checkpoint(path)["w"].tolist() == [0, 1, 2]


def test_a_checkpoint_never_unpickles_objects(tmp_path):
    torch.save({"evil": os.system}, tmp_path / "evil.ckpt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "absent.ckpt")
