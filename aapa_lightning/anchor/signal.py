"""From sentence logits to an ``AnchorSignal``, and the ways in which it joins a task: pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from aapa_kernels import AnchorAdvantages, anchor_advantage, group_mean, group_size, group_statistics, group_std
from aapa_kernels.anchor_advantage import equal_within
from aapa_lightning.advantages import append_reward
from aapa_lightning.errors import POSITIVE, ConfigError, check_numbers, choose
from aapa_lightning.reduce import Mean
from aapa_lightning.types import AnchorSignal, Rollouts, SentenceSpans, SumOverRanks, identity_sum

Transform = Literal["gan_ns", "score", "gan_sat", "bt_gap"]
Pool = Literal["mean", "token_mean", "min", "softmin"]
Scale = Literal["batch", "fixed", "group"]
Granularity = Literal["response", "sentence"]
Combine = Literal["loss", "advantage", "reward"]
Truncated = Literal["score", "drop"]


@dataclass(frozen=True, slots=True)
class AnchorOptions:
    """How logits become advantages, and how these join the task. ``check`` refuses what makes no sense.

    Args:
        transform: g of a sentence: ``gan_ns`` log sigma(l / tau), ``score`` l / tau, ``gan_sat`` -log(1 - sigma(l / tau)), ``bt_gap``
            log sigma((l - l_E) / tau) with l_E the mean logit of the prompt's expert sentences.
        tau: temperature of the transform.
        pool: u of a response from its sentences.
        softmin_temperature: T of ``softmin``.
        scale: what centred scores are divided by: ``batch`` deviation over all rollouts of the window and all ranks, ``fixed`` 1, ``group``
            deviation of the group.
        scale_floor: least ``batch`` scale, in units of u.
        granularity: one advantage per response, or credit to go per sentence.
        combine: ``loss`` (two surrogates), ``advantage`` (one surrogate on the sum), ``reward`` (added to the reward before normalisation).
        truncated: ``score`` a response that hit the length limit like any other, or ``drop`` it: it leaves every statistic and gets 0.
    """

    transform: Transform = "gan_ns"
    tau: float = 1.0
    pool: Pool = "mean"
    softmin_temperature: float = 1.0
    scale: Scale = "batch"
    scale_floor: float = 0.1
    granularity: Granularity = "response"
    combine: Combine = "loss"
    truncated: Truncated = "score"

    def check(self) -> None:
        """Raise ``ConfigError`` for unknown names, bad numbers and combinations that make no sense."""
        choices: dict[str, Any] = {
            "transform": Transform,
            "pool": Pool,
            "scale": Scale,
            "granularity": Granularity,
            "combine": Combine,
            "truncated": Truncated,
        }
        for name, kind in choices.items():
            choose(dict.fromkeys(get_args(kind)), getattr(self, name), f"anchor {name}")
        limits = dict.fromkeys(("tau", "softmin_temperature", "scale_floor"), POSITIVE)
        check_numbers({name: getattr(self, name) for name in limits}, limits, "anchor: ")
        if self.granularity == "sentence" and self.combine == "reward":
            raise ConfigError(
                "anchor: granularity=sentence does not go with combine=reward: a reward is one number per response, so the sentences' "
                "credits would be lost; use combine=loss or combine=advantage, or granularity=response"
            )


def build_signal(
    logits: Tensor,
    spans: SentenceSpans,
    rollouts: Rollouts,
    options: AnchorOptions,
    *,
    expert_logits: Tensor | None = None,
    sum_over_ranks: SumOverRanks = identity_sum,
) -> AnchorSignal:
    """Transform, pool, centre, scale and spread logits over tokens (``aapa_kernels.anchor_advantage``).

    Args:
        logits: float32 ``[S]``.
        spans: the ``S`` sentences; thinking tokens are in ``token_sentence`` but not in ``token_counts``.
        rollouts: ``N`` responses; group ids, masks and the truncation flag are read.
        options: checked options.
        expert_logits: ``[N]``, l_E of each response's prompt, for ``bt_gap``.
        sum_over_ranks: sums a tensor over ranks; called exactly once with ``scale=batch``, and not at all otherwise.

    Returns:
        The signal, on the device of the logits. A dropped row has the mean score of its group's other rows, so that it neither gains nor
        loses under ``combine=reward``.
    """
    kept = ~rollouts.truncated if options.truncated == "drop" else torch.ones_like(rollouts.truncated)
    result = anchor_advantage(
        logits,
        spans.token_counts,
        spans.response_index,
        spans.token_sentence,
        rollouts.group_ids,
        transform=options.transform,
        tau=options.tau,
        pool=options.pool,
        softmin_temperature=options.softmin_temperature,
        scale=options.scale,
        scale_floor=options.scale_floor,
        granularity=options.granularity,
        expert_logits=expert_logits,
        row_mask=kept,
        sum_over_ranks=sum_over_ranks,
    )
    scores = torch.where(kept, result.scores, group_mean(result.scores, rollouts.group_ids, kept))
    metrics = _metrics(logits, spans, rollouts.group_ids, kept, result)
    if expert_logits is not None:
        metrics["expert_logit"] = Mean.of(expert_logits)
    return AnchorSignal(logits, scores, result.advantages, spans, metrics)


def _metrics(logits: Tensor, spans: SentenceSpans, group_ids: Tensor, kept: Tensor, result: AnchorAdvantages) -> dict[str, float]:
    """Means over this rank's rows, sentences, tokens or groups; only the ``batch`` scale is of all ranks."""
    compared = kept & (group_size(group_ids, kept) > 1)
    spread = group_std(result.scores, group_ids, kept)[compared]
    equal, groups = zero_variance_counts(result.scores, group_ids, kept).tolist()
    return {
        "logit": Mean.of(logits),
        "probability": Mean.of(torch.sigmoid(logits)),
        "score": Mean.of(result.scores[kept]),
        "score_std_within": Mean.of(spread),
        "scale": Mean.of(result.scale),
        "zero_variance_share": Mean(equal, groups),
        "sentences_per_response": Mean(len(logits), len(group_ids)),
        "dropped_share": Mean.of(~kept),
        "advantage_abs": Mean.of(result.advantages[spans.token_sentence >= 0].abs()),
    }


def deviations(values: Tensor, group_ids: Tensor) -> Tensor:
    """Values ``[N]`` minus the mean of their group; exactly 0 where those of a group are equal up to rounding."""
    found = group_statistics(values, group_ids)
    return (values - found.mean).masked_fill(equal_within(found.mean, found.std, values.dtype), 0.0)


def zero_variance_counts(values: Tensor, group_ids: Tensor, kept: Tensor | None = None) -> Tensor:
    """Groups of two or more in which all values that count are equal up to rounding, and all groups of two or more: int64 ``[2]``.

    Args:
        values: ``[N]``.
        group_ids: int64 ``[N]``.
        kept: bool ``[N]``, the rows that count; all by default.
    """
    found = group_statistics(values, group_ids, kept)
    counted = found.size > 1 if kept is None else kept & (found.size > 1)
    groups = len(torch.unique(group_ids[counted]))
    varied = len(torch.unique(group_ids[counted & ~equal_within(found.mean, found.std, values.dtype)]))
    return torch.tensor([groups - varied, groups])


def first_responses(signal: AnchorSignal, count: int) -> AnchorSignal:
    """The signal of the first ``count`` responses, with the metrics of all."""
    if count == len(signal.scores):
        return signal
    spans = signal.spans
    own = spans.response_index < count
    kept = SentenceSpans(spans.response_index[own], spans.token_counts[own], spans.token_sentence[:count], spans.char_spans[:count])
    return AnchorSignal(signal.logits[own], signal.scores[:count], signal.advantages[:count], kept, signal.metrics)


def combine_advantages(task: Tensor, anchor: Tensor, weight: float) -> Tensor:
    """``A_task + lambda A``, for ``combine=advantage``.

    Args:
        task: task advantage ``[N]`` or ``[N, L]``.
        anchor: anchor advantage ``[N, L]``.
        weight: lambda; at 0 the task's advantage comes back exactly.

    Returns:
        ``[N, L]``; what stands on padding means nothing.
    """
    per_token = (task[:, None] if task.dim() == 1 else task).expand(anchor.shape)
    return per_token if weight == 0 else per_token + weight * anchor.to(per_token)


def combine_rewards(rewards: Tensor, weights: Tensor, signal: AnchorSignal, weight: float) -> tuple[Tensor, Tensor]:
    """``r + lambda u`` before normalisation, for ``combine=reward``: the score becomes one more reward, of weight lambda.

    Args:
        rewards: ``[N, R]``; a row of NaN, which no reward could score, stays one.
        weights: ``[R]``.
        signal: the anchor's; its scores u are read.
        weight: lambda; at 0 the arguments come back untouched, since even a column of weight 0 could change the order of a sum.

    Returns:
        Rewards ``[N, R + 1]`` and weights ``[R + 1]``.
    """
    if weight == 0:
        return rewards, weights
    return append_reward(rewards, signal.scores), torch.cat([weights, weights.new_tensor([weight])])
