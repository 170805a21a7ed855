"""Task advantages: rewards compared within the group of their prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from aapa_kernels import group_mean, group_size, group_std
from aapa_kernels.anchor_advantage import equal_within, pooled_std
from aapa_kernels.anchor_advantage.groups import accumulator
from aapa_lightning.errors import ConfigError, choose
from aapa_lightning.types import SumOverRanks, identity_sum

AdvantageScale = Literal["group", "batch", "none"]
RewardAggregation = Literal["sum_then_normalize", "normalize_then_sum"]


class _Group(NamedTuple):
    """Statistics of each row's group, ``[N]`` or ``[N, R]``; ``deviations`` are exactly 0 in a ``constant`` group."""

    deviations: Tensor
    std: Tensor
    constant: Tensor


def _group(values: Tensor, sizes: Tensor, group_ids: Tensor, kept: Tensor) -> _Group:
    """Compare values ``[N]`` that were added up from float32 numbers of these sizes ``[N]``."""
    mean, std = group_mean(values, group_ids, kept), group_std(values, group_ids, kept)
    # Equal rewards can differ by rounding; divided by epsilon that would be noise.
    constant = equal_within(group_mean(sizes, group_ids, kept), std, torch.float32) | (std <= 1e-8)
    return _Group((values - mean).masked_fill(constant | ~kept, 0.0), std, constant)


def scored_rows(rewards: Tensor) -> Tensor:
    """Rows that at least one reward has scored, bool ``[N]``; NaN in ``rewards`` ``[N, R]`` marks what a reward could not score."""
    return ~rewards.isnan().all(dim=1)


def append_reward(rewards: Tensor, column: Tensor) -> Tensor:
    """``rewards`` ``[N, R]`` and one more column ``[N]``, NaN in the rows that no reward has scored: it alone must not bring them back."""
    column = column.to(rewards).masked_fill(~scored_rows(rewards), float("nan"))
    return torch.cat([rewards, column[:, None]], dim=1)


def _known(rewards: Tensor) -> Tensor:
    """A reward that could not score a row adds nothing to its sum."""
    return rewards.masked_fill(rewards.isnan(), 0.0)


def batch_statistics(values: Tensor, sum_over_ranks: SumOverRanks = identity_sum) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (ddof 1) over all rows of all ranks, in two passes.

    Args:
        values: ``[N]``; N may differ between ranks.
        sum_over_ranks: elementwise sum over ranks; called twice, on every rank.

    Returns:
        Two scalars; the deviation of fewer than two rows is 0.

    >>> batch_statistics(torch.tensor([1.0, 3.0], dtype=torch.float64))
    (tensor(2., dtype=torch.float64), tensor(1.4142, dtype=torch.float64))
    """
    count, total = sum_over_ranks(torch.stack((values.new_tensor(float(len(values))), values.sum()))).unbind()
    mean = total / count.clamp(min=1)
    return mean, pooled_std(values - mean, torch.ones_like(values, dtype=torch.bool), sum_over_ranks)


_DIVISORS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "group": lambda group, batch, epsilon: group + epsilon,
    "batch": lambda group, batch, epsilon: (batch + epsilon).expand_as(group),
    "none": lambda group, batch, epsilon: torch.ones_like(group),
}


def _sum_then_normalize(
    rewards: Tensor, weights: Tensor, group_ids: Tensor, divisor: Callable[[Tensor, Tensor], Tensor], sum_over_ranks: SumOverRanks
) -> tuple[Tensor, Tensor]:
    totals, kept = _known(rewards) @ weights, scored_rows(rewards)
    group = _group(totals, _known(rewards).abs() @ weights.abs(), group_ids, kept)
    _, batch_std = batch_statistics(totals[kept], sum_over_ranks)
    return group.deviations / divisor(group.std, batch_std), group.constant


def _normalize_then_sum(
    rewards: Tensor, weights: Tensor, group_ids: Tensor, divisor: Callable[[Tensor, Tensor], Tensor], sum_over_ranks: SumOverRanks
) -> tuple[Tensor, Tensor]:
    kept, columns = scored_rows(rewards), _known(rewards).unbind(1)
    groups = [_group(column, column.abs(), group_ids, scored) for column, scored in zip(columns, (~rewards.isnan()).unbind(1), strict=True)]
    total = torch.stack([group.deviations / divisor(group.std, group.std) for group in groups], dim=1) @ weights
    mean, std = batch_statistics(total[kept], sum_over_ranks)
    constant = (torch.stack([group.constant for group in groups], dim=1) | (weights == 0)).all(dim=1)
    return ((total - mean) / divisor(std, std)).masked_fill(constant | ~kept, 0.0), constant


_AGGREGATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "sum_then_normalize": _sum_then_normalize,
    "normalize_then_sum": _normalize_then_sum,
}


def task_advantages(
    rewards: Tensor,
    weights: Tensor,
    group_ids: Tensor,
    *,
    scale: str = "group",
    aggregation: str = "sum_then_normalize",
    epsilon: float = 1e-4,
    sum_over_ranks: SumOverRanks = identity_sum,
) -> tuple[Tensor, dict[str, float]]:
    r"""Advantage of each response against the others of its prompt.

    ``sum_then_normalize``: ``r_i = sum_k w_k r_ik``, ``A_i = (r_i - mean_group r) / scale``, with scale the group's standard deviation
    + epsilon (``group``), that of all rewards of all ranks + epsilon (``batch``), or 1 (``none``, Dr. GRPO).
    ``normalize_then_sum`` (GDPO): ``z_ik`` = z-score of each reward within its group, ``A = (Z - mean_batch Z) / (std_batch Z + epsilon)``
    with ``Z_i = sum_k w_k z_ik``; needs ``scale="group"``. Deviations have ddof 1. A group of one, or without variance, gets exactly 0;
    a deviation within four roundings of float32 of what was added up is none.

    Batch statistics are taken over all ranks, so they do not depend on how a window is spread over them.

    NaN marks a reward that could not score a response. It adds nothing to the sum. A response that no reward has scored leaves the means
    and deviations of its group and of the batch, and gets advantage 0, as in TRL 1.16.

    Args:
        rewards: ``[N, R]``, finite or NaN; whole groups on each rank.
        weights: ``[R]``.
        group_ids: int64 ``[N]``; equal ids form a group, whatever the order of rows.
        scale: ``group``, ``batch`` or ``none``.
        aggregation: ``sum_then_normalize`` or ``normalize_then_sum``.
        epsilon: added to every standard deviation.
        sum_over_ranks: elementwise sum over ranks of small float64 tensors on the device of ``rewards``; every rank calls it equally often.

    Returns:
        Advantages float32 ``[N]``, detached, and metrics over all ranks: ``reward`` and ``reward_std`` of the weighted sums,
        ``group_reward_std`` (mean over groups), ``zero_variance_groups`` (share of groups without any signal); all but the last over
        scored responses.

    Raises:
        ConfigError: an unknown option, or ``normalize_then_sum`` with another scale.

    References: Shao et al., DeepSeekMath, arXiv 2402.03300; Liu et al., Dr. GRPO, arXiv 2503.20783; Liu et al., GDPO, arXiv 2601.05242.

    >>> advantages, metrics = task_advantages(torch.tensor([[1.0], [5.0], [0.0]]), torch.ones(1), torch.tensor([3, 8, 3]), scale="none")
    >>> advantages, metrics["zero_variance_groups"]
    (tensor([ 0.5000,  0.0000, -0.5000]), 0.5)
    """
    normalise, divisor = choose(_AGGREGATIONS, aggregation, "reward_aggregation"), choose(_DIVISORS, scale, "advantage_scale")
    if aggregation == "normalize_then_sum" and scale != "group":
        raise ConfigError(f"normalize_then_sum scales each reward by its group: expected advantage_scale 'group', found {scale!r}")
    rewards = rewards.detach().to(accumulator(rewards.device))
    weights = weights.to(rewards)
    advantages, constant = normalise(rewards, weights, group_ids, lambda group, batch: divisor(group, batch, epsilon), sum_over_ranks)
    return advantages.float(), _metrics(_known(rewards) @ weights, scored_rows(rewards), group_ids, constant, sum_over_ranks)


def _metrics(totals: Tensor, kept: Tensor, group_ids: Tensor, constant: Tensor, sum_over_ranks: SumOverRanks) -> dict[str, float]:
    mean, std = batch_statistics(totals[kept], sum_over_ranks)
    share = group_size(group_ids).to(totals.dtype).reciprocal()  # rows of a group add up to one group
    groups, zero, stds = sum_over_ranks(
        torch.stack((share.sum(), (share * constant).sum(), (share * group_std(totals, group_ids, kept)).sum()))
    ).tolist()
    return {
        "reward": mean.item(),
        "reward_std": std.item(),
        "group_reward_std": stds / max(groups, 1.0),
        "zero_variance_groups": zero / max(groups, 1.0),
    }
