"""Gradient norms of the parts of a loss: what each pulls, before they are added up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aapa_lightning.loop.shards import local, sharded_gradient, sum_over_shards
from aapa_lightning.loop.terms import LossTerm
from aapa_lightning.sharding import reshard, shard_units
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
        self._sharded: list[nn.Parameter] = []

    def due(self, step: int) -> bool:
        """Whether optimiser step ``step`` is measured."""
        return self.every > 0 and step % self.every == 0

    def add(self, terms: Sequence[LossTerm], scale: float, model: nn.Module) -> None:
        """Add one micro-step; ``scale`` is what the losses were multiplied by. Leaves every ``.grad`` and the graph alone."""
        self._micro_steps += 1
        reshard(model)  # parameters gathered by a forward are not those that keep gradients
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._sharded = parameters if shard_units(model) else []
        for term in terms:
            gradient = _gradient(term, scale, parameters, model)
            self._gradients[term.name] = self._gradients.get(term.name, 0.0) + gradient

    def compute(self, sum_over_ranks: SumOverRanks) -> dict[str, float]:
        """``grad_norms/NAME`` of every term, weight included, over micro-steps and ranks; empties itself. All ranks call it together."""
        if not self._gradients:
            return {}
        ranks = int(sum_over_ranks(torch.ones(())))
        found: dict[str, float] = {}
        for name, gradient in sorted(self._gradients.items()):
            if self._sharded:  # averages over ranks already
                parts = (gradient / self._micro_steps).split([local(p).numel() for p in self._sharded])
                found[f"grad_norms/{name}"] = math.sqrt(sum_over_shards(self._sharded, [part.norm().square()[None] for part in parts])[0])
            else:
                found[f"grad_norms/{name}"] = float((sum_over_ranks(gradient) / (self._micro_steps * ranks)).norm())
        self._gradients, self._micro_steps, self._sharded = {}, 0, []
        return found


def _gradient(term: LossTerm, scale: float, parameters: Sequence[nn.Parameter], model: nn.Module) -> Tensor:
    """Flat float32 gradient of the weighted term, this rank's shards of it where the model is sharded; zeros where it has none."""
    if term.weight == 0 or not term.outputs.losses.requires_grad:
        return torch.zeros(sum(local(p).numel() for p in parameters), device=parameters[0].device)
    loss = term.weight * term.reduce(scale)
    if shard_units(model):
        parts: list[Tensor] = sharded_gradient(model, loss, parameters, retain_graph=True)
    else:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return torch.cat([local(part).float().flatten() for part in parts])
