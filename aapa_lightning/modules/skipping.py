"""Steps that are not finite are left out, on all ranks or on none."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aapa_lightning.loop.shards import local, sum_over_shards
from aapa_lightning.types import SumOverRanks


class SkipCounter:
    """Counts skipped steps and stops a run that does nothing else.

    Args:
        limit: skipped steps in a row that end the run.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self.in_a_row = 0

    def record(self, finite: bool, where: str) -> None:
        """Count a step.

        Raises:
            RuntimeError: too many in a row; the message names the last one.
        """
        self.total += not finite
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if self.in_a_row >= self.limit:
            raise RuntimeError(
                f"{self.in_a_row} optimiser steps in a row had a loss or gradient that is not finite; the last was {where}. "
                "Lower the learning rate, clip gradients (trainer.gradient_clip_val) or look at these prompts"
            )

    def state_dict(self) -> dict[str, int]:
        """Both counters."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue counting."""
        self.total, self.in_a_row = state["total"], state["in_a_row"]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Global 2-norm of the gradients, over all shards where they are sharded, float32 scalar; 0 without any."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = [local(grad).float().norm() for grad in grads]
    if any(isinstance(grad, DTensor) for grad in grads):
        return torch.tensor(sum_over_shards(grads, [norm.square()[None] for norm in norms])[0], device=norms[0].device).sqrt()
    return torch.stack([norm.to(norms[0].device) for norm in norms]).norm() if norms else torch.zeros(())


def all_finite(value: Tensor, sum_over_ranks: SumOverRanks) -> bool:
    """True when ``value`` is finite on every rank."""
    return not bool(sum_over_ranks((~torch.isfinite(value)).float()) > 0)
