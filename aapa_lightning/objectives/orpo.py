"""Odds-ratio preference optimisation, without its imitation term."""

from __future__ import annotations

import torch
from torch import Tensor

from aapa_lightning.objectives.pairs import check_positive, logistic, mean_logprobs, pair_outputs
from aapa_lightning.types import LossOutputs, PairLossInputs

#: Largest mean log-prob whose odds are taken: at probability 1 they are infinite, and their gradient too.
MAX_LOGPROB = -1e-6


def _log_odds(logprobs: Tensor) -> Tensor:
    logprobs = logprobs.clamp(max=MAX_LOGPROB)
    # 1 - p by expm1, which keeps its digits where p is close to 1; where p is small, the lost ones do not show beside log p.
    return logprobs - torch.log(-torch.expm1(logprobs))


def orpo_loss(inputs: PairLossInputs, *, beta: float = 0.1) -> LossOutputs:
    r"""Odds-ratio term of ORPO per pair.

    ``l = -beta log sigma(O)`` with ``O = log odds_w - log odds_l``, ``odds = p / (1 - p)`` and p the geometric mean of the response's token
    probabilities. The whole objective adds the chosen responses' NLL with weight 1, which is not in here: the module adds it, as a mean
    over the step's response tokens. TRL takes that mean over the prompt's tokens too.

    Args:
        inputs: policy log-probs and lengths; no reference. Mean log-probs above -1e-6 count as -1e-6, without gradient.
        beta: the paper's lambda.

    Returns:
        Losses ``[B]`` in nats; metrics ``margin`` (O), ``weight``, ``accuracy``, ``chosen_logprob``, ``rejected_logprob``.

    Raises:
        ConfigError: a beta that is not positive.

    Reference: Hong et al., ORPO: Monolithic Preference Optimization without Reference Model, 2024, arXiv 2403.07691, eq. 4 and 7.

    >>> orpo_loss(PairLossInputs(*torch.tensor([[0.5], [0.2]]).log(), *torch.tensor([[1], [1]])), beta=1.0).losses
    tensor([0.2231])
    """
    check_positive(beta=beta)
    chosen, rejected = mean_logprobs(inputs)
    margin = _log_odds(chosen) - _log_odds(rejected)
    losses, slope = logistic(margin)
    return pair_outputs(inputs, beta * losses, margin, beta * slope)
