"""Ranks that share one model must run it equally often; here they agree on how often."""

from __future__ import annotations

import torch
from torch import nn


def can_gather(model: nn.Module) -> bool:
    """Whether ``sharding.gathered_parameters`` knows the model's shards; it does not know ZeRO-3's."""
    return not any(hasattr(p, "ds_id") for p in model.parameters())


def max_over_ranks(value: int, device: torch.device) -> int:
    """The largest of all ranks' values; the value itself in a single process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    found = torch.tensor(value, device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return int(found)
