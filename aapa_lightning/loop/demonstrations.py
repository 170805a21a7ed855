"""Batches of demonstrations: expert responses to imitate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aapa_lightning.logprobs import sequence_logprobs
from aapa_lightning.types import Demonstration, pad_right


@dataclass(slots=True)
class DemonstrationBatch:
    """Padded demonstrations.

    Args:
        input_ids: int64 ``[B, T]``, padded on the right.
        attention_mask: bool ``[B, T]``.
        response_mask: bool ``[B, T]``, the tokens to learn; never the first, which nothing predicts.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor


def collate_demonstrations(rows: Sequence[Demonstration], pad_token_id: int, device: torch.device | str = "cpu") -> DemonstrationBatch:
    """Pad demonstrations on the right; masks come from lengths, so the padding id may be any."""
    input_ids = pad_right([row.input_ids for row in rows], pad_token_id)
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    learn = pad_right([[int(flag) for flag in row.response_mask] for row in rows], 0).bool()
    learn[:, 0] = False
    attention_mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return DemonstrationBatch(input_ids.to(device), attention_mask.to(device), learn.to(device))


def count_demonstrations(rows: Sequence[Demonstration]) -> Tensor:
    """int64 ``[2]``: learned tokens and demonstrations with at least one, as ``reduce.count_step`` counts them."""
    tokens = [sum(row.response_mask[1:]) for row in rows]
    return torch.tensor([sum(tokens), sum(count > 0 for count in tokens)])


def demonstration_logprobs(
    model: nn.Module, rows: Sequence[Demonstration], pad_token_id: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Run the policy over demonstrations.

    Returns:
        Log-probs, float32 ``[B, T - 1]`` nats, and the mask of learned tokens, bool, the same shape.
    """
    batch = collate_demonstrations(rows, pad_token_id, device)
    logprobs = sequence_logprobs(model, batch.input_ids, batch.attention_mask, batch.response_mask)
    return logprobs, batch.response_mask[:, 1:]
