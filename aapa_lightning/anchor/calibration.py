"""Offset and temperature of a trained head: what makes its logits log-odds at equal prior."""

from __future__ import annotations

import torch
from torch import Tensor

#: Least and largest temperature.
TEMPERATURES = (0.05, 20.0)
#: Offsets and temperature depend on each other a little; each pass fits one after the other.
CALIBRATION_PASSES = 6


def fit_offset(logits: Tensor, place: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Offset b at which ``sigma((l - b) / T)`` is one half on average, with both classes weighing the same, and responses in a class.

    Pairs leave the offset of a logit open, but transforms such as ``gan_ns`` read it as log-odds at equal prior.

    Args:
        logits: ``[S]``.
        place: int64 ``[S]``, each sentence's response.
        labels: bool ``[N]``; responses without a sentence do not count.
        temperature: T.

    Returns:
        b; 0 when a class is missing.
    """
    counts = torch.bincount(place, minlength=len(labels))
    sides = [(labels == side) & (counts > 0) for side in (False, True)]
    if not all(bool(side.any()) for side in sides):
        return 0.0
    weights = (sum(side.double() / side.sum() for side in sides) / counts.clamp_min(1))[place]
    exact = logits.double()
    low, high = float(exact.min()), float(exact.max())
    for _ in range(60):  # the mean falls in b
        middle = (low + high) / 2
        above = float((weights * torch.sigmoid((exact - middle) / temperature)).sum()) > 1
        low, high = (middle, high) if above else (low, middle)
    return (low + high) / 2


def calibrate(
    logits: Tensor, heads: Tensor, count: int, place: Tensor, labels: Tensor, *, offset: bool, scale: bool
) -> tuple[Tensor, float]:
    """Offset of each head and the temperature of all at which ``(l - b) / T`` is log-odds at equal prior.

    Args:
        logits: ``[S]``, each by a head that was not trained on the prompt.
        heads: int64 ``[S]``, which head.
        count: number of heads ``K``.
        place: int64 ``[S]``, each sentence's response.
        labels: bool ``[N]``.
        offset: fit the offsets; otherwise they are 0.
        scale: fit the temperature; otherwise it is 1.

    Returns:
        float64 ``[K]``, 0 for a head without sentences of both classes; and T.
    """
    offsets, temperature = torch.zeros(count, dtype=torch.float64), 1.0
    for _ in range(CALIBRATION_PASSES if offset and scale else 1):
        for k in range(count if offset else 0):
            mine = heads == k
            offsets[k] = fit_offset(logits[mine], place[mine], labels, temperature)
        if scale:
            temperature = fit_temperature(logits - offsets[heads], place, labels)
    return offsets, temperature


def fit_temperature(logits: Tensor, place: Tensor, labels: Tensor) -> float:
    """Temperature T at which held-out logits are log-odds: the least binary cross-entropy of l / T, weighted like the training loss.

    Classes weigh the same, and so do the responses of a class. Targets are drawn in by one response of the other class, (n + 1) / (n + 2),
    so that a few responses told apart without an error do not ask for certainty.

    Args:
        logits: ``[S]``, none of them by a head that was trained on their prompt.
        place: int64 ``[S]``, each sentence's response.
        labels: bool ``[N]``; responses without a sentence do not count.

    Returns:
        T in ``TEMPERATURES``; 1 when a class is missing or the logits say nothing.

    Reference:
        Guo et al. 2017, On Calibration of Modern Neural Networks, section 4.2; the targets are those of Platt 1999.
    """
    counts = torch.bincount(place, minlength=len(labels))
    sides = [(labels == side) & (counts > 0) for side in (False, True)]
    numbers = [int(side.sum()) for side in sides]
    if not all(numbers) or not bool(logits.any()):
        return 1.0
    weights = sum(side.double() / number for side, number in zip(sides, numbers, strict=True)) / counts.clamp_min(1)
    targets = torch.where(labels, (numbers[1] + 1) / (numbers[1] + 2), 1 / (numbers[0] + 2)).double()
    exact, weight, target = logits.double(), weights[place], targets[place]
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    for _ in range(60):  # the loss is convex in 1 / T, so its slope changes sign once
        middle = (low + high) / 2
        rising = float((weight * exact * (torch.sigmoid(middle * exact) - target)).sum()) > 0
        low, high = (low, middle) if rising else (middle, high)
    return 2 / (low + high)
