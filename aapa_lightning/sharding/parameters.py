"""Models whose parameters lie in shards on several ranks (``torch.distributed.fsdp.fully_shard``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from aapa_lightning.errors import ConfigError

#: Units whose parameters ``gathered_parameters`` holds.
_GATHERED: WeakSet[FSDPModule] = WeakSet()


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward needs all ranks (FSDP2, tensor parallel, ZeRO-3)."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def shard_units(model: nn.Module) -> list[FSDPModule]:
    """The modules that ``fully_shard`` was called on."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def parameter_groups(units: list[FSDPModule]) -> list[Any]:
    """FSDP's own objects behind the units: what is gathered and reduced together."""
    # torch has no public way to their state; in earlier versions a unit holds a single group, under the second name.
    states: list[Any] = [unit._get_fsdp_state() for unit in units]
    groups = [g for s in states for g in getattr(s, "_fsdp_param_groups", None) or [s._fsdp_param_group] if g is not None]
    return list({id(group): group for group in groups}.values())


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """A model's layers: the list that holds most of its weights. Empty for a model without a list.

    The experts and heads of a layer are lists too, but lie inside of this one.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda entry: sum(p.numel() for p in entry.parameters()), default=[]))


def shard_model(model: nn.Module, mesh: DeviceMesh, param_dtype: torch.dtype | None = None) -> None:
    """Shard a model over the ranks of a mesh: a unit for every layer, and one for all else.

    Gradients are averaged in float32, over the ranks of the mesh. Ranks must hold equal weights; of weights on the meta device they hold
    none afterwards, see ``aapa_lightning.sharding.materialize``.

    Args:
        model: any Hugging Face model, adapters included.
        mesh: of one dimension.
        param_dtype: dtype in which weights are gathered and forwards compute; the shards, gradients and optimiser state keep their own.
            None for that of the weights.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for block in decoder_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def reshard(model: nn.Module) -> None:
    """Drop gathered parameters: the next forward gathers what the shards hold by then."""
    for unit in shard_units(model):
        unit.reshard()


class WholeTensors(Mapping[str, Tensor]):
    """A state dictionary whose sharded tensors are gathered when they are looked at: by all ranks, in the same order."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Tensor:
        value = self._state[name].detach()
        return value.full_tensor() if isinstance(value, DTensor) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def gather_state(model: nn.Module) -> dict[str, Tensor] | None:
    """A sharded model's whole state dictionary, on the CPU of rank 0; other ranks get an empty one. All ranks call it together.

    Tensors are gathered one at a time, and tied ones once. None for a model that is not sharded, whose own will do.
    """
    state = model.state_dict(keep_vars=True)  # tied ones are one object then
    if not any(isinstance(value, DTensor) for value in state.values()):
        return None
    whole, first = WholeTensors(state), torch.distributed.get_rank() == 0
    found: dict[str, Tensor] = {}
    kept: dict[int, Tensor] = {}
    for name, value in state.items():
        if id(value) not in kept:
            gathered = whole[name]
            kept[id(value)] = gathered.cpu() if first else torch.empty(0)
        if first:
            found[name] = kept[id(value)]
    return found


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
