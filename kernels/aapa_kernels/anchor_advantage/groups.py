"""Statistics of groups, by group *id* and never by order. Plain torch.

Sums run in float64 (float32 where a device has no float64), so that a group of equal float32 values has exactly their value as its mean
and exactly 0 as its deviation. Results have the type of the values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def accumulator(device: torch.device) -> torch.dtype:
    """The type that sums run in: float64, or float32 on Apple's GPU, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _group_sum(values: Tensor, group_ids: Tensor) -> Tensor:
    """Sum of each row's group, at the row: ``[N, ...]``."""
    unique, index = torch.unique(group_ids, return_inverse=True)
    return values.new_zeros(unique.shape[0], *values.shape[1:]).index_add(0, index, values)[index]


def _counted(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values as the accumulator, 0 outside the mask, and the mask as numbers that broadcast against them."""
    wide = values.to(accumulator(values.device))
    if mask is None:
        mask = torch.ones(values.shape[0], dtype=torch.bool, device=values.device)
    mask = mask.reshape(-1, *[1] * (values.dim() - 1))
    return torch.where(mask, wide, torch.zeros_like(wide)), mask.to(wide.dtype)


def group_statistics(values: Tensor, group_ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation (ddof 1, in two passes) and size of each row's group; the definition of the operator of that name."""
    wide, counted = _counted(values, mask)
    sizes = _group_sum(counted, group_ids)
    means = _group_sum(wide, group_ids) / sizes.clamp_min(1)
    squares = _group_sum(((wide - means) * counted).square(), group_ids)
    # The root is only taken of positive numbers: its gradient at 0 is infinite.
    positive = squares > 0
    std = torch.where(positive, torch.where(positive, squares / (sizes - 1).clamp_min(1), 1.0).sqrt(), 0.0)
    return means.to(values.dtype), std.to(values.dtype), sizes.reshape(-1).to(torch.int64)


def equal_within(mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Return whether values with this mean and deviation differ by rounding at most: ``std <= 4 eps abs(mean)``, bool like them.

    Args:
        mean: of a group, from ``group_statistics``.
        std: of the same group.
        dtype: the type that the values were computed in; eps is its own, at least float64's and at most float32's.
    """
    return std <= 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * mean.abs()


def pooled_std(values: Tensor, mask: Tensor, sum_over_ranks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Standard deviation (ddof 1) of the values of all ranks, with one sum over ranks of (count, sum, sum of squares).

    Meant for values that are centred already: then the sum of squares loses nothing to cancellation.

    Args:
        values: ``[N]``.
        mask: bool ``[N]``, the values that count. Values outside it are not read.
        sum_over_ranks: sums a tensor ``[3]`` over ranks; None in a single process. Every rank has to call, also without values.

    Returns:
        Scalar of the accumulator's type (float64); 0 for fewer than two values.
    """
    wide, counted = _counted(values, mask)
    moments = torch.stack([counted.sum(), wide.sum(), wide.square().sum()])
    if sum_over_ranks is not None:
        moments = sum_over_ranks(moments)
    count, total, squares = moments.unbind()
    variance = (squares - total.square() / count.clamp_min(1)) / (count - 1).clamp_min(1)
    return variance.clamp_min(0).sqrt()
