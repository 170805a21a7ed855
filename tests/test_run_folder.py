"""A run's folder under attack: two runs at once, kills while it begins, links that lead nowhere, litter, damage, no place to write."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_cli import LINE, fit, folder, metrics  # noqa: F401 - the fixture

from aapa_lightning.cli import main
from aapa_lightning.locks import hold
from aapa_lightning.runs import last_checkpoint

LAST = last_checkpoint("runs/line")


def contents(path="runs/line"):
    return {str(file): file.read_bytes() if file.is_file() else b"" for file in sorted(Path(path).rglob("*"))}


def refused(capsys, *words, command=("fit", *LINE, "--trainer.max_steps=6")):
    """The one line of a command that ends with code 2 and leaves the folder as it was."""
    before = contents()
    capsys.readouterr()
    assert main([*command, *words]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert contents() == before
    (line,) = [line for line in error.splitlines() if line.startswith("aapa: error: ")]
    assert error.endswith(line + "\n")
    return line


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_dead(folder, capsys):  # noqa: F811
    env = os.environ | {"KILL_AT": "2", "SIGNAL": str(int(signal.SIGSTOP)), "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    first = subprocess.Popen([sys.executable, "-m", "aapa_lightning.cli", "fit", *LINE, "--trainer.max_steps=6"], env=env)
    try:
        os.waitid(os.P_PID, first.pid, os.WSTOPPED)
        for words in ([], ["--resume"]):
            assert f"runs/line is in use by process {first.pid} on" in refused(capsys, *words)
    finally:
        first.kill()
        first.wait()
    assert fit("--resume") == 0
    assert [row["step"] for row in metrics("runs/line")] == list("012345")
    assert not list(Path("runs/line").glob(".*"))


@pytest.mark.parametrize("command", ["predict", "validate", "test"])
def test_so_is_a_second_of_the_commands_that_write(command, capsys):
    words = [command, *LINE]
    with hold(Path(f"runs/line/.{command}.lock"), ["aapa", command], "wait"):
        assert "is in use by process" in refused(capsys, command=words)
    assert main(words) == 0
    assert not list(Path("runs/line").glob(".*"))


def test_other_ranks_of_the_run_are_not_a_second_run(monkeypatch, capsys):
    with hold(Path("runs/line/.validate.lock"), ["aapa"], "wait"):
        for name in ("RANK", "LOCAL_RANK", "NODE_RANK"):
            monkeypatch.setenv(name, "1")
            assert main(["validate", *LINE, "--trainer.strategy=bogus"]) == 2
            assert "bogus" in capsys.readouterr().err
            monkeypatch.delenv(name)


def test_a_kill_while_the_configuration_is_written_leaves_a_folder_that_starts(capsys):
    for name in (".config.yaml.abcdefgh.tmp", ".fit.lock", "tensorboard/events"):
        file = Path("runs/line") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    shutil.copytree("runs/line", "again")
    assert fit(steps=1) == 0
    assert not list(Path("runs/line").glob(".*"))
    assert fit("--resume", "--run_dir=again") == 2
    assert "no run that has begun; leave --resume out to start it" in capsys.readouterr().err


def test_what_kills_left_is_swept_at_the_next_start_and_nothing_else():
    assert fit("--checkpoint.keep=all", steps=2) == 0
    litter = [
        ".config.yaml.abcdefgh.tmp",
        ".metrics.csv.abcdefgh.tmp",
        ".responses.jsonl.rank3",
        "checkpoints/.last.ckpt.abcdefgh.tmp",
        "checkpoints/.step=1.ckpt.abcdefgh.tmp",
        "samples.parquet/.step-00000001.parquet.abcdefgh.tmp",
    ]
    kept = ["notes.txt", "checkpoints/.hidden", "checkpoints/mine.tmp"]
    for name in litter + kept:
        (Path("runs/line") / name).parent.mkdir(exist_ok=True)
        (Path("runs/line") / name).write_text("")
    (Path("runs/line") / ".export.abcdefgh.tmp").mkdir()
    assert fit("--resume", "--checkpoint.keep=all", steps=3) == 0
    names = {str(path.relative_to("runs/line")) for path in Path("runs/line").rglob("*")}
    assert not names & {*litter, ".export.abcdefgh.tmp"}
    assert names >= {*kept, "checkpoints/step=2.ckpt", "checkpoints/last.ckpt"}


@pytest.mark.parametrize("command", ["fit", "test", "validate", "predict"])
def test_a_checkpoint_behind_a_link_that_leads_nowhere_is_not_passed_over(command, capsys):
    assert fit(steps=2) == 0
    LAST.unlink()
    LAST.symlink_to(".last.ckpt.0123abcd")
    resume = ["--resume", "--trainer.max_steps=6"] if command == "fit" else []
    line = refused(capsys, command=[command, *LINE, *resume])
    assert f"{LAST} leads to .last.ckpt.0123abcd, which is not there" in line


@pytest.mark.parametrize("left", ["checkpoints/step=2.ckpt", "export"])
def test_a_run_whose_last_checkpoint_is_gone_is_not_written_over(left, capsys):
    assert fit("--checkpoint.keep=all", steps=2) == 0
    (Path("runs/line") / "export").mkdir()
    for name in {"checkpoints/last.ckpt", "checkpoints/step=2.ckpt", "export"} - {left}:
        path = Path("runs/line") / name
        path.rmdir() if name == "export" else path.unlink()
    assert left in refused(capsys, "--resume")
    if left != "export":
        assert fit("--resume", f"--ckpt_path=runs/line/{left}") == 0


def test_a_refused_resume_leaves_the_run_as_it_was(capsys):
    assert fit("--checkpoint.keep=all", steps=2) == 0
    checkpoint = torch.load(LAST, weights_only=True)
    torch.save(checkpoint | {"state_dict": {"weight": torch.zeros(3)}}, "other.ckpt")
    refused(capsys, "--resume", "--ckpt_path=other.ckpt", "--model.lr=7")
    assert yaml.safe_load(Path("runs/line/config.yaml").read_text())["model"]["init_args"]["lr"] == 0.01


DAMAGE = {
    "garbage": (b"\xff\xfe\x00garbage\n", "cannot read"),
    "text": (b"hello\nworld\n", "expected a first column named step"),
    "a line": (b"step,train/loss,epoch\n0,1.0,0\nhello\n1,2.0,0\n", "line 3: expected 3 values"),
    "folder": (None, "Is a directory"),
}


@pytest.mark.parametrize(("content", "said"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_metrics_are_named_before_anything_is_written(content, said, capsys):
    assert fit(steps=2) == 0
    file = Path("runs/line/metrics.csv")
    file.unlink()
    file.mkdir() if content is None else file.write_bytes(content)
    line = refused(capsys, "--resume")
    assert said in line
    assert str(file) in line


@pytest.mark.parametrize("how", ["deleted", "emptied"])
def test_metrics_that_are_gone_are_said_to_be(how):
    assert fit(steps=2) == 0
    file = Path("runs/line/metrics.csv")
    file.unlink() if how == "deleted" else file.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"rows of the 2 steps before this resume are gone"):
        assert fit("--resume", steps=4) == 0
    assert [row["step"] for row in metrics("runs/line")] == ["2", "3"]


def test_a_tail_of_nulls_is_cut_off():
    assert fit(steps=2) == 0
    with open("runs/line/metrics.csv", "ab") as file:
        file.write(bytes(100))
    assert fit("--resume", steps=4) == 0
    assert [row["step"] for row in metrics("runs/line")] == list("0123")


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
@pytest.mark.parametrize("place", ["file", "file/below", "n" * 300, "dangling", "/dev/null", "/proc/nothing"])
def test_a_run_folder_that_cannot_be_written_is_one_line(command, place, capsys):
    Path("file").write_text("")
    Path("dangling").symlink_to("nowhere")
    line = refused(capsys, command=[command, *LINE, f"--run_dir={place}"])
    assert line.startswith("aapa: error: cannot write ")
    assert place[:50] in line


def test_folders_that_go_while_the_run_goes_on_are_named(folder, capsys):  # noqa: F811
    remove = "import shutil\n\n\nclass Remove(First):\n    def on_train_batch_start(self, trainer, *_):\n"
    with open("cli_modules.py", "a") as file:
        file.write(f"\n\n{remove}        if trainer.global_step == 2:\n            shutil.rmtree('runs/line')\n")
    capsys.readouterr()
    assert fit("--trainer.callbacks=cli_modules.Remove", "--trainer.logger=true") == 2
    error = capsys.readouterr().err
    assert re.search(r"cannot write runs/line/metrics\.csv: its folder .* was removed", error)
    assert "Traceback" not in error
