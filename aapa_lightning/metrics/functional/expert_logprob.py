"""Mean log-probability of expert tokens: the functional core."""

from __future__ import annotations

from torch import Tensor

from aapa_lightning.reduce import masked_sum


def expert_logprob_update(logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count of a batch, which add up over batches and ranks.

    Args:
        logprobs: ``[N, L]`` nats, the policy's, of the expert's tokens.
        mask: bool ``[N, L]``.

    Returns:
        Scalars: sum in nats (float32), tokens (int64).
    """
    return masked_sum(logprobs.detach(), mask), mask.sum()


def expert_logprob_compute(total: Tensor, tokens: Tensor) -> Tensor:
    """Nats per token; 0 without tokens."""
    return total / tokens.clamp(min=1)


def expert_logprob(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean log-probability of the expert's tokens, nats per token.

    >>> import torch
    >>> expert_logprob(torch.tensor([[-1.0, -2.0], [-6.0, -9.0]]), torch.tensor([[True, True], [True, False]]))
    tensor(-3.)
    """
    return expert_logprob_compute(*expert_logprob_update(logprobs, mask))
