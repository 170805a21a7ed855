"""Loss terms of a step and their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from aapa_lightning.reduce import StepCounts, aggregate
from aapa_lightning.types import LossOutputs


@dataclass(slots=True)
class LossTerm:
    """One part of a loss: per-token values, what reduces them and what they weigh.

    Args:
        name: prefix of its metrics.
        outputs: unreduced losses and metrics.
        mask: bool ``[N, L]``.
        counts: of the optimiser step, over micro-steps and ranks.
        aggregation: ``grpo``, ``bnpo``, ``dapo`` or ``dr_grpo``.
        weight: factor in the total.
        max_response_tokens: constant of ``dr_grpo``.
    """

    name: str
    outputs: LossOutputs
    mask: Tensor
    counts: StepCounts
    aggregation: str = "dapo"
    weight: float = 1.0
    max_response_tokens: int | None = None

    def reduce(self, scale: float) -> Tensor:
        """The term's share of the step's loss, unweighted, times ``scale``."""
        return aggregate(self.outputs.losses, self.mask, self.aggregation, self.counts, self.max_response_tokens, scale=scale)


def column_term(name: str, outputs: LossOutputs, counts: StepCounts) -> LossTerm:
    """One loss a row ``[B]`` (of pairs) as a term whose rows have one entry each, divided by the step's rows."""
    losses = outputs.losses[:, None]
    metrics = {key: value[:, None] for key, value in outputs.metrics.items()}
    return LossTerm(name, LossOutputs(losses, metrics), torch.ones_like(losses, dtype=torch.bool), counts, "grpo")


def join_terms(first: LossTerm, second: LossTerm) -> LossTerm:
    """One term over the rows of two, with one normaliser: the tokens and responses of both.

    Args:
        first: gives name, aggregation, weight and constants.
        second: has the same metrics; its rows follow those of ``first``.
    """
    width = max(first.mask.shape[1], second.mask.shape[1])

    def stack(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([nn.functional.pad(part, (0, width - part.shape[1])) for part in (a, b)])

    metrics = {name: stack(value, second.outputs.metrics[name]) for name, value in first.outputs.metrics.items()}
    counts = StepCounts(first.counts.tokens + second.counts.tokens, first.counts.responses + second.counts.responses)
    outputs = LossOutputs(stack(first.outputs.losses, second.outputs.losses), metrics)
    return replace(first, outputs=outputs, mask=stack(first.mask, second.mask), counts=counts)


def total_loss(terms: Sequence[LossTerm], scale: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the terms.

    Args:
        terms: at least one. A term of weight 0 is logged and leaves the sum untouched, bit for bit.
        scale: micro-steps x ranks, which the trainer divides by afterwards.

    Returns:
        The loss (scalar, with graph) and each term's reduced value times ``scale``, detached.
    """
    total: Tensor | None = None
    values: dict[str, Tensor] = {}
    for term in terms:
        with torch.set_grad_enabled(torch.is_grad_enabled() and term.weight != 0):
            value = term.reduce(scale)
        values[term.name] = value.detach()
        if term.weight != 0:
            weighted = value if term.weight == 1 else term.weight * value
            total = weighted if total is None else total + weighted
    if total is None:
        # every weight is 0: a zero that still has a graph
        total = terms[0].outputs.losses.sum() * 0.0
    return total, values
