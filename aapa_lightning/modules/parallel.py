"""How a module's models lie on the devices of the trainer's strategy."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import nn

from aapa_lightning.errors import ConfigError
from aapa_lightning.sharding import shard_model

#: What a sharded forward computes in, by the trainer's precision; shards, gradients and optimiser state keep the dtype of the weights.
COMPUTE_DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16}


def place(module: L.LightningModule, model: nn.Module) -> None:
    """Shard a freshly loaded model where the strategy shards (``fsdp2``, ``ModelParallelStrategy``); leave it alone elsewhere.

    Raises:
        ConfigError: tensor parallelism, or a precision that sharding does not go with.
    """
    mesh = module.device_mesh
    if mesh is None:
        return
    trainer: Any = module.trainer
    if (size := mesh["tensor_parallel"].size()) > 1:
        raise ConfigError(
            f"trainer.strategy: expected tensor_parallel_size 1, found {size}: models are sharded, not split; use --trainer.strategy fsdp2, "
            f"or set data_parallel_size to all {mesh.size()} devices and tensor_parallel_size to 1"
        )
    if trainer.precision not in COMPUTE_DTYPES:
        raise ConfigError(f"trainer.precision: expected {' or '.join(COMPUTE_DTYPES)} for sharded models, found {trainer.precision}")
    shard_model(model, mesh["data_parallel"], COMPUTE_DTYPES[trainer.precision])
    for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False  # parameters gathered there would be inference tensors, of no use in training
