"""Parameters that lie in shards on several ranks (``torch.distributed.fsdp.fully_shard``): their gradients, sums, and gathered copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from aapa_lightning.sharding import parameter_groups, shard_units


def local(value: Tensor) -> Tensor:
    """This rank's part of a tensor, of the same storage; all of it where it is not sharded."""
    with torch.no_grad():
        # .data: writes that are undone later must not make the caller's open graphs refuse to run
        return value.to_local().data if isinstance(value, DTensor) else value.data


def sum_over_shards(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> list[float]:
    """Sum vectors over parameters, and over the ranks that hold their shards.

    Args:
        parameters: the parameters.
        values: floating ``[k]`` of each, computed from ``local`` of it.

    Returns:
        ``k`` sums, equal on all ranks.
    """
    groups: dict[Any, list[Tensor]] = {}
    for parameter, value in zip(parameters, values, strict=True):
        key = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
        groups.setdefault(key, []).append(value)
    totals = []
    for key, rows in groups.items():  # one reduction a group
        total = torch.stack([row.to(rows[0].device) for row in rows]).sum(0)
        if key is not None:
            placements = [Replicate() if placement.is_replicate() else Partial() for placement in key[1]]
            total = DTensor.from_local(total, key[0], placements, run_check=False).full_tensor()
        totals.append(total.tolist())
    return [sum(column) for column in zip(*totals, strict=True)]


def sharded_gradient(model: nn.Module, loss: Tensor, parameters: Sequence[nn.Parameter], *, retain_graph: bool = False) -> list[Tensor]:
    """Gradient of a loss, reduced over the ranks and sharded as the parameters are; leaves no trace in ``.grad``.

    The parameters of the forward are gathered copies of these, so ``autograd.grad`` does not know them: only a backward leads here.

    Args:
        model: holds the sharded modules.
        loss: scalar with a graph.
        parameters: those wanted; no others may require gradients.
        retain_graph: leave the graph for another backward.

    Returns:
        One DTensor (or tensor, where a parameter is not sharded) per parameter, zero where the loss does not depend on it.
    """
    before = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        with _empty_and_reducing(model):
            loss.backward(retain_graph=retain_graph)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    finally:
        for p, grad in zip(parameters, before, strict=True):
            p.grad = grad


@contextmanager
def _empty_and_reducing(model: nn.Module) -> Iterator[None]:
    # While a trainer accumulates, FSDP does not reduce, and keeps gradients in places of its own that a reducing backward would empty.
    groups = parameter_groups(shard_units(model))
    flags = [(group.reduce_grads, group.all_reduce_grads) for group in groups]
    held = [(p, p.unsharded_accumulated_grad) for group in groups for p in group.fsdp_params]
    gathered = [p._unsharded_param for p, _ in held if hasattr(p, "_unsharded_param")]
    grads = [p.grad for p in gathered]
    try:
        for group in groups:
            group.reduce_grads = group.all_reduce_grads = True
        for p, _ in held:
            p.unsharded_accumulated_grad = None
        for gathered_p in gathered:
            gathered_p.grad = None
        yield
    finally:
        for group, (reduce_grads, all_reduce_grads) in zip(groups, flags, strict=True):
            group.reduce_grads, group.all_reduce_grads = reduce_grads, all_reduce_grads
        for p, accumulated in held:
            p.unsharded_accumulated_grad = accumulated
        for gathered_p, grad in zip(gathered, grads, strict=True):
            gathered_p.grad = grad
