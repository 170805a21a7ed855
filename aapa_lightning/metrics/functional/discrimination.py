"""How well a discriminator tells experts from others, with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aapa_lightning.metrics.functional.intervals import share_intervals


@dataclass(frozen=True, slots=True)
class Judged:
    """Judged responses.

    Args:
        logits: ``[S]``, of the sentences.
        response_index: int64 ``[S]``.
        labels: bool ``[N]``, written by an expert.
        groups: int64 ``[N]`` in ``0..G-1``, the prompt.
        lengths: ``[N]``, in any unit.
    """

    logits: Tensor
    response_index: Tensor
    labels: Tensor
    groups: Tensor
    lengths: Tensor

    @property
    def means(self) -> Tensor:
        """Mean logit of each response, float64 ``[N]``."""
        zeros = torch.zeros(len(self.labels), dtype=torch.float64)
        sums = zeros.index_add(0, self.response_index, self.logits.double())
        return sums / torch.bincount(self.response_index, minlength=len(self.labels)).clamp_min(1)

    def within(self, chosen: Tensor) -> Judged:
        """The responses in bool ``[N]`` alone, with their prompts numbered anew."""
        rows, place = chosen[self.response_index], chosen.cumsum(0) - 1
        groups = torch.unique(self.groups[chosen], return_inverse=True)[1]
        index = place[self.response_index[rows]]
        return Judged(self.logits[rows], index, self.labels[chosen], groups, self.lengths[chosen])


def weighted_auroc(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counted half.

    Args:
        scores: ``[M]``.
        labels: bool ``[M]``.
        weights: ``[B, M]``, one row per resample.

    Returns:
        float64 ``[B]``; NaN where a class has no weight.
    """
    values, place = torch.unique(scores, return_inverse=True)
    weights = weights.double()
    zeros = torch.zeros(len(weights), len(values), dtype=torch.float64)
    positive = zeros.index_add(1, place, weights * labels)
    negative = zeros.index_add(1, place, weights * ~labels)
    below = negative.cumsum(1) - negative / 2
    return (positive * below).sum(1) / (positive.sum(1) * (negative.sum(1)))


def weighted_paired_accuracy(scores: Tensor, labels: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
    """Share of (expert, other) pairs of the same prompt in which the expert scores higher, ties half; prompts count equally.

    Args:
        scores: ``[N]``.
        labels: bool ``[N]``.
        groups: int64 ``[N]``.
        weights: ``[B, G]``, weight of each prompt.

    Returns:
        float64 ``[B]``; NaN without a prompt that has both.
    """
    shares, rows = [], []
    for group in groups.unique().tolist():
        mine, theirs = scores[(groups == group) & labels], scores[(groups == group) & ~labels]
        if len(mine) and len(theirs):
            difference = mine[:, None] - theirs
            shares.append(((difference > 0).double() + (difference == 0).double() / 2).mean())
            rows.append(group)
    if not shares:
        return torch.full((len(weights),), torch.nan, dtype=torch.float64)
    chosen = weights.double()[:, rows]
    return (chosen * torch.stack(shares)).sum(1) / chosen.sum(1)


def calibration_sums(logits: Tensor, labels: Tensor, weights: Tensor, bins: int = 15) -> Tensor:
    """Sums of a batch from which ``calibration_of`` takes the error; they add up over batches and ranks.

    Args:
        logits: ``[M]``.
        labels: bool ``[M]``.
        weights: ``[M]``.
        bins: equal-width bins of sigma(logit).

    Returns:
        float64 ``[2, 2, bins]``: for the others and for the experts, the weight and the weighted sum of sigma(logit) in each bin.
    """
    probability = torch.sigmoid(logits.double())
    place = (probability * bins).long().clamp(max=bins - 1)
    zeros = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    sides = [torch.where(side, weights.double(), 0.0) for side in (~labels, labels)]
    sums = [zeros.index_add(0, place, values) for weight in sides for values in (weight, weight * probability)]
    return torch.stack(sums).reshape(2, 2, bins)


def calibration_of(sums: Tensor, *, equal_prior: bool = True) -> Tensor:
    """Expected calibration error from ``calibration_sums``: mean gap between probability and share of experts, by weight of the bins.

    Args:
        sums: ``[2, 2, bins]``.
        equal_prior: let both classes weigh the same, as logits at equal class prior ask for.

    Returns:
        Scalar float64; a class without weight adds nothing.
    """
    totals = sums[:, 0].sum(-1)
    shares = sums / ((2 * totals if equal_prior else totals.sum()).clamp_min(1e-300).reshape(-1, 1, 1))
    gaps = shares[:, 1].sum(0) - shares[1, 0]
    return gaps.abs().sum()


def calibration_error(logits: Tensor, labels: Tensor, weights: Tensor, bins: int = 15) -> float:
    """Expected calibration error of sigma(logit) in equal-width bins, with both classes weighing the same.

    Args:
        logits: ``[M]``.
        labels: bool ``[M]``.
        weights: ``[M]``; rescaled so that each class sums to one half.
        bins: number of bins.
    """
    return float(calibration_of(calibration_sums(logits, labels, weights, bins)))


def discrimination(judged: Judged, *, resamples: int = 200, seed: int = 0) -> dict[str, float]:
    """Figures of a discriminator.

    AUROC of sentences, of responses (by mean logit), of the responses in each third of lengths, and of length alone (how far one comes
    without reading); paired accuracy; calibration error of sentences at equal prior, where responses weigh the same. Intervals are of 95%,
    over prompts, see ``share_intervals``.

    Args:
        judged: at least one expert response and one other.
        resamples: of the bootstrap over prompts, which gives the variance; 0 for no intervals.
        seed: of the bootstrap.

    Returns:
        ``sentence_auroc``, ``response_auroc``, ``paired_accuracy`` (each with ``_low`` and ``_high``), ``ece``, ``length_auroc`` and
        ``response_auroc_{short,medium,long}`` where both classes occur.
    """
    labels, groups, index, means = judged.labels, judged.groups, judged.response_index, judged.means
    count = int(groups.max()) + 1
    draws = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    drawn = torch.zeros(resamples, count).scatter_add(1, draws, torch.ones(resamples, count))
    weights = torch.cat([torch.ones(1, count), drawn])
    curves = {
        "sentence_auroc": weighted_auroc(judged.logits, labels[index], weights[:, groups[index]]),
        "response_auroc": weighted_auroc(means, labels, weights[:, groups]),
        "paired_accuracy": weighted_paired_accuracy(means, labels, groups, weights),
    }
    paired = [len(groups[side].unique()) for side in (labels, ~labels)]
    both = int(torch.isin(groups[labels].unique(), groups[~labels]).sum())
    informative = {"sentence_auroc": min(paired), "response_auroc": min(paired), "paired_accuracy": both}
    out: dict[str, float] = {}
    for name, values in curves.items():
        out[name] = float(values[0])
        if resamples and bool(values[1:].isfinite().any()):
            low, high = share_intervals(values[:1], values[1:, None], informative[name]).flatten().tolist()
            out |= {f"{name}_low": low, f"{name}_high": high}
    per_response = torch.bincount(index, minlength=len(labels)).clamp_min(1)
    out["ece"] = calibration_error(judged.logits, labels[index], 1.0 / per_response[index])
    ones = torch.ones(1, len(labels))
    out["length_auroc"] = float(weighted_auroc(judged.lengths, labels, ones))
    edges = torch.quantile(judged.lengths.double(), torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    third = torch.bucketize(judged.lengths.double(), edges)
    for number, name in enumerate(("short", "medium", "long")):
        inside = third == number
        value = float(weighted_auroc(means[inside], labels[inside], ones[:, inside])) if bool(inside.any()) else float("nan")
        out[f"response_auroc_{name}"] = value
    return {name: value for name, value in out.items() if not math.isnan(value)}
