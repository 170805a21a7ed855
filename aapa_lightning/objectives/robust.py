"""DPO for noisy labels: conservative, robust (unbiased) and ROPO's."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from aapa_lightning.objectives.pairs import check_positive, check_smoothing, log_ratios, logistic, pair_outputs
from aapa_lightning.types import LossOutputs, PairLossInputs


def cdpo_loss(inputs: PairLossInputs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> LossOutputs:
    r"""Conservative DPO per pair: the loss that a label flipped with probability eps has on average.

    ``l = -(1 - eps) log sigma(z) - eps log sigma(-z)`` with ``z = beta h``, h as in ``dpo_loss``.

    Args:
        inputs: policy and reference log-probs (sums over tokens).
        beta: as in ``dpo_loss``.
        label_smoothing: eps in [0, 0.5), the assumed share of flipped labels; 0 is DPO.

    Returns:
        Losses ``[B]`` in nats; metrics as of ``dpo_loss`` (``weight`` is negative where z is past ``log((1 - eps) / eps)``).

    Raises:
        ConfigError: no reference log-probs, or an option out of range.

    Reference: E. Mitchell, A note on DPO with noisy preferences, 2023, https://ericmitchell.ai/cdpo.pdf, eq. 3.

    >>> policy, lengths, ref = torch.tensor([[-4.0], [-6.0]]), torch.tensor([[2], [3]]), torch.tensor([[-5.0], [-5.0]])
    >>> cdpo_loss(PairLossInputs(*policy, *lengths, *ref), beta=1.0).losses
    tensor([0.3269])
    """
    check_positive(beta=beta)
    check_smoothing(label_smoothing)
    chosen, rejected = log_ratios(inputs)
    margin = chosen - rejected
    losses, slope = logistic(beta * margin, label_smoothing)
    return pair_outputs(inputs, losses, margin, beta * slope, chosen_reward=beta * chosen, rejected_reward=beta * rejected)


def rdpo_loss(inputs: PairLossInputs, *, beta: float = 0.1, label_smoothing: float = 0.1) -> LossOutputs:
    r"""Robust DPO per pair: on labels flipped with probability eps, its average is DPO's on clean ones.

    ``l = [-(1 - eps) log sigma(z) + eps log sigma(-z)] / (1 - 2 eps)`` with ``z = beta h``, h as in ``dpo_loss``. It is negative, without
    a lower bound, for a pair that is ranked rightly by far.

    Args:
        inputs: policy and reference log-probs (sums over tokens).
        beta: as in ``dpo_loss``.
        label_smoothing: eps in [0, 0.5), the share of flipped labels; 0 is DPO.

    Returns:
        Losses ``[B]`` in nats; metrics as of ``dpo_loss``.

    Raises:
        ConfigError: no reference log-probs, or an option out of range.

    Reference: Chowdhury et al., Provably Robust DPO: Aligning Language Models with Noisy Feedback, 2024, arXiv 2403.00409.

    >>> policy, lengths, ref = torch.tensor([[-4.0], [-6.0]]), torch.tensor([[2], [3]]), torch.tensor([[-5.0], [-5.0]])
    >>> rdpo_loss(PairLossInputs(*policy, *lengths, *ref), beta=1.0).losses
    tensor([-0.1231])
    """
    check_positive(beta=beta)
    check_smoothing(label_smoothing)
    chosen, rejected = log_ratios(inputs)
    margin = chosen - rejected
    # Since log sigma(-z) = log sigma(z) - z, this is the conservative loss with a negative eps.
    losses, slope = logistic(beta * margin, -label_smoothing / (1.0 - 2.0 * label_smoothing))
    return pair_outputs(inputs, losses, margin, beta * slope, chosen_reward=beta * chosen, rejected_reward=beta * rejected)


def ropo_loss(inputs: PairLossInputs, *, beta: float = 0.1, alpha: float = 14.0) -> LossOutputs:
    r"""Noise-tolerant loss of ROPO per pair: DPO's, and a bounded one that leaves pairs ranked wrongly by far alone.

    ``l = 4 alpha / (1 + alpha)^2 * (-log sigma(z)) + 4 alpha^2 / (1 + alpha)^2 * sigma(-z)`` with ``z = beta h``, h as in ``dpo_loss``.

    Args:
        inputs: policy and reference log-probs (sums over tokens).
        beta: as in ``dpo_loss``.
        alpha: the bounded part weighs alpha times DPO's.

    Returns:
        Losses ``[B]``; metrics as of ``dpo_loss``.

    Raises:
        ConfigError: no reference log-probs, or an option that is not positive.

    Reference: Liang et al., ROPO: Robust Preference Optimization for Large Language Models, 2024, arXiv 2404.04102.

    >>> policy, lengths, ref = torch.tensor([[-4.0], [-6.0]]), torch.tensor([[2], [3]]), torch.tensor([[-5.0], [-5.0]])
    >>> ropo_loss(PairLossInputs(*policy, *lengths, *ref), beta=1.0, alpha=1.0).losses
    tensor([0.2461])
    """
    check_positive(beta=beta, alpha=alpha)
    chosen, rejected = log_ratios(inputs)
    margin = chosen - rejected
    logits = beta * margin
    dpo_share = 4.0 * alpha / (1.0 + alpha) ** 2
    losses = dpo_share * (alpha * torch.sigmoid(-logits) - F.logsigmoid(logits))
    weight = beta * dpo_share * torch.sigmoid(-logits) * (1.0 + alpha * torch.sigmoid(logits))
    return pair_outputs(inputs, losses, margin, weight, chosen_reward=beta * chosen, rejected_reward=beta * rejected)
