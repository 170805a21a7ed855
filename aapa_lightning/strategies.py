"""``--trainer.strategy fsdp2`` and ``deepspeed_stage_2``: Lightning's own, with checkpoints that a kill leaves whole."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from aapa_lightning.digests import write_digests
from aapa_lightning.errors import ConfigError
from aapa_lightning.modules.checkpointing import gather_over_ranks
from aapa_lightning.sharding import reshard
from aapa_lightning.sharding.files import (
    DIGESTS,
    SavedTensor,
    check_checkpoint,
    is_deepspeed_folder,
    local_rows,
    map_tensors,
    publish,
    read_checkpoint,
    write_folder,
)


class FSDP2Strategy(ModelParallelStrategy):
    """Parameters, gradients and optimiser state in shards over all devices (FSDP2). Registered as ``fsdp2``.

    A checkpoint of any number of ranks, or of another strategy, is read by rows: no rank holds more than its share.

    Args:
        save_distributed_checkpoint: a checkpoint is a folder to which every rank writes its shards, on a disk that all ranks see; or one
            file, as of any other strategy, gathered and written by rank 0.
        **kwargs: ``process_group_backend`` and ``timeout``, see ``ModelParallelStrategy``.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, **kwargs: Any) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint, **kwargs)

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @override
    def setup(self, trainer: Trainer) -> None:
        if not is_overridden("configure_model", self.lightning_module, LightningModule):
            name = type(self.lightning_module).__name__
            raise ConfigError(f"trainer.strategy: expected a module that can be sharded, found {name}; leave the strategy out, or use ddp")
        super().setup(trainer)

    # Checkpoints: sharded tensors stay what they are until they are written, and are read by rows -----------------------------------------

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._module.state_dict(keep_vars=True)  # tied tensors are one object

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise TypeError("FSDP2Strategy writes local files and takes no storage_options")
        path = Path(self.broadcast(str(filepath)))
        if not self._save_distributed_checkpoint:
            whole = map_tensors(checkpoint, _Gather(self.global_rank == 0))
            if self.global_rank == 0:
                self.checkpoint_io.save_checkpoint(whole, path)
            return
        folder = _new_folder(self, path)
        write_folder(checkpoint, folder, self.global_rank, self.barrier)
        _publish(self, folder, path)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        reshard(self._module)  # gathered parameters would hide the new ones
        path = self.broadcast(str(checkpoint_path))
        _check_together(self, path)
        return read_checkpoint(path, check=False)

    @override
    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        saved, own = checkpoint["state_dict"], self._module.state_dict(keep_vars=True)
        wrong = sorted(saved.keys() ^ own.keys())
        if strict and wrong:
            raise ConfigError(f"checkpoint: expected the weights of this model, found others: {', '.join(wrong[:3])} ({len(wrong)} in all)")
        for name in saved.keys() & own.keys():
            value, mine = saved[name], own[name]
            if tuple(value.shape) != tuple(mine.shape):
                raise ConfigError(f"checkpoint: expected {name} of shape {list(mine.shape)}, found {list(value.shape)}")
            target = mine.to_local() if isinstance(mine, DTensor) else mine
            target.data.copy_(_rows_like(value, mine))

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            own = dict(zip(numbers, parameters, strict=True))
            placed = {number: map_tensors(values, partial(_place, parameter=own[number])) for number, values in state["state"].items()}
            optimizer.load_state_dict({**state, "state": placed})

    @property
    def _module(self) -> nn.Module:
        if self.model is None:
            raise RuntimeError("the strategy has no model yet")
        return self.model


class ZeROStrategy(DeepSpeedStrategy):
    """DeepSpeed's ZeRO stages 1 and 2. Registered as ``deepspeed``, ``deepspeed_stage_1``, ``deepspeed_stage_2`` and with ``_offload``.

    A checkpoint is a folder of DeepSpeed's, written whole before it takes its place. Takes Lightning's arguments.
    """

    @override
    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CUDAAccelerator):
            raise ConfigError(
                f"trainer.strategy: DeepSpeed expects --trainer.accelerator gpu, found {type(self.accelerator).__name__}; use ddp or fsdp2"
            )
        super().setup_environment()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        path = Path(self.broadcast(str(filepath)))
        folder = _new_folder(self, path)
        super().save_checkpoint(checkpoint, folder, storage_options)
        self.barrier()
        if self.is_global_zero:
            write_digests(folder, DIGESTS)
        _publish(self, folder, path)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(str(checkpoint_path)))
        if not is_deepspeed_folder(path):
            raise ConfigError(
                f"{path}: expected a checkpoint of DeepSpeed's stages 1 or 2, found another, or none; name the strategy that wrote it, or "
                "start from its weights: aapa export writes a folder for policy.model"
            )
        _check_together(self, path)
        ranks = read_checkpoint(path, check=False)["dp_world_size"]
        trainer: Any = self.lightning_module and self.lightning_module.trainer
        if trainer.state.fn == TrainerFn.FITTING and ranks != self.world_size:
            raise ConfigError(f"{path}: DeepSpeed resumes on as many ranks as wrote the checkpoint, {ranks}; found {self.world_size}")
        return super().load_checkpoint(path, weights_only)


def _new_folder(strategy: Strategy, path: Path) -> Path:
    """A hidden folder for a checkpoint that shall lie at ``path``; the same on all ranks."""
    return path.with_name(f".{path.name}.{strategy.broadcast(uuid.uuid4().hex[:8])}")


def _check_together(strategy: Any, path: str | Path) -> None:
    """Look at every byte of a checkpoint, each rank at its share; what one finds all of them raise."""
    found = None
    try:
        check_checkpoint(path, strategy.global_rank, strategy.world_size)
    except ConfigError as error:
        found = str(error)
    if problems := [problem for problem in gather_over_ranks(found) if problem is not None]:
        raise ConfigError(problems[0])


def _publish(strategy: Strategy, folder: Path, path: Path) -> None:
    if strategy.is_global_zero:
        publish(folder, path)
    strategy.barrier()


class _Gather:
    """Whole copies on the CPU of rank 0, one tensor at a time and tied ones once; every rank takes part."""

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._kept: dict[int, Tensor] = {}

    def __call__(self, value: Any) -> Tensor:
        if id(value) not in self._kept:
            whole = (value.full_tensor() if isinstance(value, DTensor) else value).detach()
            self._kept[id(value)] = whole.cpu() if self._keep else torch.empty(0)
        return self._kept[id(value)]


def _rows_like(value: Any, mine: Tensor) -> Tensor:
    """This rank's rows of a saved tensor, where ``mine`` is sharded; all of it elsewhere."""
    if not isinstance(mine, DTensor):
        return value.whole() if isinstance(value, SavedTensor) else value
    first, rows = local_rows(mine)
    last = first + len(rows)
    return value.rows(first, last) if isinstance(value, SavedTensor) else value[first:last]


def _place(value: Any, parameter: Tensor) -> Tensor:
    """A saved tensor of optimiser state on this rank: sharded where it has the shape of a sharded parameter.

    Raises:
        ConfigError: a tensor that was sharded in another way than the parameter.
    """
    if isinstance(parameter, DTensor) and tuple(value.shape) == tuple(parameter.shape):
        rows = _rows_like(value, parameter).to(parameter.device, copy=True)
        return DTensor.from_local(
            rows, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
    if isinstance(value, SavedTensor):
        raise ConfigError(
            f"checkpoint: expected optimiser state of the parameter's shape {list(parameter.shape)}, found {list(value.shape)} in shards; "
            "use an optimiser that keeps its state by element, such as torch.optim.AdamW"
        )
    return value.clone()


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="parameters in shards over all devices")
for _name, _options in {
    "deepspeed": {},
    "deepspeed_stage_1": {"stage": 1},
    "deepspeed_stage_2": {"stage": 2},
    "deepspeed_stage_2_offload": {"stage": 2, "offload_optimizer": True},
}.items():
    StrategyRegistry.register(_name, ZeROStrategy, description="DeepSpeed's ZeRO stages 1 and 2", override=True, **_options)
