"""What is done with the sentences of a response: transform, pool, sum to go. Plain torch."""

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


def response_sum(values: Tensor, response_index: Tensor, num_responses: int) -> Tensor:
    """Sum over the sentences ``[S]`` of each response, ``[N]``."""
    return values.new_zeros(num_responses).index_add(0, response_index, values)


def token_weights(g: Tensor, token_counts: Tensor, response_index: Tensor, num_responses: int) -> Tensor:
    """``w_ik = n_ik / n_i`` ``[S]``; equal weights in a response without scored tokens, so that they always sum to 1."""
    counts = token_counts.to(g.dtype)
    empty = response_sum(counts, response_index, num_responses)[response_index] == 0
    counts = torch.where(empty, torch.ones_like(counts), counts)
    return counts / response_sum(counts, response_index, num_responses)[response_index]


def pool_sentences(
    g: Tensor, token_counts: Tensor, response_index: Tensor, num_responses: int, pool: str = "mean", softmin_temperature: float = 1.0
) -> Tensor:
    """Pool the sentences of each response.

    ``mean`` over sentences; ``token_mean`` sum_k n_ik g_ik / n_i; ``min``; ``softmin`` -T log mean_k exp(-g_ik / T), which goes from
    ``mean`` (large T) to ``min`` (small T).

    Args:
        g: ``[S]``.
        token_counts: int64 ``[S]``, scored tokens of each sentence.
        response_index: int64 ``[S]``; every response has at least one sentence.
        num_responses: ``N``.
        pool: one of ``POOLS``.
        softmin_temperature: T, above 0.

    Returns:
        ``u`` ``[N]``.
    """
    if pool == "token_mean":
        return response_sum(g * token_weights(g, token_counts, response_index, num_responses), response_index, num_responses)
    sentences = response_sum(torch.ones_like(g), response_index, num_responses)
    if pool == "mean":
        return response_sum(g, response_index, num_responses) / sentences
    lowest = g.new_zeros(num_responses).scatter_reduce(0, response_index, g, "amin", include_self=False)
    if pool == "min":
        return lowest
    if pool == "softmin":
        excess = torch.exp(-(g - lowest[response_index]) / softmin_temperature)  # at most 1: nothing overflows
        return lowest - softmin_temperature * torch.log(response_sum(excess, response_index, num_responses) / sentences)
    raise ValueError(f"pool must be one of {POOLS}, not {pool!r}")


def suffix_sums(values: Tensor, response_index: Tensor, num_responses: int) -> Tensor:
    """``sum_{j >= k} values_ij`` ``[S]``: each response on its own row, so that large values of one never round off another's."""
    sentences = torch.bincount(response_index, minlength=num_responses)
    first = sentences.cumsum(0) - sentences
    position = torch.arange(values.shape[0], device=values.device) - first[response_index]
    rows = values.new_zeros(num_responses, int(sentences.max()) if len(sentences) else 0)
    rows[response_index, position] = values
    for k in reversed(range(rows.shape[1] - 1)):  # cumsum of floats has no deterministic form on CUDA
        rows[:, k] += rows[:, k + 1]
    return rows[response_index, position]
