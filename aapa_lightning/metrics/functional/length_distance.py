"""Wasserstein-1 distance between two sets of lengths: the functional core."""

from __future__ import annotations

import torch
from torch import Tensor


def length_distance(response_lengths: Tensor, expert_lengths: Tensor) -> Tensor:
    r"""Wasserstein-1 distance between the two empirical distributions, ``integral |F(x) - G(x)| dx``, in tokens.

    Args:
        response_lengths: ``[N]`` tokens.
        expert_lengths: ``[M]`` tokens.

    Returns:
        Scalar, tokens, float32; 0 if either set is empty.

    Reference: A. Ramdas et al., On Wasserstein Two Sample Testing and Related Families of Nonparametric Tests, 2015, arXiv 1509.02237.

    >>> length_distance(torch.tensor([10, 20]), torch.tensor([13, 21, 13, 21]))
    tensor(2.)
    """
    ours, theirs = response_lengths.float().sort().values, expert_lengths.float().sort().values
    if not len(ours) or not len(theirs):
        return torch.zeros((), device=ours.device)
    points = torch.cat((ours, theirs)).sort().values
    cdf = torch.searchsorted(ours, points[:-1], right=True) / len(ours)
    expert_cdf = torch.searchsorted(theirs, points[:-1], right=True) / len(theirs)
    return ((cdf - expert_cdf).abs() * points.diff()).sum()
