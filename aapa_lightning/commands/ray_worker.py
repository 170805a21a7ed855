"""The trainer commands inside a Ray worker: ranks, nodes and devices are Ray's, everything else is the configuration's."""

from __future__ import annotations

import logging
import os
import platform
from typing import Any

import ray
import ray.train
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from ray.train.lightning import RayLightningEnvironment
from ray.train.torch import get_device
from typing_extensions import override

from aapa_lightning.commands.config_files import as_list
from aapa_lightning.commands.train import AapaCLI, run_trainer
from aapa_lightning.errors import ConfigError


def run_worker(words: list[str], folder: str) -> None:
    """Run a trainer command as one rank of Ray's.

    Args:
        words: the command and its options.
        folder: where it runs; paths in the configuration start here.

    Raises:
        ConfigError: the folder is not on this node, or the trainer does not fit the cluster.
    """
    try:
        os.chdir(folder)
    except OSError as error:
        found = f"found on {platform.node()}: {error.strerror}"
        raise ConfigError(f"aapa ray: expected the folder {folder} on every node, as on a shared disk; {found}") from error
    for name in ("lightning.fabric", "lightning.pytorch"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [logging.StreamHandler()], False  # Ray's handlers would print each line twice
    run_trainer(words, RayCLI)


class RayCLI(AapaCLI):
    """The command line with the cluster's shape in place of ``trainer.accelerator: auto``, ``devices`` and ``num_nodes``.

    Any strategy works that leaves starting processes to others. The saved configuration keeps what the user wrote.
    """

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        chosen = self._get(self.config_init, "trainer")
        context = ray.train.get_context()
        workers, here = context.get_world_size(), context.get_local_world_size()
        if workers % here:
            raise ConfigError(f"aapa ray: expected as many workers on every node, found {here} of {workers} on one; change --workers")
        shape = {
            "accelerator": _accelerator(chosen["accelerator"]),
            "devices": here,
            "num_nodes": workers // here,
            "plugins": [*as_list(chosen["plugins"]), RayLightningEnvironment()],
        }
        trainer = super().instantiate_trainer(**kwargs, **shape)
        _check(trainer)
        return trainer


def _accelerator(chosen: Any) -> Any:
    """The configured accelerator, or the one that Ray gave the worker."""
    has_gpu = bool(ray.get_gpu_ids())
    if chosen == "auto":
        return "gpu" if has_gpu else "cpu"
    if chosen in ("gpu", "cuda") and not has_gpu:
        raise ConfigError(f"trainer.accelerator {chosen}: expected a worker with a GPU, found one without; add --gpu to `aapa ray`")
    if chosen == "cpu" and has_gpu:
        raise ConfigError("trainer.accelerator cpu: found a GPU reserved for each worker; leave --gpu out of `aapa ray`")
    return chosen


def _check(trainer: Trainer) -> None:
    """What Ray's ``prepare_trainer`` asks of its own strategies, asked of any."""
    strategy = trainer.strategy
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ConfigError(f"trainer.strategy: expected one that runs in Ray's workers, found {type(strategy).__name__}; use ddp or fsdp2")
    if ray.get_gpu_ids() and strategy.root_device != get_device():
        raise ConfigError(f"trainer: expected the GPU that Ray gave this worker, {get_device()}, found {strategy.root_device}")
