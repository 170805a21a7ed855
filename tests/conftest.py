"""Fixtures shared by all tests: a tiny tokenizer, a tiny model, and where the real data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

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
    import torch
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
