"""CHORD: on-policy GRPO and weighted imitation in the same step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from aapa_lightning.errors import ConfigError, choose
from aapa_lightning.objectives.sft import sft_loss
from aapa_lightning.types import LossOutputs

SFTWeight = Literal["phi", "none", "is"]
_VALLEY = 0.1


def chord_mu(step: int, *, warmup_steps: int = 0, decay_steps: int = 0, peak: float = 0.1, valley: float | None = None) -> float:
    r"""Share of imitation at an optimiser step: linear warm-up from 0 to the peak, cosine decay to the valley, then the valley.

    With W warm-up and D decay steps: ``peak * step / W`` before W, ``valley + (peak - valley) (1 + cos(pi (step - W) / D)) / 2`` before
    W + D, ``valley`` after. W = 0 starts at the peak, D = 0 stays at it.

    Args:
        step: optimiser steps taken so far; constant over the micro-steps of one optimiser step.
        warmup_steps: W.
        decay_steps: D.
        peak: in [0, 1].
        valley: in [0, 1]; None is 0.1. Without decay it is never reached, and only the peak itself is taken.

    Returns:
        mu in [0, 1].

    Raises:
        ConfigError: negative steps, a share outside [0, 1], or a valley without decay.

    Reference: Zhang et al., On-Policy RL Meets Off-Policy Experts (CHORD), 2025, arXiv 2508.11408. The defaults are CHORD-phi's; the
    authors' CHORD-mu uses W = 0, D = 200, peak 0.9, valley 0.05 with weight ``none``.

    >>> [round(chord_mu(step, warmup_steps=2, decay_steps=4, peak=0.8, valley=0.2), 3) for step in (0, 1, 2, 4, 6, 100)]
    [0.0, 0.4, 0.8, 0.5, 0.2, 0.2]
    """
    if min(step, warmup_steps, decay_steps) < 0:
        raise ConfigError(f"mu schedule: expected steps >= 0, found step {step}, warm-up {warmup_steps}, decay {decay_steps}")
    if not (0.0 <= peak <= 1.0 and (valley is None or 0.0 <= valley <= 1.0)):
        raise ConfigError(f"mu schedule: expected peak and valley in [0, 1], found {peak} and {valley}")
    if decay_steps == 0 and valley not in (None, peak):
        raise ConfigError(f"mu_valley={valley} is never reached: mu_decay_steps is 0; set mu_decay_steps, or leave mu_valley out")
    low = _VALLEY if valley is None else valley
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step < warmup_steps + decay_steps:
        return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / decay_steps))
    return low if decay_steps else peak


def chord_phi(logprobs: Tensor) -> Tensor:
    r"""Token weight ``phi = p (1 - p)``, detached: expert tokens that the policy knows or finds absurd hardly pull.

    Args:
        logprobs: ``[N, L]`` nats, the policy's, of the expert's tokens.

    Returns:
        ``[N, L]`` in [0, 0.25], without gradient.

    >>> chord_phi(torch.tensor([0.5, 1.0]).log())
    tensor([0.2500, 0.0000])
    """
    logprobs = logprobs.detach().clamp(max=0.0)
    # expm1 keeps 1 - p exact where p is close to 1.
    return logprobs.exp() * torch.expm1(logprobs).abs()


WEIGHTS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda logprobs: None,
    "phi": chord_phi,
    "is": lambda logprobs: logprobs.detach().exp(),
}


def chord_sft_loss(logprobs: Tensor, response_mask: Tensor, *, weight: str = "phi") -> LossOutputs:
    r"""Imitation half of CHORD per token, ``-sg[w] log p``; reduce it by the expert tokens' own count (``dapo``).

    Args:
        logprobs: ``[N, L]`` nats, the policy's, of the expert's tokens.
        response_mask: bool ``[N, L]``.
        weight: ``none`` (CHORD-mu), ``phi`` (gradient ``-(1 - p) grad p``) or ``is`` (``w = p``, gradient ``-grad p``).

    Returns:
        Losses ``[N, L]`` in nats; metrics ``nll`` and, with a weight, ``sft_weight``.

    Raises:
        ConfigError: an unknown weight.

    >>> chord_sft_loss(torch.tensor([[0.5]]).log(), torch.tensor([[True]])).losses
    tensor([[0.1733]])
    """
    weights = choose(WEIGHTS, weight, "sft_weight")(logprobs)
    outputs = sft_loss(logprobs, response_mask, weights)
    if weights is not None:
        outputs.metrics["sft_weight"] = weights.masked_fill(~response_mask, 0.0)
    return outputs
