"""Adaptive-margin preference optimisation: a target margin for the pairs below the batch's mean."""

from __future__ import annotations

import torch
from torch import Tensor

from aapa_lightning.objectives.kl import LOG_RATIO_LIMIT
from aapa_lightning.objectives.pairs import check_positive, check_smoothing, logistic, mean_logprobs, pair_outputs
from aapa_lightning.types import LossOutputs, PairLossInputs


def _mean_and_std(values: Tensor) -> tuple[Tensor, Tensor]:
    # Taken relative to the first value, so that the mean of equal values is that value, not a rounding above it.
    first = values[:1].sum()
    mean = first + (values - first).sum() / max(len(values), 1)
    return mean, ((values - mean).square().sum() / max(len(values) - 1, 1)).sqrt()


def amapo_loss(inputs: PairLossInputs, *, beta: float = 2.0, label_smoothing: float = 0.0) -> LossOutputs:
    r"""Adaptive-margin preference optimisation per pair.

    ``l = -log sigma(z)`` with ``z = beta M_i - m_i``, ``M = log pi(y_w) / |y_w| - log pi(y_l) / |y_l|`` and the adaptive margin
    ``m_i = sg[beta exp(mu (mu - M_i) / s)]`` where ``M_i < mu``, else 0; mu and s are mean and standard deviation (n - 1) of M over the
    pairs of all ranks. The exponent is capped at 20. A single pair, and pairs with equal M, have no adaptive margin. With label smoothing:
    ``-(1 - eps) log sigma(z) - eps log sigma(-z)``.

    Args:
        inputs: policy log-probs and lengths, no reference; ``gather`` makes the batch of all ranks.
        beta: the authors' for Mistral-7B (Llama-3-8B: 2.5 base, 3.0 instruct).
        label_smoothing: eps in [0, 0.5).

    Returns:
        Losses ``[B]`` in nats; metrics ``margin`` (M), ``adaptive_margin`` (m), ``weight``, ``accuracy``, ``chosen_logprob``,
        ``rejected_logprob``.

    Raises:
        ConfigError: an option out of range.

    Reference: AMaPO: Adaptive Margin-attached Preference Optimization for Language Model Alignment, 2025, arXiv 2511.09385.

    >>> logprobs, lengths = torch.tensor([[-1.0, -2.0], [-2.0, -1.0]]), torch.ones(2, 2, dtype=torch.int64)
    >>> amapo_loss(PairLossInputs(*logprobs, *lengths), beta=1.0).losses
    tensor([0.3133, 2.1269])
    """
    check_positive(beta=beta)
    check_smoothing(label_smoothing)
    chosen, rejected = mean_logprobs(inputs)
    margin = chosen - rejected
    held = margin.detach()
    mean, std = _mean_and_std(inputs.gather(held))
    exponent = (mean * (mean - held) / std).clamp(max=LOG_RATIO_LIMIT)
    target = torch.where(held < mean, beta * exponent.exp(), 0.0)
    losses, slope = logistic(beta * margin - target, label_smoothing)
    return pair_outputs(inputs, losses, margin, beta * slope, adaptive_margin=target)
