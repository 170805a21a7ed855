"""Weights that correct for an engine whose distribution is not quite the trainer's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from aapa_lightning.errors import SHARE, Limit, check_numbers, choose, refuse_idle
from aapa_lightning.objectives.kl import LOG_RATIO_LIMIT, kl_penalty
from aapa_lightning.reduce import masked_mean, masked_sum

_IMPOSSIBLE = 1e4  # a log-ratio that is finite, so that two of them in one response do not make NaN
#: What bounds do to ratios.
MODES: dict[str, Callable[[Tensor, float, float], Tensor] | None] = {
    "none": None,
    "truncate": lambda ratio, low, high: ratio.clamp(low, high),
    "mask": lambda ratio, low, high: ratio.masked_fill((ratio < low) | (ratio > high), 0.0),
}
#: The log-ratio of a whole response, ``[N]``.
SEQUENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda log_ratio, mask: masked_sum(log_ratio, mask, dim=-1),
    "mean": lambda log_ratio, mask: masked_mean(log_ratio, mask, dim=-1),
}


@dataclass(frozen=True, slots=True)
class CorrectionOptions:
    """How the surrogate is weighted by ``rho = pi_old / mu``, the trainer's probability over the engine's.

    TRL's ``sequence_mask`` and its like are level and mode, with ``product``; verl's ``rollout_is`` is ``truncate`` with ``low=0``, its
    ``rollout_rs=geometric`` the rejection (alone: ``truncate`` with ``low=1, high=1``).

    Args:
        mode: ``none``; ``truncate`` clips rho to [low, high] (truncated importance sampling); ``mask`` sets it to 0 outside (masked
            importance sampling).
        level: a ratio for every ``token``, or one for the whole ``sequence``.
        sequence: of a response, the ``product`` of its token ratios, which drifts with length, or their geometric ``mean`` (ms-swift).
        low: lower bound, in [0, 1]; 0 for none.
        high: upper bound, at least 1; ``inf`` for none.
        reject_low: responses whose geometric mean ratio lies below weigh 0; 0 for none.
        reject_high: and those above; ``inf`` for none.

    Raises:
        ConfigError: an option outside its range, or a rejection with mode ``none``.
    """

    mode: Literal["none", "truncate", "mask"] = "none"
    level: Literal["token", "sequence"] = "token"
    sequence: Literal["product", "mean"] = "product"
    low: float = 0.0
    high: float = 2.0
    reject_low: float = 0.0
    reject_high: float = math.inf

    def __post_init__(self) -> None:
        choose(MODES, self.mode, "correction.mode")
        choose(dict.fromkeys(("token", "sequence")), self.level, "correction.level")
        choose(SEQUENCES, self.sequence, "correction.sequence")
        # so that equal policies weigh 1
        upper = {name: value for name in ("high", "reject_high") if (value := getattr(self, name)) != math.inf}
        check_numbers(asdict(self), {"low": SHARE, "reject_low": SHARE, **dict.fromkeys(upper, Limit(1))}, "correction.")
        if self.mode == "none":
            refuse_idle(CorrectionOptions, asdict(self), list(asdict(self))[1:], "with mode none (use truncate or mask)", "correction.")
        if self.level == "token":
            refuse_idle(CorrectionOptions, asdict(self), ["sequence"], "with level token", "correction.")


def correction_weights(
    old_logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, options: CorrectionOptions
) -> tuple[Tensor | None, dict[str, Tensor]]:
    r"""Importance weights of the rollouts' tokens, without gradient.

    ``rho_t = exp(log pi_old - log mu)``; at sequence level ``exp(sum_t ...)`` or ``exp(mean_t ...)`` over the unmasked tokens. Log-ratios
    are clamped to +-20 before the exponential. A token that the engine could not score (NaN) has ratio 1. What weighs 0 stays in the
    loss's normaliser: its counts are taken when the window opens, before anything is known of the ratios.

    Args:
        old_logprobs: ``[N, L]`` nats, the trainer's own, at the weights and temperature that the responses were drawn with.
        engine_logprobs: ``[N, L]`` nats, those that the engine drew with.
        mask: bool ``[N, L]``, final; a response without tokens has ratio 1.
        options: what is done with the ratios.

    Returns:
        Weights float32 ``[N, L]`` (float64 for float64), 0 on masked positions, or None with mode ``none``; and metrics ``[N, L]``:
        ``engine_weight``, ``engine_outside`` (1 where the bounds or a rejection changed the ratio) and ``engine_kl`` (k3 estimate of
        KL(mu || pi_old), nats).

    References: Yao et al., Your Efficient RL Framework Secretly Brings You Off-Policy RL Training, 2025 (truncated); IcePop, 2025 (masked).

    >>> old, engine = torch.tensor([[0.5, 0.2]]).log(), torch.tensor([[0.25, 0.2]]).log()
    >>> options = CorrectionOptions(mode="truncate", high=1.5)
    >>> correction_weights(old, engine, torch.tensor([[True, True]]), options)[0]
    tensor([[1.5000, 1.0000]])
    """
    bound = MODES[options.mode]
    if bound is None:
        return None, {}
    with torch.no_grad():
        old, engine = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (old_logprobs, engine_logprobs))
        log_ratio = (old - engine).nan_to_num(nan=0.0, posinf=_IMPOSSIBLE, neginf=-_IMPOSSIBLE).masked_fill(~mask, 0.0)
        means = _ratio(SEQUENCES["mean"](log_ratio, mask))[:, None].expand_as(log_ratio)
        whole = SEQUENCES[options.sequence](log_ratio, mask)[:, None].expand_as(log_ratio)
        ratio = _ratio(log_ratio if options.level == "token" else whole)
        rejected = (means < options.reject_low) | (means > options.reject_high)
        weights = bound(ratio, options.low, options.high).masked_fill(rejected | ~mask, 0.0)
        metrics = {
            "engine_weight": weights,
            "engine_outside": ((ratio < options.low) | (ratio > options.high) | rejected).to(ratio.dtype),
            "engine_kl": kl_penalty(-log_ratio, torch.zeros_like(log_ratio), "k3"),
        }
    return weights, metrics


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
