"""The trainer's precision, and those that a module in training refuses."""

from __future__ import annotations

from typing import Any

from aapa_lightning.errors import ConfigError


def trainer_precision(module: Any) -> str:
    """The precision of a module's trainer, such as ``bf16-mixed``; empty without a trainer."""
    return str(getattr(module._trainer, "precision", ""))


def refuse_true_precision(precision: str) -> None:
    """Raise ConfigError for a trainer's precision that would round what is kept in float32, or widen a part of it."""
    if precision in ("16-true", "bf16-true"):
        raise ConfigError(
            f"trainer.precision={precision} makes every new tensor 16-bit, log-probs and sums too; use "
            f"{precision.replace('true', 'mixed')}, or 32-true with policy.dtype (of a reward model base.dtype) for 16-bit weights"
        )
    if precision == "64-true":
        raise ConfigError(
            "trainer.precision=64-true makes new tensors 64-bit, and rewards, scores and log-probs are kept in 32; use 32-true, with "
            "policy.dtype float64 (of a reward model base.dtype) for 64-bit weights"
        )


def allow_clipping(optimizer: Any, trainer: Any) -> None:
    """Let Lightning clip the gradients of a fused optimiser where no scaler has changed them.

    Raises:
        ConfigError: one has (16-mixed): a fused optimiser takes the scale out within its step, after the clipping.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False) or not trainer.gradient_clip_val:
        return
    if trainer.precision == "16-mixed":
        raise ConfigError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val} with a fused {type(optimizer).__name__} in 16-mixed: it unscales "
            "gradients within its step, too late to clip them; set optimizer.init_args.fused to false, or trainer.precision to bf16-mixed"
        )
    optimizer._step_supports_amp_scaling = False  # what Lightning asks before it clips; only a scaler reads it else
