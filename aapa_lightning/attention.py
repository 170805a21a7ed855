"""Which attention implementation a model computes with."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import torch

from aapa_lightning.errors import ConfigError, MissingDependencyError, in_one_line

_HALF = (torch.bfloat16, torch.float16)
_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True, slots=True)
class _Flash:
    """A release of flash attention.

    Args:
        package: its distribution.
        majors: compute capabilities on which ``auto`` takes it.
        install: how to get it.
        plain: it knows neither dropout nor, in every backward pass, soft caps.
    """

    package: str
    majors: range
    install: str
    plain: bool


#: Newest first.
_FLASH = {
    "flash_attention_4": _Flash("flash-attn-4", range(9, 12), "pip install 'aapa-lightning[flash]'", plain=True),
    "flash_attention_3": _Flash("flash-attn-3", range(9, 10), "build it from the folder hopper of Dao-AILab/flash-attention", plain=True),
    "flash_attention_2": _Flash("flash-attn", range(8, 13), "pip install flash-attn --no-build-isolation", plain=False),
}


def compute_dtype(dtype: torch.dtype, precision: str = "") -> torch.dtype:
    """The dtype of a forward pass: that of the weights, or of the trainer's mixed precision.

    >>> compute_dtype(torch.float32, "bf16-mixed")
    torch.bfloat16
    """
    return _MIXED.get(precision, dtype)


def resolve_attention(name: str, dtype: torch.dtype, precision: str = "") -> str | None:
    """What transformers is asked for while it loads a model.

    Args:
        name: ``auto``, or a name that transformers knows.
        dtype: of the weights.
        precision: the trainer's; empty where nobody knows yet.

    Returns:
        The name; None for ``auto``: transformers then takes SDPA where the model knows it, else eager attention, until
        ``use_flash_attention`` has seen the model.

    Raises:
        MissingDependencyError: a release of flash attention is asked for by name and not installed.
        ConfigError: it would have to compute in float32.
    """
    flash = _FLASH.get(name)
    if flash is not None:
        _check_installed(name, flash)
        if precision and compute_dtype(dtype, precision) not in _HALF:
            raise ConfigError(
                f"attn_implementation={name} computes in 16 bits: expected trainer.precision bf16-mixed or a 16-bit policy.dtype, "
                f"found {precision} and {str(dtype).removeprefix('torch.')}; or use auto or sdpa"
            )
    return None if name == "auto" else name


def _check_installed(name: str, flash: _Flash) -> None:
    from transformers.utils import is_kernels_available

    try:
        distribution(flash.package)
    except PackageNotFoundError as error:
        if not is_kernels_available():  # with it, transformers fetches a build from the Hub
            raise MissingDependencyError(
                f"policy.attn_implementation={name}: expected the package {flash.package}, found none; {flash.install}, or use auto or sdpa"
            ) from error


def use_flash_attention(model: Any, dtype: torch.dtype) -> str:
    """Give a loaded model the newest flash attention that is installed, that the GPU runs and that the model allows; else leave it.

    Args:
        model: a Hugging Face model, with adapters or without.
        dtype: in which it will compute, see ``compute_dtype``. Flash attention is for 16 bits.

    Returns:
        The implementation that the model now has.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if dtype in _HALF and torch.cuda.is_available():
        major = torch.cuda.get_device_capability()[0]
        for name, flash in _FLASH.items():
            if major in flash.majors and _available(name) and _fits(model, name, flash, major):
                try:
                    model.set_attn_implementation(name)
                    break
                except Exception as error:  # a build for another CUDA or torch fails in its own way when it is imported
                    warnings.warn(f"{name} is installed and cannot be used: {in_one_line(error)}", stacklevel=2)
    return str(model.config._attn_implementation)


def _available(name: str) -> bool:
    import transformers.utils

    known = getattr(transformers.utils, f"is_flash_attn_{name[-1]}_available", None)
    return known is not None and bool(known())


def _fits(model: Any, name: str, flash: _Flash, major: int) -> bool:
    allowed = getattr(model, "_compatible_flash_implementations", None)
    if not getattr(model, "_supports_flash_attn", False) or (allowed is not None and name not in allowed):
        return False
    softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if flash.plain and (softcap or any(_dropout(module) for module in model.modules())):
        return False
    # the fourth release on Blackwell has kernels for 128 and less, and for 256
    largest = 128 if name == "flash_attention_4" and major > 9 else 256
    widths = _head_widths(model)
    return bool(widths) and all(width % 8 == 0 and (width <= largest or width == 256) for width in widths)


def _dropout(module: Any) -> float:
    found = getattr(module, "attention_dropout", 0.0)
    return float(getattr(found, "p", found))


def _head_widths(model: Any) -> set[int]:
    """Sizes of the model's attention heads, which may differ from layer to layer."""
    names = ("head_dim", "qk_head_dim", "v_head_dim")
    return {size for module in model.modules() for name in names if isinstance(size := getattr(module, name, None), int)}
