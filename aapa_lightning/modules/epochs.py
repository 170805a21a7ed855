"""Training in epochs that a checkpoint at any optimiser step continues bit for bit."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from aapa_lightning.errors import ConfigError
from aapa_lightning.hyperparameters import RemembersArguments
from aapa_lightning.modules.checkpointing import rewind_progress
from aapa_lightning.modules.optimizing import OptimizerResume
from aapa_lightning.seeds import seed_everything


class ResumableEpochs(RemembersArguments):
    """What training over ``ShuffledBatches`` needs beside weights and optimiser: noise by seed and step, the loss of an open epoch.

    A subclass calls ``seed_step`` before and ``add_loss`` after every forward in training. ``train/loss`` is logged at the last step of an
    epoch: the mean over its responses and all ranks.
    """

    #: Seed of everything drawn in a step.
    seed: int

    def __init__(self) -> None:
        super().__init__()
        self._restored: dict[str, Any] | None = None
        self.optimizer_resume = OptimizerResume()  # whoever makes the optimiser tells it
        self._judged = -1  # optimiser steps at the last validation
        self._epoch_loss = torch.zeros(2)  # sum over the epoch's responses, and their number
        self._open_losses: list[Tensor] = []  # the same of each micro-step since the last optimiser step

    @abstractmethod
    def training_plan(self) -> dict[str, Any]:
        """Return what the order of training follows from: plain values that may not change in the middle of a run."""

    @abstractmethod
    def judge(self) -> dict[str, float]:
        """Figures on the held-out data, none without any; remembers what is the best so far."""

    @override
    def setup(self, stage: str) -> None:
        self._restored = None

    def check_start(self) -> None:
        """Raise ConfigError where what is resumed had other data or sizes."""
        saved = {} if self._restored is None else self._restored["plan"]
        if not saved:
            return
        if changed := [f"{name} {saved.get(name)} -> {value}" for name, value in self._plan().items() if saved.get(name) != value]:
            raise ConfigError(
                f"resume: the checkpoint was taken with other data or sizes: {', '.join(changed)}; use the old ones, or train another "
                "discriminator in another run_dir"
            )

    @override
    def on_train_start(self) -> None:
        """Let new settings of the optimiser count, and make up for a validation that the interruption left out."""
        self.check_start()
        self.optimizer_resume.apply(self.trainer, None)
        restored, self._restored, self._open_losses, self._judged = self._restored, None, [], -1
        if restored is not None and restored["judgement_is_due"]:  # Lightning goes on with the next epoch
            figures = {name: float(torch.tensor(value)) for name, value in self.judge().items()}  # rounded as Lightning's log has them
            self._log_at_once(figures, self.global_step - 1)

    def _plan(self) -> dict[str, Any]:
        trainer = self.trainer
        sizes = {
            "batches": trainer.num_training_batches,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "devices": trainer.world_size,
        }
        return self.training_plan() | sizes

    def seed_step(self) -> None:
        """Seed what this micro-step draws: validation or a resume in between must not change what happens next."""
        step, steps = self.global_step, math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        if step % steps == 0 and not self._open_losses:
            self._epoch_loss = torch.zeros(2)
        seed_everything("discriminator", self.seed, step, len(self._open_losses), self.global_rank)

    def add_loss(self, loss: Tensor, count: int) -> None:
        """Count a micro-step's mean loss over ``count`` responses."""
        self._open_losses.append(torch.tensor([float(loss.detach()) * count, count]))

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._epoch_loss = sum(self._open_losses, self._epoch_loss)
        self._open_losses = []
        if self.trainer.is_last_batch:
            # past Lightning's log, which comes after the checkpoint of this step and knows nothing of an interrupted epoch
            self._log_at_once({"train/loss": self._mean_loss()}, self.global_step)

    def _mean_loss(self) -> float:
        total = self._epoch_loss
        if self.trainer.world_size > 1:
            total = torch.as_tensor(self.trainer.strategy.reduce(total.to(self.device), reduce_op="sum")).cpu()
        return float(total[0] / total[1])

    def _log_at_once(self, figures: dict[str, float], step: int) -> None:
        for logger in self.loggers:
            logger.log_metrics(figures, step=step)

    @override
    def on_train_epoch_end(self) -> None:
        self.log("train/loss", self._mean_loss(), logger=False, sync_dist=True)  # for callbacks that monitor it

    def note_judgement(self) -> None:
        """Remember that the weights of this step are judged."""
        self._judged = self.global_step

    def _judgement_is_due(self) -> bool:
        """Return whether the validation that follows the last step is still to come."""
        loop = self.trainer.fit_loop
        progress: Any = loop.epoch_loop.batch_progress.current
        fetcher = loop._data_fetcher
        if fetcher is None or self._open_losses or progress.ready != progress.processed:
            return False
        # private, but the alternative is a copy of its rules
        return self._judged != self.global_step and loop.epoch_loop._should_check_val_fx(fetcher)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        rewind_progress(checkpoint, self.trainer.accumulate_grad_batches, self.trainer.num_training_batches)
        checkpoint["epochs"] = {
            "loss": self._epoch_loss.tolist(),
            "judgement_is_due": self._judgement_is_due(),
            "plan": self._plan(),
            "optimizer": self.optimizer_resume.now,
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "epochs" not in checkpoint:
            raise ConfigError("checkpoint: expected one of a discriminator in training, found one of another module")
        self._restored = checkpoint["epochs"]
        self.optimizer_resume.loaded(checkpoint, checkpoint["epochs"].get("optimizer"))
        self._epoch_loss = torch.tensor(checkpoint["epochs"]["loss"])
