"""Intervals of shares and AUROCs over clusters: Wilson's, at the number of clusters that the bootstrap says they are worth."""

from __future__ import annotations

import torch
from torch import Tensor

#: Quantile of the normal distribution for 95%.
_Z = 1.959963984540054
#: With fewer clusters nothing can be said of others.
_LEAST = 3


def t_quantile(freedom: int) -> float:
    """97.5% quantile of Student's t, to 1% from 2 degrees of freedom on.

    Reference: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.

    >>> round(t_quantile(9), 3)
    2.262
    """
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def share_intervals(values: Tensor, resampled: Tensor, clusters: int) -> Tensor:
    """95% intervals of figures between 0 and 1, such as shares and AUROCs, of which clusters were drawn.

    Wilson's interval ``{theta: (v - theta)^2 <= t^2 theta (1 - theta) / m}``, t Student's with ``n - 1`` degrees of freedom. Where every
    cluster is a yes or a no, ``m`` is their number n. A cluster of several responses says more: ``m = n (1 + (r - 1) k / (k + z^2))``
    with ``r = v (1 - v) / (n V)``, V the variance of the resampled figures, and ``k = 4 n v (1 - v)``: near 0 and 1 few clusters differ,
    V is hardly known, and m returns to n. So a perfect figure does not get an interval without width, as it does from percentiles.

    Args:
        values: ``[F]``, the figures.
        resampled: ``[B, F]``, the same of resampled clusters; NaN where a resample has none.
        clusters: n, such as the number of prompts.

    Returns:
        float64 ``[2, F]``, lower and upper ends; 0 and 1 with fewer than 3 clusters.

    References: E. B. Wilson, Probable Inference, JASA 22, 1927; N. Dean and M. Pagano, Evaluating Confidence Interval Methods for Binomial
    Proportions in Clustered Surveys, J. Survey Statistics and Methodology 3, 2015, for effective sample sizes.
    """
    value = values.double()
    if clusters < _LEAST:
        return torch.stack([torch.zeros_like(value), torch.ones_like(value)])
    known = ~resampled.isnan()
    count = known.sum(0).clamp_min(1)
    drawn = torch.where(known, resampled.double(), 0.0)
    spread = torch.where(known, (drawn - drawn.sum(0) / count).square(), 0.0).sum(0) / (count - 1).clamp_min(1)
    binary = value * (1 - value)
    each = spread * clusters / (clusters - 1) * clusters  # variance that a cluster contributes
    ratio = torch.where(each > 0, binary / each.clamp_min(1e-300), 1.0)
    trust = 4 * clusters * binary
    worth = clusters * torch.where(ratio > 1, 1 + (ratio - 1) * trust / (trust + _Z**2), ratio)
    square = t_quantile(clusters - 1) ** 2
    middle = (value + square / (2 * worth)) / (1 + square / worth)
    half = (binary * square / worth + (square / (2 * worth)).square()).sqrt() / (1 + square / worth)
    return torch.stack([(middle - half).clamp(min=0), (middle + half).clamp(max=1)])
