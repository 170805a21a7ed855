"""The one place that sums over tokens and divides.

Objectives return per-token values. Here they become one scalar, divided by a count of the whole optimiser step, so that the gradient does
not change with micro-batch size, accumulation, padding or number of ranks. The mask is final: rows masked as truncated leave numerator
and denominator alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aapa_lightning.errors import ConfigError, choose

Aggregation = Literal["dapo", "grpo", "dr_grpo", "bnpo"]


@dataclass(frozen=True, slots=True)
class StepCounts:
    """What one optimiser step divides by: counts over its micro-steps and all ranks.

    Args:
        tokens: unmasked tokens.
        responses: rows with at least one unmasked token.
    """

    tokens: float
    responses: float

    @classmethod
    def from_tensor(cls, counts: Tensor) -> StepCounts:
        """Read what ``count_step`` gave, after it was summed over micro-steps and ranks."""
        tokens, responses = counts.tolist()
        return cls(float(tokens), float(responses))


def count_step(mask: Tensor) -> Tensor:
    """Count the tokens and responses of a mask; counts of several masks and ranks add up.

    Args:
        mask: bool ``[N, L]``.

    Returns:
        int64 ``[2]``: tokens, rows with at least one token.

    >>> count_step(torch.tensor([[True, True], [True, False], [False, False]]))
    tensor([3, 2])
    """
    return torch.stack((mask.sum(), mask.any(-1).sum()))


class Mean(float):
    """A mean that keeps its parts, so that the means of ranks and windows can be joined: a float, 0 for the mean of nothing.

    Args:
        total: sum of the values.
        count: how many they are, or what they weigh together.

    >>> Mean(6.0, 4), Mean(6.0, 4).count, Mean(0.0, 0)
    (1.5, 4.0, 0.0)
    """

    total: float
    count: float

    def __new__(cls, total: float, count: float) -> Mean:
        """The mean, with its parts as attributes."""
        mean = super().__new__(cls, total / count if count else 0.0)
        mean.total, mean.count = float(total), float(count)
        return mean

    @classmethod
    def of(cls, values: Tensor) -> Mean:
        """The mean of a tensor's values, summed in float64 where the device has it."""
        kind = torch.float32 if values.device.type == "mps" else torch.float64
        return cls(float(values.to(kind).sum()), values.numel())


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the unmasked values, in float32 at least; what stands on masked positions (NaN too) has no effect on value or gradient.

    >>> masked_sum(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
    tensor(1.)
    """
    kept = values.to(torch.promote_types(values.dtype, torch.float32)).masked_fill(~mask, 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the unmasked values; the mean of nothing is 0 and keeps its graph.

    >>> masked_mean(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[True, True], [False, False]]), dim=-1)
    tensor([2., 0.])
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def _sequence_mean(losses: Tensor, mask: Tensor, counts: StepCounts, max_response_tokens: int | None, scale: float) -> Tensor:
    return masked_mean(losses, mask, dim=-1).sum() * (scale / max(counts.responses, 1.0))


def _local_token_mean(losses: Tensor, mask: Tensor, counts: StepCounts, max_response_tokens: int | None, scale: float) -> Tensor:
    # The trainer's mean over micro-steps and ranks is part of this definition, so nothing is multiplied back.
    return masked_mean(losses, mask)


def _token_mean(losses: Tensor, mask: Tensor, counts: StepCounts, max_response_tokens: int | None, scale: float) -> Tensor:
    return masked_sum(losses, mask) * (scale / max(counts.tokens, 1.0))


def _constant_length(losses: Tensor, mask: Tensor, counts: StepCounts, max_response_tokens: int | None, scale: float) -> Tensor:
    if not max_response_tokens:
        raise ConfigError("aggregation dr_grpo divides by the maximum response length: expected max_response_tokens >= 1, found none")
    return masked_sum(losses, mask) * (scale / (max(counts.responses, 1.0) * max_response_tokens))


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor, StepCounts, int | None, float], Tensor]] = {
    "grpo": _sequence_mean,
    "bnpo": _local_token_mean,
    "dapo": _token_mean,
    "dr_grpo": _constant_length,
}


def aggregate(
    losses: Tensor,
    mask: Tensor,
    aggregation: str,
    counts: StepCounts,
    max_response_tokens: int | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    r"""Reduce the per-token losses of one micro-step to a scalar.

    ======== =================================================== ==================================
    name     share of the step's loss                            what a long response weighs
    ======== =================================================== ==================================
    grpo     ``sum_i (sum_t l_it / len_i) / responses``          as much as a short one
    dapo     ``sum l / tokens``                                  in proportion to its tokens
    dr_grpo  ``sum l / (responses * max_response_tokens)``       in proportion, constant divisor
    bnpo     ``sum l / tokens`` of this micro-step on this rank  in proportion, inside a micro-step
    ======== =================================================== ==================================

    The shares of an optimiser step's micro-steps and ranks add up to its loss. ``bnpo`` is local by definition: it changes with the
    micro-batch size and the number of ranks, and ignores ``counts`` and ``scale``.

    Args:
        losses: ``[N, L]``, nats.
        mask: bool ``[N, L]``, final. All masked: a zero with a graph.
        aggregation: ``grpo`` (DeepSeekMath, arXiv 2402.03300), ``bnpo``, ``dapo`` (arXiv 2503.14476) or ``dr_grpo`` (arXiv 2503.20783).
        counts: of the whole optimiser step.
        max_response_tokens: the constant of ``dr_grpo``.
        scale: undoes what the trainer divides by afterwards: micro-steps per optimiser step (Lightning) times ranks (DDP).

    Returns:
        Scalar, float32 (float64 for float64 losses).

    Raises:
        ConfigError: an unknown aggregation, or ``dr_grpo`` without a length.

    >>> losses = torch.tensor([[1.0, 3.0], [6.0, 0.0]])
    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> counts = StepCounts.from_tensor(count_step(mask))
    >>> [round(aggregate(losses, mask, name, counts, 4).item(), 3) for name in AGGREGATIONS]
    [4.0, 3.333, 3.333, 1.25]
    """
    return choose(AGGREGATIONS, aggregation, "aggregation")(losses, mask, counts, max_response_tokens, scale)
