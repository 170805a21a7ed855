"""Estimators of KL(policy || reference) from the policy's own samples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aapa_lightning.errors import choose

#: Largest log-ratio that is exponentiated; exp(20) is about 4.9e8, far from any ratio that carries information.
LOG_RATIO_LIMIT = 20.0


def _k3(log_ratio: Tensor) -> Tensor:
    # Capped above only: exp(-log_ratio) overflows there; a cap below would drop the gradient that pulls the policy back.
    inverse = (-log_ratio).clamp(max=LOG_RATIO_LIMIT)
    return torch.expm1(inverse) - inverse


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: 0.5 * log_ratio.square(),
    "k3": _k3,
}


#: An estimator times the ratio, by estimator, so that its expected gradient is that of KL(policy || reference).
WITH_RATIO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k2": lambda kl, ratio: ratio.detach() * kl,
    "k3": lambda kl, ratio: ratio * kl,
}


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    r"""Estimate KL(policy || reference) per token.

    With ``d = log pi - log pi_ref``: ``k1 = d``, ``k2 = d^2 / 2``, ``k3 = exp(-d) + d - 1``. As *values* ``k1`` and ``k3`` are unbiased and
    ``k2`` nearly so; as *losses* on the policy's own samples their expected gradients differ: ``k1`` gives 0, ``k2`` that of
    KL(pi || ref), ``k3`` that of KL(ref || pi). So ``k1`` belongs into the reward only. These gradients hold per token, given the tokens
    before it: what a token does to the KL of later ones is missing. ``-d`` is capped at 20 before the exponential of ``k3``; beyond, the
    gradient is 0.

    Args:
        logprobs: ``[N, L]`` nats, the policy.
        ref_logprobs: ``[N, L]`` nats, the frozen reference.
        estimator: ``k1``, ``k2`` or ``k3``.

    Returns:
        ``[N, L]`` nats; ``k2`` and ``k3`` are never negative.

    Raises:
        ConfigError: an unknown estimator.

    Reference: J. Schulman, Approximating KL Divergence, 2020, http://joschu.net/blog/kl-approx.html

    >>> kl_penalty(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), "k3")
    tensor([0.1931])
    """
    return choose(ESTIMATORS, estimator, "kl_estimator")(logprobs - ref_logprobs)


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, ratio: Tensor) -> Tensor:
    r"""KL(policy || reference) per token as a loss on samples of an older policy.

    ``sg[rho] k2`` or ``rho k3`` with ``rho = pi / pi_old`` of the token. The expected gradient of both is that of KL(pi || ref), per
    token: ``k2`` has it once the samples are weighted, and ``E_old[rho k3] = KL(pi || ref)`` for every pi, so ``rho`` keeps its gradient.
    Where rho is 1 the values are those of ``kl_penalty``, and so is the gradient of ``k2``; that of ``k3`` becomes KL(pi || ref)'s.

    Args:
        logprobs: ``[N, L]`` nats, the policy.
        ref_logprobs: ``[N, L]`` nats, the frozen reference.
        estimator: ``k2`` or ``k3``.
        ratio: ``[N, L]``, rho, with its graph.

    Returns:
        ``[N, L]`` nats.

    Raises:
        ConfigError: another estimator.

    >>> kl_loss(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), "k3", torch.tensor([2.0]))
    tensor([0.3863])
    """
    return choose(WITH_RATIO, estimator, "kl_estimator")(kl_penalty(logprobs, ref_logprobs, estimator), ratio)
