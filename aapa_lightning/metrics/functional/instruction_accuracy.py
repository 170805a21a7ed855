"""IFEval's four accuracies, and their intervals: the functional core."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aapa_lightning.metrics.functional.intervals import share_intervals

#: The four accuracies, in the order of IFEval's reports.
ACCURACIES = ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose")


def verdict_counts(strict: Sequence[bool], loose: Sequence[bool]) -> list[int]:
    """Counts of one response, which add up over responses, batches and ranks.

    Args:
        strict: strict verdict on each instruction, at least one.
        loose: loose verdicts, in the same order.

    Returns:
        ``[1, all followed strictly, all followed loosely, instructions, followed strictly, followed loosely]``.

    Raises:
        ValueError: no instruction, or lists of different lengths.

    >>> verdict_counts([True, False], [True, True])
    [1, 0, 1, 2, 1, 2]
    """
    if not strict or len(strict) != len(loose):
        raise ValueError(f"expected as many loose verdicts as strict ones, at least one; found {len(strict)} and {len(loose)}")
    return [1, int(all(strict)), int(all(loose)), len(strict), sum(map(bool, strict)), sum(map(bool, loose))]


def instruction_accuracy(counts: Tensor) -> Tensor:
    """Share of responses that follow all their instructions and share of instructions that are followed, strict and loose.

    Args:
        counts: ``[..., 6]``, sums of ``verdict_counts``.

    Returns:
        float64 ``[..., 4]`` in the order of ``ACCURACIES``; NaN without responses.

    >>> instruction_accuracy(torch.tensor([[1, 0, 1, 2, 1, 2], [1, 1, 1, 2, 2, 2]]).sum(0))
    tensor([0.5000, 0.7500, 1.0000, 1.0000], dtype=torch.float64)
    """
    counts = counts.double()
    responses, prompt_strict, prompt_loose, instructions, strict, loose = counts.unbind(-1)
    return torch.stack((prompt_strict / responses, strict / instructions, prompt_loose / responses, loose / instructions), -1)


def bootstrap_intervals(counts: Tensor, *, resamples: int = 1000, seed: int = 0) -> Tensor:
    """95% intervals over prompts, whose responses stay together, see ``share_intervals``.

    Args:
        counts: int64 ``[P, 6]``, sums of ``verdict_counts`` over the responses to each prompt.
        resamples: how many times ``P`` prompts are drawn with replacement, for the variance.
        seed: of the draw; equal seeds give equal intervals.

    Returns:
        float64 ``[2, 4]``: lower and upper ends, in the order of ``ACCURACIES``.

    Reference: B. Efron, Bootstrap Methods: Another Look at the Jackknife, Annals of Statistics 7 (1), 1979.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts, whole = len(counts), counts.double()
    drawn = [
        torch.bincount(torch.randint(prompts, (prompts,), generator=generator), minlength=prompts).double() @ whole
        for _ in range(resamples)
    ]
    values = instruction_accuracy(torch.stack(drawn))
    return share_intervals(instruction_accuracy(whole.sum(0)), values, prompts)
