"""Simple preference optimisation: length-normalised, with a target margin, without a reference."""

from __future__ import annotations

from aapa_lightning.errors import WEIGHT, check_numbers
from aapa_lightning.objectives.pairs import check_positive, check_smoothing, logistic, mean_logprobs, pair_outputs
from aapa_lightning.types import LossOutputs, PairLossInputs


def simpo_loss(inputs: PairLossInputs, *, beta: float = 2.5, gamma_beta_ratio: float = 0.55, label_smoothing: float = 0.0) -> LossOutputs:
    r"""Simple preference optimisation per pair.

    ``l = -log sigma(z)`` with ``z = beta (M - gamma_beta_ratio)`` and ``M = log pi(y_w) / |y_w| - log pi(y_l) / |y_l|``. The target margin
    gamma is ``beta * gamma_beta_ratio``. With label smoothing: ``-(1 - eps) log sigma(z) - eps log sigma(-z)``.

    Args:
        inputs: policy log-probs and lengths; no reference.
        beta: per-token margins are small, so it is larger than DPO's.
        gamma_beta_ratio: target margin in nats per token. The defaults are the authors' for Llama-3-8B-Instruct (Gemma-2-9B: 10 and 0.5).
        label_smoothing: eps in [0, 0.5), as in TRL's CPO trainer.

    Returns:
        Losses ``[B]`` in nats; metrics ``margin`` (M), ``weight``, ``accuracy``, ``chosen_logprob``, ``rejected_logprob``.

    Raises:
        ConfigError: an option out of range.

    Reference: Meng et al., SimPO: Simple Preference Optimization with a Reference-Free Reward, 2024, arXiv 2405.14734, eq. 6.

    >>> import torch
    >>> simpo_loss(PairLossInputs(*torch.tensor([[-4.0], [-9.0]]), *torch.tensor([[2], [3]])), beta=2.0, gamma_beta_ratio=0.5).losses
    tensor([0.3133])
    """
    check_positive(beta=beta)
    check_smoothing(label_smoothing)
    check_numbers({"gamma_beta_ratio": gamma_beta_ratio}, {"gamma_beta_ratio": WEIGHT})
    chosen, rejected = mean_logprobs(inputs)
    margin = chosen - rejected
    losses, slope = logistic(beta * (margin - gamma_beta_ratio), label_smoothing)
    return pair_outputs(inputs, losses, margin, beta * slope)
