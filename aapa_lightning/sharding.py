"""Models whose parameters lie in shards on several ranks (``torch.distributed.fsdp.fully_shard``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from aapa_lightning.errors import ConfigError

#: Units whose parameters ``gathered_parameters`` holds.
_GATHERED: WeakSet[FSDPModule] = WeakSet()


def shard_units(model: nn.Module) -> list[FSDPModule]:
    """The modules that ``fully_shard`` was called on."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def parameter_groups(units: list[FSDPModule]) -> list[Any]:
    """FSDP's own objects behind the units: what is gathered and reduced together."""
    # torch has no public way to their state; in earlier versions a unit holds a single group, under the second name.
    states: list[Any] = [unit._get_fsdp_state() for unit in units]
    groups = [g for s in states for g in getattr(s, "_fsdp_param_groups", None) or [s._fsdp_param_group] if g is not None]
    return list({id(group): group for group in groups}.values())


def reshard(model: nn.Module) -> None:
    """Drop gathered parameters: the next forward gathers what the shards hold by then."""
    for unit in shard_units(model):
        unit.reshard()


@contextmanager
def gathered_parameters(model: nn.Module) -> Iterator[None]:
    """Hold all parameters of a sharded model whole on every rank, so that forwards without gradients need no other rank.

    Inside, ranks may call the model as often as they like, or not at all. All ranks enter and leave together. Takes the memory of the
    whole model on each rank, in the dtype that its forward computes in. Parameters are those of the last optimiser step; afterwards they
    are dropped, also by an exception, and training goes on as if nothing had happened. Calls may nest. Does nothing to a model that is
    not sharded.

    Args:
        model: the model, under an adapter or not; what of it ``fully_shard`` was called on is gathered.

    Raises:
        ConfigError: parameters that DeepSpeed's ZeRO stage 3 partitions: their forwards always need all ranks.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ConfigError(
            "gathered_parameters: expected whole parameters or shards of FSDP2, found those of ZeRO stage 3; keep ranks in step"
        )
    units = [unit for unit in shard_units(model) if unit not in _GATHERED]
    _finish_sharding(units)
    groups = parameter_groups(units)
    before = _Bookkeeping(units, groups)
    _GATHERED.update(units)
    try:
        # no inference tensors: training would meet the same gathered parameters again
        with torch.inference_mode(False), torch.no_grad():
            for unit in units:
                unit.reshard()  # what an earlier forward left may be older than the shards
                unit.unshard()
        for group in groups:
            group.post_forward_mesh_info = None
        yield
    finally:
        before.restore()
        for unit in units:
            unit.reshard()
            _GATHERED.discard(unit)


def _finish_sharding(units: list[FSDPModule]) -> None:
    """What FSDP does at the first forward of an outermost unit."""
    inside: set[nn.Module] = set()
    for unit in units:
        if unit not in inside:
            unit._get_fsdp_state()._lazy_init()
            inside.update(cast(nn.Module, unit).modules())


class _Bookkeeping:
    """What forwards change in FSDP's state: where it is within an iteration, and which groups it met."""

    def __init__(self, units: list[FSDPModule], groups: list[Any]) -> None:
        self.states: list[Any] = list({id(state): state for state in (unit._get_fsdp_state() for unit in units)}.values())
        self.groups = groups
        self._training = [(part, part._training_state) for part in (*self.states, *groups)]
        self._roots = [state._state_ctx.iter_forward_root for state in self.states]
        self._meshes = [group.post_forward_mesh_info for group in groups]
        self._orders = [len(group.comm_ctx.post_forward_order) for group in groups]

    def restore(self) -> None:
        for state, root in zip(self.states, self._roots, strict=True):
            state._state_ctx.iter_forward_root = root
        for part, training_state in self._training:  # an exception leaves them in the middle of a forward
            part._training_state = training_state
        for group, mesh, length in zip(self.groups, self._meshes, self._orders, strict=True):
            group.post_forward_mesh_info = mesh
            del group.comm_ctx.post_forward_order[length:]
            group._post_forward_indices = [i for i in group._post_forward_indices if i < length]
