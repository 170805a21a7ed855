"""Settings of the optimiser and its schedule across a resume: a checkpoint holds their old values, and new ones are to count."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from aapa_lightning.errors import ConfigError

#: What an optimiser's groups hold beside settings.
_NOT_SETTINGS = ("params", "param_names")
ScheduleFactory = Callable[[Optimizer], LRScheduler]


class OptimizerResume:
    """Compares the optimiser of a resume with the one of its checkpoint and lets new settings count.

    A new learning rate, another hyper-parameter or another schedule counts from the next step on, as if the schedule had been there from
    the start. Another class of optimiser, or other parameters, are refused: the state that is restored is of the old ones.
    """

    def __init__(self) -> None:
        self.now: str | None = None
        self.saved: str | None = None
        self._fresh: list[dict[str, Any]] = []
        self._schedules: list[Any] = []

    def made(self, optimizer: Optimizer, schedule: ScheduleFactory | None) -> LRScheduler | None:
        """Note a fresh optimiser and make its schedule. Raises ConfigError for one that cannot take up the checkpoint's state."""
        self._fresh = [{name: value for name, value in group.items() if name not in _NOT_SETTINGS} for group in optimizer.param_groups]
        groups = [
            {**_plain(group), "tensors": len(group_["params"])} for group, group_ in zip(self._fresh, optimizer.param_groups, strict=True)
        ]
        scheduler = None if schedule is None else schedule(optimizer)
        described = None if scheduler is None else {"class": _name(type(scheduler)), "state": _plain(vars(scheduler))}
        self.now = json.dumps({"class": _name(type(optimizer)), "groups": groups, "schedule": described}, sort_keys=True)
        self._check()
        return scheduler

    def loaded(self, checkpoint: Mapping[str, Any], saved: str | None) -> None:
        """Note what the checkpoint was taken with, as ``now`` says it. Raises ConfigError as ``made`` does: either comes first."""
        self.saved, self._schedules = saved, checkpoint.get("lr_schedulers", [])
        self._check()

    def _check(self) -> None:
        if self.now is None or self.saved is None:
            return
        before, now = json.loads(self.saved), json.loads(self.now)
        sizes = [[group["tensors"] for group in made["groups"]] for made in (before, now)]
        if before["class"] != now["class"] or sizes[0] != sizes[1]:
            raise ConfigError(
                f"resume: the checkpoint holds the state of {before['class']} over {sizes[0]} tensors, and this run has {now['class']} "
                f"over {sizes[1]}; set the optimizer as it was, or start a new run from the weights: aapa export writes them"
            )
        if before["schedule"] != now["schedule"]:
            self._schedules.clear()  # one class cannot take up the state of another

    def apply(self, trainer: Trainer, schedule: ScheduleFactory | None) -> None:
        """Let settings count that have changed since the checkpoint.

        Args:
            trainer: after it has restored the optimiser's state.
            schedule: makes the schedule.

        Raises:
            ConfigError: DeepSpeed keeps the settings in its own checkpoint.
        """
        if self.saved is None or self.saved == self.now or self.now is None:
            return
        before, now = json.loads(self.saved), json.loads(self.now)
        self.saved = None
        (optimizer,) = trainer.optimizers
        if trainer.strategy.handles_gradient_accumulation:
            raise ConfigError("resume: optimizer and lr_scheduler cannot change under DeepSpeed; set them as they were")
        for group, settings in zip(optimizer.param_groups, self._fresh, strict=True):
            group.pop("initial_lr", None)  # of the schedule before
            group.update(settings)
        if schedule is not None:
            made = schedule(optimizer)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that no step of the optimiser lies between
                for _ in range(trainer.global_step):
                    made.step()
            trainer.lr_scheduler_configs[0].scheduler = made
        rank_zero_info(f"resume: from step {trainer.global_step} on with {', '.join(_changes(before, now))}")


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    pairs = zip(before["groups"], now["groups"], strict=True)
    named = {name: f"{name} {old.get(name)} -> {new[name]}" for old, new in pairs for name in new if old.get(name) != new[name]}
    return [*named.values(), *(["another schedule"] if before["schedule"] != now["schedule"] else [])]


def _name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _plain(value: Any, depth: int = 6) -> Any:
    """A value as JSON can hold it: of functions what they do, of schedules inside others their state."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(part, depth - 1) for key, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(part, depth - 1) for part in value]
    return [
        _name(type(value)),
        *([] if depth <= 0 or isinstance(value, Optimizer) else (_plain(part, depth - 1) for part in _parts(value))),
    ]


def _parts(value: Any) -> list[Any]:
    """Return what tells an object from others of its class."""
    if isinstance(value, torch.Tensor):
        return [value.tolist()]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if code := getattr(value, "__code__", None):
        digest = hashlib.sha256(code.co_code + repr(code.co_names).encode()).hexdigest()[:16]
        constants = [part for part in code.co_consts if isinstance(part, int | float | str)]
        return [_name(value), digest, constants, [cell.cell_contents for cell in value.__closure__ or ()], value.__defaults__]
    return [getattr(value, "__dict__", {})]
