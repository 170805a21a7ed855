"""Mean log-probability of expert tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from aapa_lightning.metrics.functional.expert_logprob import expert_logprob_compute, expert_logprob_update


class ExpertLogProb(Metric):
    """Mean log-probability that the policy gives to the tokens of expert responses, nats per token.

    Weighted by tokens, so it does not depend on how responses are spread over batches and ranks.

    >>> metric = ExpertLogProb()
    >>> metric.update(torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]]))
    >>> metric.update(torch.tensor([[-6.0, -9.0]]), torch.tensor([[True, False]]))
    >>> metric.compute()
    tensor(-3.)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logprobs: Tensor, mask: Tensor) -> None:
        """Add a batch: log-probs ``[N, L]`` in nats and the bool mask ``[N, L]`` of expert tokens."""
        total, tokens = expert_logprob_update(logprobs, mask)
        self.total += total
        self.tokens += tokens

    def compute(self) -> Tensor:
        """Nats per token; 0 without tokens."""
        return expert_logprob_compute(self.total, self.tokens)
