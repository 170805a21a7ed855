"""Gradient norms of the parts of a loss: what each pulls, before they are added up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from aapa_lightning.errors import ConfigError
from aapa_lightning.loop.terms import LossTerm
from aapa_lightning.types import SumOverRanks


class TermNorms:
    """Gathers the gradient of every term over the micro-steps of an optimiser step.

    Args:
        every: optimiser steps between two that are measured; 0 measures none.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._gradients: dict[str, Tensor] = {}
        self._micro_steps = 0

    def due(self, step: int) -> bool:
        """Whether optimiser step ``step`` is measured."""
        return self.every > 0 and step % self.every == 0

    def add(self, terms: Sequence[LossTerm], scale: float, parameters: Sequence[nn.Parameter]) -> None:
        """Add one micro-step; ``scale`` is what the losses were multiplied by. Leaves every ``.grad`` and the graph alone."""
        self._micro_steps += 1
        for term in terms:
            gradient = _gradient(term, scale, parameters)
            self._gradients[term.name] = self._gradients.get(term.name, 0.0) + gradient

    def compute(self, sum_over_ranks: SumOverRanks) -> dict[str, float]:
        """``grad_norm/NAME`` of every term, weight included, over micro-steps and ranks; empties itself. All ranks call it together."""
        if not self._gradients:
            return {}
        ranks = int(sum_over_ranks(torch.ones(())))
        found = {
            f"grad_norm/{name}": float((sum_over_ranks(gradient) / (self._micro_steps * ranks)).norm())
            for name, gradient in sorted(self._gradients.items())
        }
        self._gradients, self._micro_steps = {}, 0
        return found


def _gradient(term: LossTerm, scale: float, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Flat float32 gradient of the weighted term; zeros where it has none."""
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise ConfigError("term_norms_every: expected whole parameters, found sharded ones; set it to 0 under a sharded strategy")
    total = sum(parameter.numel() for parameter in parameters)
    if term.weight == 0 or not term.outputs.losses.requires_grad:
        return torch.zeros(total, device=parameters[0].device)
    gradients = torch.autograd.grad(term.weight * term.reduce(scale), parameters, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return torch.cat([part.detach().float().flatten() for part in parts])
