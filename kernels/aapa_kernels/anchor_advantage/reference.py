"""What is done with the sentences of a response: transform, pool, sum to go. Plain torch, differentiable, deterministic on every device.

The sentences of response ``i`` are ``offsets[i] .. offsets[i + 1] - 1``; sums run over such stretches in order, never by scattering.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

TRANSFORMS = ("gan_ns", "score", "gan_sat", "bt_gap")
POOLS = ("mean", "token_mean", "min", "softmin")


def transform_logits(logits: Tensor, transform: str = "gan_ns", tau: float = 1.0, expert_logits: Tensor | None = None) -> Tensor:
    """Turn log-odds into the quantity that the policy should raise.

    ``gan_ns`` log sigma(l / tau); ``score`` l / tau; ``gan_sat`` -log(1 - sigma(l / tau)); ``bt_gap`` log sigma((l - l_E) / tau).

    Args:
        logits: ``[S]`` log-odds that the expert wrote the sentence.
        transform: one of ``TRANSFORMS``.
        tau: temperature, above 0.
        expert_logits: ``[S]``, ``l_E`` of each sentence's prompt; only ``bt_gap`` reads it.

    Returns:
        ``g`` ``[S]``, nats for all but ``score``.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if transform == "gan_ns":
        return logsigmoid(logits / tau)
    if transform == "score":
        return logits / tau
    if transform == "gan_sat":
        return -logsigmoid(-logits / tau)
    if transform == "bt_gap" and expert_logits is not None:
        return logsigmoid((logits - expert_logits.to(logits.dtype)) / tau)
    raise ValueError(f"transform must be one of {TRANSFORMS} (bt_gap with expert_logits), not {transform!r}")


def response_of(offsets: Tensor, sentences: int) -> Tensor:
    """The response of each sentence, int64 ``[S]``, from offsets ``[N + 1]``."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=sentences)


def response_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum over the sentences ``[S]`` of each response, ``[N]``."""
    return torch.segment_reduce(values, "sum", offsets=offsets, axis=0, initial=0.0)


def token_weights(token_counts: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """``w_ik = n_ik / n_i`` ``[S]``; equal weights in a response without scored tokens, so that they always sum to 1."""
    index = response_of(offsets, len(token_counts))
    counts = token_counts.to(dtype)
    counts = torch.where(response_sum(counts, offsets)[index] == 0, torch.ones_like(counts), counts)
    return counts / response_sum(counts, offsets)[index]


def fill_empty(logits: Tensor, token_counts: Tensor, offsets: Tensor, floor: float) -> Tensor:
    """Give sentences without tokens the mean logit of their response's other sentences, or ``floor`` where no sentence has any.

    So a sentence that was cut off moves no average, and a response of which nothing was seen gets what silence is worth.
    """
    seen = token_counts > 0
    counts = response_sum(seen.to(logits.dtype), offsets)
    means = response_sum(torch.where(seen, logits, torch.zeros_like(logits)), offsets) / counts.clamp_min(1)
    neutral = torch.where(counts > 0, means, torch.full_like(means, floor))
    return torch.where(seen, logits, neutral[response_of(offsets, len(logits))])


def pool_sentences(g: Tensor, token_counts: Tensor, offsets: Tensor, pool: str = "mean", softmin_temperature: float = 1.0) -> Tensor:
    """Pool the sentences of each response.

    ``mean`` over sentences; ``token_mean`` sum_k n_ik g_ik / n_i; ``min``; ``softmin`` -T log mean_k exp(-g_ik / T), which goes from
    ``mean`` (large T) to ``min`` (small T).

    Means are taken of differences to the first sentence, so that equal sentences have exactly their value as their mean. ``softmin`` is
    min g - T log1p(mean expm1(-(g - min g) / T)): at large T the mean of exponentials is 1 to the last digit, and its logarithm lost.

    Args:
        g: ``[S]``.
        token_counts: int64 ``[S]``, scored tokens of each sentence.
        offsets: int64 ``[N + 1]``; every response has at least one sentence.
        pool: one of ``POOLS``.
        softmin_temperature: T, above 0.

    Returns:
        ``u`` ``[N]``.
    """
    sentences, index = offsets.diff().to(g.dtype), response_of(offsets, len(g))
    if pool in ("mean", "token_mean"):
        first = g.detach()[offsets[:-1]]
        beyond = g - first[index]
        if pool == "mean":
            return first + response_sum(beyond, offsets) / sentences
        return first + response_sum(beyond * token_weights(token_counts, offsets, g.dtype), offsets)
    # not by segment_reduce, whose gradient goes astray where the smallest of a response stands twice
    lowest = g.new_zeros(len(offsets) - 1).scatter_reduce(0, index, g, "amin", include_self=False)
    if pool == "min":
        return lowest
    if pool == "softmin":
        exponents = -(g - lowest[index]) / softmin_temperature  # at most 0: nothing overflows
        below_one = response_sum(torch.expm1(exponents), offsets) / sentences
        # far below 1 the mean itself has more digits than its distance from 1
        far = torch.log(response_sum(torch.exp(exponents), offsets) / sentences)
        return lowest - softmin_temperature * torch.where(below_one > -0.5, torch.log1p(below_one), far)
    raise ValueError(f"pool must be one of {POOLS}, not {pool!r}")


def suffix_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """``sum_{j >= k} values_ij`` ``[S]``: each response on its own row, so that large values of one never round off another's."""
    index = response_of(offsets, len(values))
    position = torch.arange(len(values), device=values.device) - offsets[index]
    rows = values.new_zeros(len(offsets) - 1, int(offsets.diff().max()) if len(values) else 0)
    rows[index, position] = values
    for k in reversed(range(rows.shape[1] - 1)):  # cumsum of floats has no deterministic form on CUDA
        rows[:, k] += rows[:, k + 1]
    return rows[index, position]


def credit_to_go(g: Tensor, token_counts: Tensor, offsets: Tensor, baseline: Tensor) -> Tensor:
    """``sum_{j >= k} w_ij (g_ij - baseline_i)`` ``[S]`` with ``w_ij = n_ij / n_i``: what sentence k and its followers bring.

    Args:
        g: ``[S]``.
        token_counts: int64 ``[S]``.
        offsets: int64 ``[N + 1]``.
        baseline: ``[N]``, mean over the group of the token-weighted mean of g.
    """
    weights = token_weights(token_counts, offsets, g.dtype)
    return suffix_sums(weights * (g - baseline[response_of(offsets, len(g))]), offsets)
