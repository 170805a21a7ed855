"""How far response lengths are from the expert's."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from aapa_lightning.metrics.functional.length_distance import length_distance


class LengthDistance(Metric):
    """Wasserstein-1 distance between response lengths and expert lengths, in tokens: how many a response is off, distributions matched.

    >>> metric = LengthDistance()
    >>> metric.update(torch.tensor([10]), torch.tensor([13, 21]))
    >>> metric.update(torch.tensor([20]), torch.tensor([13, 21]))
    >>> metric.compute()
    tensor(2.)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    response_lengths: list[Tensor]
    expert_lengths: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("response_lengths", [], dist_reduce_fx="cat")
        self.add_state("expert_lengths", [], dist_reduce_fx="cat")

    def update(self, response_lengths: Tensor, expert_lengths: Tensor) -> None:
        """Add a batch: lengths in tokens, ``[N]`` and ``[M]`` (the sizes may differ)."""
        # Float, as torchmetrics fills in for a rank without data; exact up to 2^24 tokens.
        self.response_lengths.append(response_lengths.detach().float())
        self.expert_lengths.append(expert_lengths.detach().float())

    def compute(self) -> Tensor:
        """Tokens; 0 without responses or without experts."""
        ours, theirs = (
            dim_zero_cat(lengths) if len(lengths) else torch.empty(0, device=self.device)
            for lengths in (self.response_lengths, self.expert_lengths)
        )
        return length_distance(ours, theirs)
