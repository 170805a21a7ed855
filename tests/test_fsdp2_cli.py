"""``--trainer.strategy fsdp2`` from the command line: fit on two processes, resume, evaluate on one, predict, export."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def aapa(debug_runs):
    """Run a command in a process of its own, as a shell would; what it printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}

    def run(*words, code=0):
        command = [sys.executable, "-m", "aapa_lightning.cli", *words]
        done = subprocess.run(command, env=env, cwd=debug_runs, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == code, (done.stdout + done.stderr)[-5000:]
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def fitted(aapa, debug_runs):
    """The run folder of three steps on two processes."""
    files = [f"--config=configs/{name}.yaml" for name in ("debug/base", "debug/grpo", "fsdp2")]
    output = aapa("fit", *files, "--run_dir=runs/sharded", "--trainer.devices=2", "--trainer.enable_progress_bar=false", "--test")
    assert "Warning" not in output.replace("ResourceWarning", ""), output[-3000:]
    return debug_runs / "runs" / "sharded"


@pytest.mark.slow
def test_a_run_on_two_processes_is_exported(aapa, fitted, tmp_path):
    assert (fitted / "checkpoints" / "last.ckpt").is_dir()
    aapa("export", str(fitted), "--out", str(tmp_path / "model"))
    aapa("export", str(fitted / "checkpoints" / "last.ckpt"), "--out", str(tmp_path / "again"))
    ours, of_run, of_file = (
        load_file(folder / "model.safetensors") for folder in (fitted / "export", tmp_path / "model", tmp_path / "again")
    )
    assert ours.keys() == of_run.keys() == of_file.keys()
    assert all((ours[name] == of_run[name]).all() and (ours[name] == of_file[name]).all() for name in ours)
    assert json.loads((fitted / "export" / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


@pytest.mark.slow
def test_one_process_measures_what_two_trained(aapa, fitted):
    two = json.loads((fitted / "test_metrics.json").read_text())
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    aapa("test", "--config", str(fitted / "config.yaml"), "--trainer.strategy=auto", "--trainer.devices=1", *quiet)
    assert json.loads((fitted / "test_metrics.json").read_text()) == pytest.approx(two, rel=1e-4)


@pytest.mark.slow
def test_a_run_is_continued_and_predicts(aapa, fitted):
    common = ["--config", str(fitted / "config.yaml"), "--trainer.enable_progress_bar=false"]
    aapa("fit", *common, "--resume", "--trainer.max_steps=5")
    with open(fitted / "metrics.csv", newline="") as table:
        assert [row["step"] for row in csv.DictReader(table)] == ["0", "1", "2", "3", "4"]
    aapa("predict", *common)
    rows = [json.loads(line) for line in (fitted / "responses.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) == 8


@pytest.mark.slow
def test_a_discriminator_is_not_sharded(aapa, debug_runs):
    words = [
        "fit",
        "--config=configs/debug/discriminator.yaml",
        "--config=configs/fsdp2.yaml",
        "--run_dir=runs/none",
        "--trainer.devices=1",
    ]
    assert "expected a module that can be sharded, found DiscriminatorModule" in aapa(*words, code=2)
