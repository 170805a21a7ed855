"""A recipe of rounds that is killed inside one of them ends with the weights of one that is not: real stages, so it is marked slow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from aapa_lightning.data.synthetic import write_world

ROOT = Path(__file__).resolve().parent.parent
POLICY = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
POLICY |= {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}
TRAINER = {"accelerator": "cpu", "enable_model_summary": False, "enable_progress_bar": False}


def recipe(folder: Path) -> Path:
    """SPIN in small: sample, pair with the experts, learn the preference; twice."""
    write_world(folder / "world", train=24, val=4, test=4)
    policy = {"model": "${previous.spin.run_dir or stages.start.run_dir}/export"}
    prompts = str(folder / "world" / "train.jsonl")
    sampling = {"max_new_tokens": 8}
    samples = {
        "model": {"class_path": "InferenceModule", "init_args": {"policy": policy, "sampling": sampling}},
        "data": {"init_args": {"test": prompts}},
        "trainer": TRAINER,
    }
    spin = {
        "model": {"class_path": "PreferenceModule", "init_args": {"policy": policy, "batch_size": 8, "eval_samples": 0}},
        "data": {"init_args": {"train": "${stages.pairs.run_dir}/pairs.jsonl"}},
        "trainer": {**TRAINER, "max_steps": 40},
    }
    spin["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
    start = {
        "model": {
            "class_path": "SFTModule",
            "init_args": {"policy": {"config": POLICY, "tokenizer": str(folder / "world/tokenizer")}, "batch_size": 8},
        },
        "data": {"init_args": {"train": prompts}},
        "trainer": {**TRAINER, "max_steps": 2},
    }
    pairs = {"prompts": prompts, "responses": "${stages.samples.run_dir}/responses.jsonl", "chosen": "experts", "keep-truncated": True}
    stages = [
        {"name": "start", "settings": start},
        {
            "rounds": 2,
            "stages": [
                {"name": "samples", "command": "predict", "settings": samples},
                {"name": "pairs", "command": "data pairs", "args": {**pairs, "out": "${self.run_dir}/pairs.jsonl"}},
                {"name": "spin", "settings": spin, "args": {"checkpoint.every_n_steps": 1}},
            ],
        },
    ]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"run_dir": "OUT", "stages": stages}, sort_keys=False))
    return path


def play(path: Path, out: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "aapa_lightning.cli", "recipe", str(path), "--set", f"run_dir={out}"]
    return subprocess.Popen(command, env=environment, cwd=out.parent, start_new_session=True)


@pytest.mark.slow
def test_a_recipe_killed_inside_a_round_ends_as_if_it_had_not_been(tmp_path):
    path = recipe(tmp_path)
    assert play(path, tmp_path / "whole").wait() == 0
    killed = play(path, tmp_path / "killed")
    last = tmp_path / "killed" / "spin-2" / "checkpoints" / "last.ckpt"
    while not last.exists() and killed.poll() is None:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert 0 < torch.load(last, weights_only=True)["global_step"] < 40
    assert not (tmp_path / "killed" / "spin-2" / "export").exists()
    assert play(path, tmp_path / "killed").wait() == 0
    whole, again = (load_file(tmp_path / run / "spin-2" / "export" / "model.safetensors") for run in ("whole", "killed"))
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    rows = [(tmp_path / run / "spin-2" / "metrics.csv").read_text() for run in ("whole", "killed")]
    assert rows[0] == rows[1]
