"""The trainer's precision, and those that a module in training refuses."""

from __future__ import annotations

from typing import Any

from aapa_lightning.errors import ConfigError


def trainer_precision(module: Any) -> str:
    """The precision of a module's trainer, such as ``bf16-mixed``; empty without a trainer."""
    return str(getattr(module._trainer, "precision", ""))


def refuse_true_precision(precision: str) -> None:
    """Raise ConfigError for a trainer's precision that would round what is kept in float32."""
    if precision in ("16-true", "bf16-true"):
        raise ConfigError(
            f"trainer.precision={precision} makes every new tensor 16-bit, log-probs and sums too; use "
            f"{precision.replace('true', 'mixed')}, or 32-true with policy.dtype (of a reward model base.dtype) for 16-bit weights"
        )
