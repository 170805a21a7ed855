"""Kahneman-Tversky optimisation: single responses, labelled desirable or not."""

from __future__ import annotations

import torch
from torch import Tensor

from aapa_lightning.objectives.pairs import accuracy, check_positive, widened
from aapa_lightning.types import LabelLossInputs, LossOutputs


def _reference_point(inputs: LabelLossInputs) -> Tensor:
    """``max(0, mean of the mismatched log-ratios of all ranks)``, a scalar without gradient; 0 where there are none."""
    ratios = widened(inputs.mismatched_log_ratios).detach()
    # Ranks may hold different numbers of them: a sum and a count can be gathered, and the mean of means would be another number.
    total, count = inputs.gather(torch.stack((ratios.sum(), torch.full_like(ratios.sum(), ratios.numel())))).view(-1, 2).sum(0)
    return (total / count.clamp(min=1.0)).clamp(min=0.0)


def kto_loss(inputs: LabelLossInputs, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> LossOutputs:
    r"""Kahneman-Tversky optimisation per labelled response.

    ``l = desirable_weight (1 - sigma(beta (r - z0)))`` of a desirable response, else ``undesirable_weight (1 - sigma(beta (z0 - r)))``,
    with ``r = log pi(y) - log pi_ref(y)`` and ``z0 = max(0, mean r')`` over the step's responses r' to other prompts, of all ranks,
    detached.

    Args:
        inputs: policy and reference log-probs (sums over tokens), labels, mismatched log-ratios.
        beta: as in ``dpo_loss``.
        desirable_weight: with unequal numbers of labels the authors keep ``desirable_weight * desirable`` within 1 and 4/3 times
            ``undesirable_weight * undesirable``.
        undesirable_weight: see there.

    Returns:
        Losses ``[R]``; metrics ``margin`` (r - z0, or z0 - r of an undesirable response), ``weight`` (-d loss / d margin), ``accuracy``
        (1 where the margin is positive, 0.5 where it is 0), ``reward`` (beta r), ``desirable`` (1 or 0) and ``kl`` (z0).

    Raises:
        ConfigError: an option that is not positive.

    Reference: Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization, 2024, arXiv 2402.01306, eq. 7.

    >>> good, none = torch.tensor([True, False]), torch.zeros(0)
    >>> kto_loss(LabelLossInputs(torch.tensor([-4.0, -4.0]), torch.tensor([-5.0, -5.0]), good, none), beta=1.0).losses
    tensor([0.2689, 0.7311])
    """
    check_positive(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    log_ratio = widened(inputs.logprobs) - widened(inputs.ref_logprobs).detach()
    reference_point = _reference_point(inputs)
    desirable = inputs.labels.to(log_ratio.dtype)
    margin = (2.0 * desirable - 1.0) * (log_ratio - reference_point)
    label_weight = desirable_weight * desirable + undesirable_weight * (1.0 - desirable)
    # 1 - sigma(z) as sigma(-z) keeps its digits where it is small.
    losses = label_weight * torch.sigmoid(-beta * margin)
    metrics = {
        "margin": margin,
        "weight": beta * losses * torch.sigmoid(beta * margin),
        "accuracy": accuracy(margin),
        "reward": beta * log_ratio,
        "desirable": desirable,
        "kl": reference_point.expand_as(margin),
    }
    return LossOutputs(losses, {name: value.detach() for name, value in metrics.items()})
