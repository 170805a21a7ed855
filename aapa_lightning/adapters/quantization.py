"""Weights in 4 or 8 bits under adapters (QLoRA), by bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from aapa_lightning.errors import ConfigError, MissingDependencyError, choose

#: Names of the quantisations, and the switch of ``transformers.BitsAndBytesConfig`` that each stands for.
QUANTIZATIONS = {"none": None, "nf4": "load_in_4bit", "int8": "load_in_8bit"}


def quantization_arguments(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """What ``from_pretrained`` needs to quantise while it loads; nothing for ``none``.

    Linear layers but the head are quantised, and computed in ``dtype``, in bfloat16 where that is float32 and the GPU can. Norms,
    embeddings and the head keep ``dtype``: with float32 they are what peft's ``prepare_model_for_kbit_training`` makes of them. The rest of
    that function is done elsewhere: adapters freeze what lies below, and checkpointing is of the kind that needs no hook on the embeddings.

    Args:
        name: ``none``, ``nf4`` (with double quantisation, as in the QLoRA paper) or ``int8`` (LLM.int8).
        dtype: of the weights that are not quantised.

    Raises:
        ConfigError: an unknown name, or no GPU.
        MissingDependencyError: a package is not installed.
    """
    switch = choose(QUANTIZATIONS, name, "policy.quantization")
    if switch is None:
        return {}
    for package in ("bitsandbytes", "accelerate"):
        if not find_spec(package):
            raise MissingDependencyError(
                f"policy.quantization={name}: expected the package {package}, found none; pip install 'aapa-lightning[qlora]'"
            )
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {switch: True}
    if name == "nf4":
        options |= {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": compute_dtype(dtype),
        }
    return {"quantization_config": BitsAndBytesConfig(**options), "device_map": {"": _device(name)}}


def _device(name: str) -> int | str:
    if not torch.cuda.is_available():
        raise ConfigError(
            f"policy.quantization={name}: expected a CUDA GPU, found none (on a CPU bitsandbytes packs weights anew for evaluation, and "
            "then computes something else than in training); leave quantization out"
        )
    return torch.cuda.current_device()  # a rank loads onto its own: what is quantised there cannot be moved at will


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the products of 4-bit weights are taken: ``dtype``, or in place of float32 bfloat16 on a GPU that has it."""
    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if dtype == torch.float32 and fast else dtype


def is_quantized(model: nn.Module) -> bool:
    """Whether a Hugging Face model, under adapters or not, holds quantised weights."""
    return getattr(getattr(model, "config", None), "quantization_config", None) is not None
