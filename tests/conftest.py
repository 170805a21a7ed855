"""Fixtures shared by all tests: a tiny tokenizer, a tiny model, and where the real data lies."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is first imported, which other libraries do on their own

TEXTS = ["Describe the harbor in two sentences.", "The boats rest calmly. The gulls call.", "abc def ghi jkl 0123456789"]


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE of at most 300 tokens with a ChatML template."""
    from aapa_lightning.data.tokenizer import train_tokenizer

    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer):
    """Arguments of a two-layer Qwen3 config (about 40k parameters), as ``PolicySpec.config`` takes them."""
    return {
        "model_type": "qwen3",
        "vocab_size": len(tiny_tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_tokenizer, tiny_config, tmp_path_factory) -> Path:
    """A saved tiny Qwen3 with its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("tiny-qwen3")
    torch.manual_seed(0)
    config = AutoConfig.for_model(**tiny_config, eos_token_id=tiny_tokenizer.eos_token_id, pad_token_id=tiny_tokenizer.pad_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def aapa_data() -> Path:
    """The folder of real data, named by ``AAPA_DATA``."""
    folder = os.environ.get("AAPA_DATA")
    if not folder:
        pytest.skip("AAPA_DATA is not set: real prompts and responses are not available")
    return Path(folder)


@pytest.fixture(scope="session")
def header_commands():
    """``header_commands(file)``: the ``aapa`` commands, as words, in the comments that head a configuration."""

    def commands(file: Path) -> list[list[str]]:
        lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
        found = [re.fullmatch(r"# (?:[A-Z_]+=\S+ )?aapa (.+)", line) for line in lines]
        return [shlex.split(match[1]) for match in found if match]

    return commands


@pytest.fixture(scope="session")
def debug_runs(header_commands, tmp_path_factory) -> Path:
    """A folder with ``configs/`` and what the debug configs build on: world, SFT, rollouts, discriminator (a step each) and pairs."""
    from aapa_lightning.cli import main

    folder = tmp_path_factory.mktemp("debug")
    configs = Path(__file__).parents[1] / "configs"
    (folder / "configs").symlink_to(configs)
    short = {"fit": ["--trainer.max_steps=1", "--trainer.logger=false"], "predict": []}
    with contextlib.chdir(folder):
        assert main(["data", "synthetic", "--out=runs/world", "--train=48", "--val=8", "--test=8"]) == 0
        for name in ("sft", "rollouts", "discriminator"):
            (words,) = header_commands(configs / "debug" / f"{name}.yaml")
            assert main([*words, *short[words[0]], "--trainer.enable_progress_bar=false"]) == 0
        files = ["--prompts=runs/world/train.jsonl", "--responses=runs/debug/rollouts/responses.jsonl", "--out=runs/debug/pairs.jsonl"]
        assert main(["data", "pairs", *files, "--chosen=experts"]) == 0
    return folder


@pytest.fixture(scope="session")
def build_cli():
    """Parse the words of a trainer command and build its classes on the CPU, as always, but run nothing."""
    from aapa_lightning.commands.parser import import_components
    from aapa_lightning.commands.train import AapaCLI

    class Unrun(AapaCLI):
        def _run_subcommand(self, subcommand):
            pass

    import_components()
    return lambda *words: Unrun([*words, "--trainer.accelerator=cpu"])
