"""How a module's models lie on the devices of the trainer's strategy."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from torch import Tensor, nn

from aapa_lightning.errors import ConfigError
from aapa_lightning.modules.precision import trainer_precision
from aapa_lightning.policy import PolicySpec, load_policy
from aapa_lightning.sharding import shard_model
from aapa_lightning.sharding.materialize import fill_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: What a sharded forward computes in, by the trainer's precision; shards, gradients and optimiser state keep the dtype of the weights.
COMPUTE_DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16}


def refuse_engine(module: L.LightningModule) -> None:
    """Raise ConfigError for settings of DeepSpeed that training in windows does not go with."""
    trainer: Any = module._trainer
    if trainer is None or not trainer.strategy.handles_gradient_accumulation:
        return
    if trainer.accumulate_grad_batches > 1:
        raise ConfigError(
            f"trainer.accumulate_grad_batches: expected 1 under DeepSpeed, which counts optimiser steps by itself, found "
            f"{trainer.accumulate_grad_batches}; use smaller windows, or --trainer.strategy fsdp2"
        )
    if trainer.strategy.zero_stage_3:
        raise ConfigError(
            "trainer.strategy: ZeRO stage 3 takes the weights apart before they are loaded; use --trainer.strategy fsdp2, which shards "
            "them as well, or stage 2"
        )


def prepare_engine(module: L.LightningModule) -> None:
    """Refuse what ``refuse_engine`` does, and complete DeepSpeed's settings before there is a model; nothing under other strategies."""
    refuse_engine(module)
    strategy: Any = module.trainer.strategy
    if strategy.handles_gradient_accumulation:
        strategy.config.setdefault("train_micro_batch_size_per_gpu", 1)  # or Lightning asks the loader, which needs the tokenizer
        strategy.config.setdefault("zero_force_ds_cpu_optimizer", False)  # offloading keeps the optimiser of the configuration


def engine_of(module: L.LightningModule) -> Any:
    """DeepSpeed's engine around the module in training; None under any other strategy."""
    strategy: Any = module.trainer.strategy
    return strategy.deepspeed_engine if strategy.handles_gradient_accumulation else None


def sum_over_ranks(module: L.LightningModule, value: Tensor) -> Tensor:
    """The ``SumOverRanks`` of a module's strategy; the value itself in a single process."""
    trainer = module.trainer
    if trainer.world_size == 1:
        return value
    reduced = trainer.strategy.reduce(value.detach().clone().to(module.device), reduce_op="sum")
    return torch.as_tensor(reduced).to(value.device)


def load_placed(module: L.LightningModule, spec: PolicySpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a policy for a module; where the strategy shards, every rank only the rows that it keeps. All ranks call it together.

    Raises:
        ConfigError: what ``load_policy`` or ``place`` refuses, or quantised weights where the strategy shards.
    """
    refuse_engine(module)
    precision = trainer_precision(module)
    if module.device_mesh is None:
        model, tokenizer = load_policy(spec, precision)
        _cast_as_engine(module, model)
        return model, tokenizer
    if spec.quantization != "none":
        raise ConfigError(f"policy.quantization={spec.quantization}: quantised weights cannot be sharded; use --trainer.strategy ddp")
    model, tokenizer = load_policy(spec, precision, weights=False)
    place(module, model)
    strategy, base = module.trainer.strategy, ""

    def load() -> nn.Module:
        nonlocal base
        whole, _ = load_policy(spec, precision)
        base = getattr(whole, "aapa_base", "")
        return whole

    folder = None if spec.lora is not None else spec.model
    fill_model(model, strategy.root_device, folder=folder, revision=spec.revision, load=load)
    if spec.lora is not None:
        cast(Any, model).aapa_base = strategy.broadcast(base)
    return model, tokenizer


def _cast_as_engine(module: L.LightningModule, model: nn.Module) -> None:
    """Round a model's parameters as DeepSpeed will round the module's: its references are no part of the module, but equal its start."""
    trainer: Any = module._trainer
    if trainer is None or not trainer.strategy.handles_gradient_accumulation:
        return
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if trainer.strategy.config.get(name, {}).get("enabled"):
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)


def place(module: L.LightningModule, model: nn.Module) -> None:
    """Shard a model that every rank has loaded where the strategy shards (``fsdp2``, ``ModelParallelStrategy``); leave it alone elsewhere.

    Raises:
        ConfigError: tensor parallelism, a precision that sharding does not go with, or what ``refuse_engine`` refuses.
    """
    refuse_engine(module)
    mesh = module.device_mesh
    if mesh is None:
        return
    trainer: Any = module.trainer
    if (size := mesh["tensor_parallel"].size()) > 1:
        raise ConfigError(
            f"trainer.strategy: expected tensor_parallel_size 1, found {size}: models are sharded, not split; use --trainer.strategy "
            f"fsdp2, or set data_parallel_size to all {mesh.size()} devices and tensor_parallel_size to 1"
        )
    if trainer.precision not in COMPUTE_DTYPES:
        raise ConfigError(f"trainer.precision: expected {' or '.join(COMPUTE_DTYPES)} for sharded models, found {trainer.precision}")
    shard_model(model, mesh["data_parallel"], COMPUTE_DTYPES[trainer.precision])
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")  # which nothing here changes in place
    for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False  # parameters gathered there would be inference tensors, of no use in training
