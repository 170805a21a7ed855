"""The quickstart, a few steps of every stage: a minute of subprocesses, so it is marked slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHORT = {
    "stages.world.args.train": 60,
    "stages.sft.settings.trainer.max_steps": 3,
    "stages.discriminator.settings.trainer.max_epochs": 1,
    **{f"stages.{row}.settings.trainer.max_steps": 2 for row in ("grpo", "grpo_kl", "aapa_grpo")},
}


@pytest.mark.slow
def test_every_stage_runs_and_the_summary_has_every_figure(tmp_path):
    command = [sys.executable, "-m", "aapa_lightning.cli", "recipe", str(ROOT / "configs/recipes/quickstart.yaml")]
    command += [word for key, value in {"run_dir": tmp_path / "run", **SHORT}.items() for word in ("--set", f"{key}={value}")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary) == ["sft", "grpo", "grpo_kl", "aapa_grpo"]
    for row in summary.values():
        assert set(row) == {"constraint_accuracy", "well_formedness", "true_success", "expert_logprob", "length_distance", "seconds"}
        assert all(isinstance(value, float) for value in row.values())
    anchored = (tmp_path / "run" / "aapa_grpo" / "metrics.csv").read_text().splitlines()[0]
    assert "train/anchor/score" in anchored
    assert "train/guard/auroc" not in anchored  # there is no bank to take experts from
    again = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert "Seed set to" not in again.stdout + again.stderr  # every stage is finished: nothing runs again
