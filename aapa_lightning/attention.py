"""Which attention implementation a model is loaded with."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from aapa_lightning.errors import MissingDependencyError


def resolve_attention(name: str, dtype: torch.dtype) -> str:
    """The attention implementation that ``auto`` stands for on this machine; other names are returned unchanged.

    Raises:
        MissingDependencyError: flash-attention 2 is asked for by name and not installed.
    """
    if name == "flash_attention_2" and not find_spec("flash_attn"):
        raise MissingDependencyError(
            "policy.attn_implementation=flash_attention_2: expected the package flash-attn, found none; "
            "pip install 'aapa-lightning[flash]', or use auto or sdpa"
        )
    if name != "auto":
        return name
    from transformers.utils import is_flash_attn_2_available

    capable = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    half = dtype in (torch.bfloat16, torch.float16)
    return "flash_attention_2" if capable and half and is_flash_attn_2_available() else "sdpa"
