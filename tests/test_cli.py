"""The command line on tiny modules: run folder, resume, exit codes, composition of configurations."""

from __future__ import annotations

import csv
import json
import logging
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from aapa_lightning.cli import COMMANDS, TRAINER_COMMANDS, main

MODULES = '''
import os, signal
import lightning as L
import torch
from lightning.pytorch.demos.boring_classes import BoringDataModule


class LineModule(L.LightningModule):
    """A line through the origin; logs its loss, and a validation metric."""

    def __init__(self, lr: float = 0.1, fail: str = ""):
        super().__init__()
        self.lr, self.fail = lr, fail
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def training_step(self, batch, batch_idx):
        if self.fail == "interrupt":
            raise KeyboardInterrupt
        if self.fail == "bug":
            raise RuntimeError("a bug")
        loss = (self.weight * batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def on_validation_start(self):
        if os.environ.get("KILL_IN_VALIDATION_AT") == str(self.trainer.global_step):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, *args):
        if os.environ.get("KILL_AT") == str(self.trainer.global_step):
            os.kill(os.getpid(), int(os.environ.get("SIGNAL", signal.SIGKILL)))

    def validation_step(self, batch, batch_idx):
        self.log("val/weight", self.weight)

    def test_step(self, batch, batch_idx):
        self.log("test/weight", self.weight)

    def predict_step(self, batch, batch_idx):
        return [{"key": str(batch_idx), "response": "caf\\u00e9\\n"}]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Steps:
    def __init__(self, start, total):
        self.start, self.total = start, total

    def __len__(self):
        return self.total

    def __iter__(self):
        for i in range(self.start, self.total):
            yield torch.tensor([1.0 + i])


class LineData(L.LightningDataModule):
    def train_dataloader(self):
        return Steps(self.trainer.global_step, self.trainer.max_steps)

    def val_dataloader(self):
        return Steps(0, 2)

    test_dataloader = predict_dataloader = val_dataloader


class First(L.Callback):
    pass


class Second(L.Callback):
    def on_fit_start(self, trainer, pl_module):
        print("callbacks:", [type(c).__name__ for c in trainer.callbacks if type(c).__name__ in ("First", "Second")])
'''
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
LINE = ["--model=cli_modules.LineModule", "--data=cli_modules.LineData", *QUIET, "--model.lr=0.01"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "cli_modules.py").write_text(MODULES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning's handler keeps the stream of the test that imported it
    monkeypatch.delitem(sys.modules, "cli_modules", raising=False)
    return tmp_path


def fit(*extra: str, steps: int = 6) -> int:
    return main(["fit", *LINE, f"--trainer.max_steps={steps}", *extra])


def metrics(run: str) -> list[dict[str, str]]:
    with open(f"{run}/metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_folder_holds_what_a_run_leaves(capsys):
    assert fit("--test", "--checkpoint.every_n_steps=2", "--checkpoint.keep=all", steps=5) == 0
    run = Path("runs/line")
    assert [row["step"] for row in metrics("runs/line") if row["train/loss"]] == ["0", "1", "2", "3", "4"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt", "step=5.ckpt"]
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    weight = last["state_dict"]["weight"].item()
    assert json.loads((run / "test_metrics.json").read_text()) == {"test/weight": weight}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["model"]["init_args"]["lr"], config["run_dir"], config["seed_everything"]) == (0.01, "runs/line", 0)
    assert list((run / "tensorboard").glob("events*"))

    assert main(["test", "--config=runs/line/config.yaml"]) == 0
    assert json.loads((run / "test_metrics.json").read_text()) == {"test/weight": weight}
    assert "weights of runs/line/checkpoints/last.ckpt" in capsys.readouterr().out


def test_an_existing_run_is_refused_then_continued(capsys):
    assert fit(steps=3) == 0
    before = Path("runs/line/metrics.csv").read_text()
    assert fit(steps=3) == 2
    assert "--resume" in capsys.readouterr().err
    assert Path("runs/line/metrics.csv").read_text() == before
    assert fit("--resume", steps=5) == 0
    assert fit("--run_dir=whole", steps=5) == 0
    assert [row["train/loss"] for row in metrics("runs/line")] == [row["train/loss"] for row in metrics("whole")]


def test_resume_without_a_checkpoint_is_a_mistake(capsys):
    assert fit("--resume") == 2
    assert "no checkpoint at runs/line/checkpoints/last.ckpt" in capsys.readouterr().err


STOPS = {
    "killed": ({"KILL_AT": "5"}, -signal.SIGKILL, ""),
    "killed in validation": ({"KILL_IN_VALIDATION_AT": "4"}, -signal.SIGKILL, ""),
    "killed between a checkpoint and the log": ({"KILL_AT": "7"}, -signal.SIGKILL, ""),
    "killed before a checkpoint": ({"KILL_AT": "2"}, -signal.SIGKILL, ""),
    "terminated": ({"KILL_AT": "5", "SIGNAL": str(int(signal.SIGTERM))}, 143, "aapa: terminated"),
    "interrupted": ({"KILL_AT": "5", "SIGNAL": str(int(signal.SIGINT))}, 130, "aapa: interrupted"),
}


@pytest.mark.parametrize(("environment", "code", "message"), STOPS.values(), ids=STOPS)
def test_stopped_and_resumed_equals_uninterrupted(environment, code, message, folder, capsys):
    validate = ["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null", "--checkpoint.every_n_steps=2"]
    words = ["fit", *LINE, "--trainer.max_steps=7", *validate, "--run_dir=killed"]
    env = os.environ | environment | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it
    command = [sys.executable, "-m", "aapa_lightning.cli", *words]
    stopped = subprocess.run(command, env=env, check=False, capture_output=True, text=True, preexec_fn=heard)
    assert stopped.returncode == code, stopped.stderr
    assert message in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert main(words) == 2
    assert "killed already holds a run; continue it with --resume" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert ("starting from the beginning" in capsys.readouterr().out) == (environment.get("KILL_AT") == "2")
    assert fit(*validate, "--run_dir=whole", steps=7) == 0
    assert Path("killed/metrics.csv").read_text() == Path("whole/metrics.csv").read_text()
    assert [row["step"] for row in metrics("whole") if row["val/weight"]] == ["1", "3", "5"]
    weights = [torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]["weight"] for run in ("killed", "whole")]
    assert torch.equal(*weights)


def test_an_early_stop_leaves_a_checkpoint_of_its_last_step():
    stop = "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/weight", "--trainer.callbacks.patience=1"
    often = "--trainer.val_check_interval=1", "--trainer.check_val_every_n_epoch=null", "--trainer.callbacks.mode=max"
    assert fit(*stop, *often, steps=9) == 0
    done = len([row for row in metrics("runs/line") if row["train/loss"]])
    assert done < 9
    assert torch.load("runs/line/checkpoints/last.ckpt", weights_only=True)["global_step"] == done


def test_callbacks_of_two_configurations_survive(folder, capsys):
    (folder / "a.yaml").write_text("trainer: {max_steps: 1, callbacks: [{class_path: cli_modules.First}]}\n")
    (folder / "b.yaml").write_text("trainer: {callbacks+: [{class_path: cli_modules.Second}]}\n")
    assert main(["fit", "--config=a.yaml", "--config=b.yaml", *LINE]) == 0
    assert "callbacks: ['First', 'Second']" in capsys.readouterr().out


def test_saved_hyper_parameters_do_not_replace_arguments(folder):
    assert fit(steps=1) == 0
    checkpoint = torch.load("runs/line/checkpoints/last.ckpt", weights_only=True)
    torch.save(checkpoint | {"hyper_parameters": {"lr": 7.0}}, folder / "old.ckpt")
    assert fit("--ckpt_path=old.ckpt", "--run_dir=next", steps=2) == 0
    assert yaml.safe_load(Path("next/config.yaml").read_text())["model"]["init_args"]["lr"] == 0.01


def test_predict_writes_a_response_file_once(capsys):
    words = ["predict", *LINE, "--run_dir=out"]
    assert main(words) == 0
    rows = [json.loads(line) for line in Path("out/responses.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"key": "0", "response": "café\n"}, {"key": "1", "response": "café\n"}]
    assert sorted(os.listdir("out")) == ["responses.jsonl"]
    assert main(words) == 2
    assert "already exists" in capsys.readouterr().err


def test_no_logger_and_no_checkpoints_where_not_wanted():
    assert fit("--trainer.logger=false", "--trainer.enable_checkpointing=false", steps=1) == 0
    assert sorted(os.listdir("runs/line")) == ["config.yaml"]


def test_a_dry_run_leaves_nothing():
    assert fit("--trainer.fast_dev_run=true") == 0
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.bogus=3"], "bogus"),
        (["--model.bogus=3"], "bogus"),
        (["--config=absent.yaml"], "absent.yaml"),
        (["--model=NoSuchModule"], "NoSuchModule"),
        (["--checkpoint.every_n_steps=0"], "expected a whole number, at least 1"),
        (["--ckpt_path=absent.ckpt"], "absent.ckpt"),
        (["--trainer.strategy=bogus"], "bogus"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(words, message, capsys):
    assert fit(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not Path("runs/line/metrics.csv").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_asked_for_and_absent(capsys):
    assert fit("--trainer.accelerator=gpu") == 2
    assert "expected a GPU" in capsys.readouterr().err


def test_an_unknown_key_in_a_file_names_it(folder, capsys):
    (folder / "bad.yaml").write_text("trainer: {max_stepz: 1}\n")
    assert fit("--config=bad.yaml") == 2
    assert "max_stepz" in capsys.readouterr().err


def test_a_bug_has_a_traceback_and_exit_code_1(capsys):
    assert fit("--model.fail=bug") == 1
    assert "Traceback" in capsys.readouterr().err


def test_help_lists_every_command_with_an_example(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command.summary in text and command.example in text for command in COMMANDS.values())
    assert main([]) == 2
    assert main(["nonsense"]) == 2
    assert "expected one of fit" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name, capsys):
    assert main([name, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert COMMANDS[name].example in text
    assert ("--trainer.max_steps" in text) == (name in TRAINER_COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "config", "named"),
    [
        ([], "model: {class_path: SFTModule}", False),
        ([], "data: {init_args: {train: x.jsonl}}", False),
        ([], "data: {class_path: DiscriminatorData}", True),
        ([], "data: DiscriminatorData", True),
        (["--data=DiscriminatorData"], "{}", True),
        (["--data.class_path", "DiscriminatorData"], "{}", True),
    ],
)
def test_the_default_data_class_gives_way_to_any_that_is_named(arguments, config, named, tmp_path):
    from aapa_lightning.commands.config_files import names_data_class

    path = tmp_path / "config.yaml"
    path.write_text(config)
    assert names_data_class(["fit", f"--config={path}", *arguments]) == named
    assert names_data_class(["fit", "--config", str(path), *arguments]) == named


def test_arguments_of_the_default_data_class_do_not_leak_into_another(tmp_path):
    from aapa_lightning.commands.train import AapaCLI, import_components

    import_components()
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: {class_path: DiscriminatorModule, init_args: {encoder: x}}\n"
        "data: {class_path: DiscriminatorData, init_args: {train: t.jsonl}}\n"
    )
    cli = AapaCLI([f"--config={path}"], run=False)
    assert cli.datamodule.val_fraction == 0.2  # AapaDataModule's is 0


def test_a_reader_that_leaves_is_no_error():
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    script = f'{sys.executable} -m aapa_lightning.cli doctor | true; echo "${{PIPESTATUS[0]}}"'
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": paths})
    assert (run.stdout.strip(), run.stderr) == ("141", "")
