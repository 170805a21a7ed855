"""Distributionally robust DPO: the pairs of a batch weighted by how well they fit."""

from __future__ import annotations

import torch

from aapa_lightning.objectives.pairs import check_positive, log_ratios, logistic, pair_outputs
from aapa_lightning.types import LossOutputs, PairLossInputs


def dr_dpo_loss(inputs: PairLossInputs, *, beta: float = 0.1, beta_prime: float = 1.0) -> LossOutputs:
    r"""Distributionally robust DPO: a loss of the batch, returned so that its mean over pairs and ranks has its value and gradient.

    ``L = -beta' log mean_j exp(-l_j / beta')`` with DPO's losses ``l_j`` of all n pairs of all ranks. Its gradient is
    ``sum_i w_i grad l_i`` with ``w = softmax(-l / beta')``, so pairs with a large loss, as flipped ones have, weigh little. Each returned
    loss is L, with the gradient ``n w_i grad l_i``. The batch is one micro-step: accumulated micro-steps are separate batches.

    Args:
        inputs: policy and reference log-probs (sums over tokens); ``gather`` makes the batch of all ranks.
        beta: as in ``dpo_loss``.
        beta_prime: a large one weighs all pairs alike (DPO), a small one the best ranked alone.

    Returns:
        Losses ``[B]`` in nats; metrics as of ``dpo_loss``, with ``weight`` the product ``n w_i beta sigma(-beta h_i)``.

    Raises:
        ConfigError: no reference log-probs, or an option that is not positive.

    Reference: Wu et al., Towards Robust Alignment of Language Models: Distributionally Robustifying Direct Preference Optimization, 2024,
    arXiv 2407.07880.

    >>> import torch
    >>> policy, lengths, ref = torch.tensor([[-4.0, -6.0], [-6.0, -4.0]]), torch.ones(2, 2, dtype=torch.int64), torch.full((2, 2), -5.0)
    >>> dr_dpo_loss(PairLossInputs(*policy, *lengths, *ref), beta=1.0).losses
    tensor([0.6931, 0.6931])
    """
    check_positive(beta=beta, beta_prime=beta_prime)
    chosen, rejected = log_ratios(inputs)
    margin = chosen - rejected
    pair_losses, slope = logistic(beta * margin)
    held = pair_losses.detach()
    everyone = inputs.gather(held)
    # Relative to the best pair: at losses of 1e5 the digits of a logsumexp end before those of a share begin, and at a large beta' the mean
    # of exponentials is 1 to the last digit.
    best = everyone.min() if len(everyone) else everyone.sum()
    exponents = (best - everyone) / beta_prime
    mean = exponents.exp().mean() if len(everyone) else exponents.sum() + 1
    below_one = exponents.expm1().mean() if len(everyone) else exponents.sum()
    shares = ((best - held) / beta_prime).exp() / mean
    losses = best - beta_prime * torch.where(below_one > -0.5, below_one.log1p(), mean.log()) + shares * (pair_losses - held)
    return pair_outputs(inputs, losses, margin, shares * beta * slope, chosen_reward=beta * chosen, rejected_reward=beta * rejected)
