"""Objectives: pure functions from log-probs to per-token losses, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aapa_lightning.objectives.chord import chord_sft_loss
from aapa_lightning.objectives.grpo import grpo_loss
from aapa_lightning.objectives.sft import sft_loss
from aapa_lightning.objectives.surrogate import clipped_surrogate
from aapa_lightning.types import LossOutputs, TokenLossInputs


def on_demonstrations(loss: Callable[..., LossOutputs]) -> Callable[..., LossOutputs]:
    """Give a loss on expert tokens, ``loss(logprobs, response_mask, **options)``, the signature of the table."""

    def objective(inputs: TokenLossInputs, **options: Any) -> LossOutputs:
        return loss(inputs.logprobs, inputs.response_mask, **options)

    return objective


#: Every token-level objective, called as ``OBJECTIVES[name](inputs, **options)``. A new row is checked by the battery of its tests.
OBJECTIVES: dict[str, Callable[..., LossOutputs]] = {
    "sft": on_demonstrations(sft_loss),
    "surrogate": clipped_surrogate,
    "grpo": grpo_loss,
    "chord_sft": on_demonstrations(chord_sft_loss),
}
