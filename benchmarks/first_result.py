"""A tiny GRPO run of three steps, process start to end: `aapa fit` beside TRL's GRPOTrainer. Prints JSON, ratio first.

The same two-layer Qwen3 and tokenizer from one folder, one prompt x 4 responses x up to 16 tokens a step, CPU, no checkpoints.

Run: python benchmarks/first_result.py [--repeats 5] [--out benchmarks/results/first_result.json]   (needs the `test` extra: TRL)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "lightning", "transformers", "trl")
PROMPT = "Describe the harbor in two sentences."

TRL = """
import sys
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

model, prompt, out = sys.argv[1:]
config = GRPOConfig(
    output_dir=out, max_steps=3, per_device_train_batch_size=4, num_generations=4, max_completion_length=16, use_cpu=True, bf16=False,
    gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
)
trainer = GRPOTrainer(
    AutoModelForCausalLM.from_pretrained(model),
    reward_funcs=lambda completions, **_: [float(len(text) % 7) for text in completions],
    args=config,
    train_dataset=Dataset.from_list([{"prompt": prompt}] * 8),
    processing_class=AutoTokenizer.from_pretrained(model),
)
trainer.train()
"""

AAPA = """
model:
  class_path: GRPOModule
  init_args:
    policy: {model: MODEL}
    prompts_per_window: 1
    group_size: 4
    sampling: {max_new_tokens: 16}
    prompt_format: {chat_template: never}
    rewards: [{class_path: LengthReward, init_args: {maximum: 3}}]
data: {init_args: {train: DATA}}
trainer:
  {max_steps: 3, accelerator: cpu, enable_checkpointing: false, logger: false, enable_progress_bar: false, enable_model_summary: false}
"""


def prepare(folder: Path) -> dict[str, list[str]]:
    """Write model, data and config; return both commands."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from aapa_lightning.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([PROMPT], vocab_size=300, chat_template=None)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        head_dim=8,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text((json.dumps({"prompt": PROMPT}) + "\n") * 8)
    (folder / "grpo.yaml").write_text(AAPA.replace("MODEL", str(folder / "model")).replace("DATA", str(folder / "data.jsonl")))
    (folder / "trl_run.py").write_text(TRL)
    aapa = [sys.executable, "-m", "aapa_lightning.cli", "fit", f"--config={folder / 'grpo.yaml'}"]
    return {"aapa": aapa, "trl": [sys.executable, str(folder / "trl_run.py"), str(folder / "model"), PROMPT, str(folder / "out")]}


def seconds(command: list[str], folder: Path) -> float:
    """Wall seconds of one run in a folder of its own."""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{root}:{root / 'kernels'}"}
    with tempfile.TemporaryDirectory(dir=folder) as cwd:
        start = time.perf_counter()
        run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        elapsed = time.perf_counter() - start
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{run.stderr[-3000:]}")
    return elapsed


def main() -> None:
    """Run both in turn and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = prepare(folder)
        times: dict[str, list[float]] = {label: [] for label in commands}
        for repeat in range(args.repeats + 1):
            for label, command in commands.items():
                elapsed = seconds(command, folder)
                if repeat:  # the first of each warms the disk cache
                    times[label].append(elapsed)
    medians = {label: statistics.median(values) for label, values in times.items()}
    result = {
        "ratio_aapa_to_trl": round(medians["aapa"] / medians["trl"], 3),
        "seconds": {label: round(value, 2) for label, value in medians.items()},
        "repeats": args.repeats,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
