"""Supervised fine-tuning: negative log-likelihood of demonstrations."""

from __future__ import annotations

from torch import Tensor

from aapa_lightning.types import LossOutputs


def sft_loss(logprobs: Tensor, response_mask: Tensor, weights: Tensor | None = None) -> LossOutputs:
    r"""Weighted negative log-likelihood per token, ``l_it = -w_it log pi(y_it)``.

    Args:
        logprobs: ``[N, L]`` nats, the policy's, of the expert's tokens.
        response_mask: bool ``[N, L]``, the tokens to learn.
        weights: ``[N, L]`` token weights, treated as constants; None is 1 everywhere.

    Returns:
        Losses ``[N, L]`` in nats; metric ``nll``, unweighted.

    >>> import torch
    >>> sft_loss(torch.tensor([[-2.0, -1.0]]), torch.tensor([[True, False]])).losses
    tensor([[2., 0.]])
    """
    nll = (-logprobs).masked_fill(~response_mask, 0.0)
    losses = nll if weights is None else nll * weights.detach().masked_fill(~response_mask, 0.0)
    return LossOutputs(losses, {"nll": nll.detach()})
