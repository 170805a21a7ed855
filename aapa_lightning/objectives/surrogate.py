"""The clipped policy-gradient surrogate, with token or sequence ratios."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from aapa_lightning.errors import choose
from aapa_lightning.objectives.kl import LOG_RATIO_LIMIT
from aapa_lightning.reduce import masked_mean
from aapa_lightning.types import LossOutputs, TokenLossInputs

RatioLevel = Literal["token", "sequence"]


def _sequence_log_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(log_ratio, mask, dim=-1).unsqueeze(-1).expand_as(log_ratio)


LOG_RATIOS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token": lambda log_ratio, mask: log_ratio,
    "sequence": _sequence_log_ratio,
}


def importance_ratio(inputs: TokenLossInputs, ratio_level: str) -> tuple[Tensor, Tensor]:
    """Log-ratio before the clamp, and the ratio ``pi / pi_old``, ``[N, L]`` each; see ``clipped_surrogate``."""
    mask = inputs.response_mask
    # Masked before the exponential: a gradient of 0 times exp(garbage) would be NaN.
    log_ratio = (inputs.logprobs - inputs.old_logprobs).masked_fill(~mask, 0.0)
    log_ratio = choose(LOG_RATIOS, ratio_level, "ratio_level")(log_ratio, mask)
    return log_ratio, log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped_surrogate(inputs: TokenLossInputs, *, clip_low: float = 0.2, clip_high: float = 0.2, ratio_level: str = "token") -> LossOutputs:
    r"""Clipped surrogate of PPO per token.

    ``l_it = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)`` with ``rho = pi / pi_old`` of the token, or, at sequence level, the
    geometric mean of the response's token ratios, ``exp(sum_t (log pi - log pi_old) / len_i)``, the same for all its tokens. Log-ratios are
    clamped to +-20 before the exponential (no gradient beyond); ``log_ratio_clamped`` counts where. With weights, ``w_it l_it``.

    Args:
        inputs: policy and old log-probs, mask, advantages, weights. A sequence ratio with advantages that differ inside a response spreads
            each token's advantage over the whole response.
        clip_low: lower clip, at least 0; from 1 on there is none.
        clip_high: upper clip, at least 0.
        ratio_level: ``token`` or ``sequence``.

    Returns:
        Losses ``[N, L]``; metrics ``ratio``, ``clip_fraction`` (tokens whose gradient the clip removed), ``log_ratio_clamped``, and
        those of the weights.

    Raises:
        ConfigError: an unknown ratio level.

    References: Schulman et al., Proximal Policy Optimization Algorithms, 2017, arXiv 1707.06347, eq. 7; Zheng et al., Group Sequence
    Policy Optimization, 2025, arXiv 2507.18071.

    >>> zeros, mask = torch.zeros(1, 2), torch.tensor([[True, False]])
    >>> clipped_surrogate(TokenLossInputs(zeros + 1.0, zeros, mask, zeros + 1.0)).losses
    tensor([[-1.2000,  0.0000]])
    """
    mask = inputs.response_mask
    log_ratio, ratio = importance_ratio(inputs, ratio_level)
    advantages = inputs.advantages.masked_fill(~mask, 0.0)
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)
    if inputs.weights is not None:
        losses = losses * inputs.weights.detach()
    with torch.no_grad():
        clipped = ((ratio < 1.0 - clip_low) & (advantages < 0)) | ((ratio > 1.0 + clip_high) & (advantages > 0))
        metrics = {
            "ratio": ratio.detach(),
            "clip_fraction": clipped.to(ratio.dtype),
            "log_ratio_clamped": (log_ratio.abs() > LOG_RATIO_LIMIT).to(ratio.dtype),
            **inputs.weight_metrics,
        }
    return LossOutputs(losses.masked_fill(~mask, 0.0), metrics)
