"""The anchor advantage, made of the operators beside it.

``S`` sentences of ``N`` responses: logit ``l_ik`` -> transform ``g_ik`` -> pool ``u_i`` -> centre ``c_i`` -> scale -> per-token advantage.
Everything runs in float32 (float64 for float64 logits) and is finite for logits of any size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aapa_kernels.anchor_advantage.groups import equal_within, pooled_std
from aapa_kernels.anchor_advantage.scores import credit_to_go, response_scores
from aapa_kernels.anchor_advantage.statistics import group_statistics
from aapa_kernels.anchor_advantage.tokens import spread
from aapa_kernels.dispatch import Impl

SCALES = ("batch", "fixed", "group")
GRANULARITIES = ("response", "sentence")


class AnchorAdvantages(NamedTuple):
    """What the anchor adds to the loss.

    Args:
        scores: ``u`` ``[N]``, pooled.
        centred: ``c`` ``[N]``, minus the group's mean; 0 for a row that does not count, for a group of one and for one of equal scores.
        scale: ``[N]``, what ``c`` was divided by.
        advantages: ``[N, L]``, 0 outside every sentence.
    """

    scores: Tensor
    centred: Tensor
    scale: Tensor
    advantages: Tensor


def anchor_advantage(
    logits: Tensor,
    token_counts: Tensor,
    response_index: Tensor,
    token_sentence: Tensor,
    group_ids: Tensor,
    *,
    transform: str = "gan_ns",
    tau: float = 1.0,
    pool: str = "mean",
    softmin_temperature: float = 1.0,
    scale: str = "batch",
    scale_floor: float = 0.1,
    granularity: str = "response",
    expert_logits: Tensor | None = None,
    row_mask: Tensor | None = None,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    impl: Impl = "auto",
) -> AnchorAdvantages:
    """Anchor advantage of every response token.

    ``c_i = u_i - mean_group u`` and ``A_i = c_i / scale``, with ``scale`` one of

    - ``batch``: max(std of ``c``, ``scale_floor``), ddof 1, over all rows of all ranks that count and are not alone in their group. A group
      of one has ``c = 0`` by construction; counting it would shrink the deviation and so inflate everybody else's advantage.
    - ``fixed``: 1.
    - ``group``: std of the row's group, ddof 1, plus 1e-4.

    With granularity ``response`` every token of a response gets ``A_i``; with ``sentence`` a token of sentence k gets the centred credit to
    go, ``(sum_{j>=k} w_ij g_ij - mean_group(u, token_mean) sum_{j>=k} w_ij) / scale`` with ``w_ij = n_ij / n_i`` and the scale as above,
    from the pooled ``c``. A group of one gets 0 either way.

    Scores whose deviation is within four roundings of their mean (``equal_within``) are equal: their ``c`` is exactly 0. Under ``group``
    scale there is nothing to divide by, so all advantages of such a group are 0.

    Args:
        logits: ``[S]``, finite.
        token_counts: int64 ``[S]``, scored tokens of each sentence.
        response_index: int64 ``[S]``, non-decreasing, every response at least once.
        token_sentence: int64 ``[N, L]``, -1 outside every sentence.
        group_ids: int64 ``[N]``; a group never spans ranks.
        transform: one of ``TRANSFORMS``.
        tau: temperature of the transform.
        pool: one of ``POOLS``.
        softmin_temperature: T of ``softmin``.
        scale: one of ``SCALES``.
        scale_floor: least ``batch`` scale, in units of ``u``. Under ``gan_ns`` ``u`` is the log-probability of being the expert's, so the
            default 0.1 says: responses whose probabilities differ by less than a tenth do not get full-size advantages, however alike
            all responses of the window are.
        granularity: one of ``GRANULARITIES``.
        expert_logits: ``[N]``, ``l_E`` of each response's prompt, for ``bt_gap``.
        row_mask: bool ``[N]``, rows that count; the others stay out of every statistic and get 0.
        sum_over_ranks: sums a tensor over ranks; called exactly once with ``batch``, and not at all otherwise.
        impl: ``auto``, ``triton`` or ``reference``; see ``aapa_kernels.dispatch``.

    Returns:
        Scores, centred scores, scales and advantages, differentiable in ``logits`` and ``expert_logits``.

    Raises:
        ValueError: an unknown option, or ``bt_gap`` without ``expert_logits``.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {GRANULARITIES}, not {granularity!r}")
    counted = torch.ones_like(group_ids, dtype=torch.bool) if row_mask is None else row_mask
    rows = torch.arange(group_ids.shape[0] + 1, device=response_index.device)
    offsets = torch.searchsorted(response_index, rows)
    score: dict[str, Any] = {"transform": transform, "tau": tau, "expert_logits": expert_logits, "impl": impl}
    pooling: dict[str, Any] = {"pool": pool, "softmin_temperature": softmin_temperature}
    scores = response_scores(logits, token_counts, offsets, **score, **pooling).scores
    groups = group_statistics(scores, group_ids, counted, impl=impl)
    compared = counted & (groups.size > 1)
    varied = compared & ~equal_within(groups.mean, groups.std, scores.dtype)
    centred = torch.where(varied, scores - groups.mean, torch.zeros_like(scores))
    std = torch.where(varied, groups.std, torch.zeros_like(scores))
    divisor = _scale(centred, std, compared, scale, scale_floor, sum_over_ranks)
    if granularity == "response":
        advantages = spread(centred / divisor, token_sentence, per_sentence=False, impl=impl)
    else:
        by_tokens = scores if pool == "token_mean" else response_scores(logits, token_counts, offsets, pool="token_mean", **score).scores
        baseline = group_statistics(by_tokens, group_ids, counted, impl=impl).mean
        weight = torch.where(varied if scale == "group" else compared, divisor.reciprocal(), torch.zeros_like(divisor))[response_index]
        advantages = spread(
            credit_to_go(logits, token_counts, offsets, baseline, **score) * weight, token_sentence, per_sentence=True, impl=impl
        )
    return AnchorAdvantages(scores, centred, divisor, advantages)


def _scale(
    centred: Tensor, std: Tensor, compared: Tensor, scale: str, floor: float, sum_over_ranks: Callable[[Tensor], Tensor] | None
) -> Tensor:
    if scale == "fixed":
        return torch.ones_like(centred)
    if scale == "group":
        return std + 1e-4
    if scale == "batch":
        return pooled_std(centred, compared, sum_over_ranks).clamp_min(floor).to(centred.dtype).expand(centred.shape)
    raise ValueError(f"scale must be one of {SCALES}, not {scale!r}")
