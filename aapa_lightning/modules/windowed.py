"""The window loop inside Lightning's automatic optimisation: what every module in training shares, policy or not."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from aapa_lightning.errors import ConfigError, check_numbers
from aapa_lightning.hyperparameters import RemembersArguments
from aapa_lightning.loop.loader import WindowLoader, WindowStep
from aapa_lightning.loop.plan import WindowPlan
from aapa_lightning.loop.stream import RecordStream
from aapa_lightning.loop.terms import LossTerm, total_loss
from aapa_lightning.modules.checkpointing import (
    NO_ROLLOUTS,
    check_optimizer,
    check_resume,
    check_trainer,
    gather_over_ranks,
    rescale_progress,
    rewind_progress,
)
from aapa_lightning.modules.limits import WINDOWED, check_optimizer_numbers, check_trainer_numbers
from aapa_lightning.modules.meter import StepMeter
from aapa_lightning.modules.optimizing import OptimizerResume
from aapa_lightning.modules.parallel import engine_of, prepare_engine, sum_over_ranks
from aapa_lightning.modules.precision import allow_clipping
from aapa_lightning.modules.skipping import SkipCounter, all_finite, gradient_norm
from aapa_lightning.modules.term_norms import TermNorms
from aapa_lightning.seeds import seed_everything
from aapa_lightning.types import Record
from aapa_lightning.users_code import users_code

OptimizerFactory = Callable[[Iterable], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
Records = Sequence[Record]


def default_optimizer(parameters: Iterable) -> Optimizer:
    """AdamW at 1e-6 without weight decay: a start for policy gradients on a pretrained model."""
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)


class OpenWindow(Protocol):
    """What the loop asks of a window."""

    number: int
    plan: WindowPlan

    @property
    def metrics(self) -> Mapping[str, float]:
        """Scalars to log at each of its steps: means over this rank's rows, or numbers that are the same on all ranks."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint inside the window needs: tensors and primitives."""
        ...


class WindowedModule(RemembersArguments):
    """Trains over windows. A subclass says what a window holds (``make_plan``, ``open``) and what its loss is (``loss_terms``).

    Args:
        optimizer: from parameters to an optimiser.
        lr_scheduler: from an optimiser to a scheduler, stepped once per optimiser step.
        max_skipped_steps: steps in a row that may be skipped for a loss or gradient that is not finite.
        term_norms_every: optimiser steps between those at which the gradient norm of every term of the loss is logged, weight included;
            0 for never. Such a step costs one more backward pass, and a copy of the gradients, for each term.
    """

    #: Seed of data order and of everything drawn in a step.
    seed: int

    def __init__(
        self,
        *args: Any,
        optimizer: OptimizerFactory = default_optimizer,
        lr_scheduler: SchedulerFactory | None = None,
        max_skipped_steps: int = 10,
        term_norms_every: int = 0,
        **kwargs: Any,
    ) -> None:
        check_numbers(locals(), WINDOWED)
        super().__init__(*args, **kwargs)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.plan: WindowPlan | None = None
        self.skipped = SkipCounter(max_skipped_steps)
        self._term_norms = TermNorms(term_norms_every)
        self._window: Any = None
        self._restored: dict[str, Any] | None = None
        self._meter = StepMeter()
        self._losses_finite = True
        self._optimizer = OptimizerResume()
        self._streams: dict[str, RecordStream] = {}

    @abstractmethod
    def make_plan(self, accumulate: int, world_size: int) -> WindowPlan:
        """Sizes of a window on ``world_size`` ranks with ``accumulate`` micro-steps per optimiser step."""

    @abstractmethod
    def open(self, step: WindowStep, plan: WindowPlan) -> OpenWindow:
        """Make this rank's share of a window."""

    @abstractmethod
    def loss_terms(self, window: Any, micro_step: int) -> list[LossTerm]:
        """The loss of one micro-step, unreduced."""

    def restore(self, state: dict[str, Any], step: WindowStep, plan: WindowPlan) -> OpenWindow:
        """Make this rank's share of a window that was left in the middle, from what ``OpenWindow.state`` gave."""
        raise RuntimeError(f"{type(self).__name__}: a window of one optimiser step ends with it, so no checkpoint lies inside one")

    def step_metrics(self) -> dict[str, float]:
        """Scalars of the optimiser step beside those of its terms and window, the same on all ranks."""
        return {}

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The ``SumOverRanks`` of the trainer's strategy."""
        return sum_over_ranks(self, value)

    def gather_over_ranks(self, value: Tensor) -> Tensor:
        """The ``GatherOverRanks`` of the trainer's strategy."""
        value = value.detach()
        return value if self.trainer.world_size == 1 else torch.as_tensor(self.all_gather(value)).flatten()

    def configure_optimizers(self) -> Any:
        """The factory's optimiser over the trainable parameters, and the scheduler per step."""
        with users_code("model: optimizer"):
            optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        with users_code("model: lr_scheduler"):
            scheduler = self._optimizer.made(optimizer, self.lr_scheduler)
        check_optimizer_numbers(optimizer)
        allow_clipping(optimizer, self.trainer)
        return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Data ----------------------------------------------------------------------------------------------------------------------------

    def window_loader(self, plan: WindowPlan, prompts: Records, demonstrations: Records) -> WindowLoader:
        """Build the loader of this rank's windows. Raises ConfigError for numbers that do not divide, or what a resume refuses."""
        trainer = self.trainer
        self.plan = plan
        used = {"data.train": prompts} if plan.prompts else {}
        used |= {"data.demonstrations (or train)": demonstrations} if plan.demonstrations else {}
        self._streams = streams = {name: RecordStream(records, self.seed, name) for name, records in used.items()}
        loader = WindowLoader(
            plan,
            trainer.global_rank,
            prompts=streams.get("data.train"),
            demonstrations=streams.get("data.demonstrations (or train)"),
            position=lambda: trainer.global_step * trainer.accumulate_grad_batches,
        )
        check_trainer_numbers(trainer)
        check_trainer(trainer, plan, len(loader))
        if self._restored is not None:
            check_resume(self._restored, plan, trainer.global_step, self.seed, {name: stream.records for name, stream in streams.items()})
        return loader

    # Training ------------------------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Raise ConfigError for settings of DeepSpeed that training in windows does not go with."""
        super().setup(stage)
        prepare_engine(self)

    def check_start(self) -> None:
        """Raise ConfigError for a training loader that is not this module's."""
        if not isinstance(self.trainer.train_dataloader, WindowLoader) or self.plan is None:
            raise ConfigError(
                f"{type(self).__name__}: expected the training loader that its method train_loader builds, found "
                f"{type(self.trainer.train_dataloader).__name__}; train with AapaDataModule, or a datamodule that calls train_loader"
            )

    def on_train_start(self) -> None:
        """Let new settings of the optimiser count, and forget what an earlier fit left behind."""
        self.check_start()
        self._optimizer.apply(self.trainer, self.lr_scheduler)
        self._window = None
        self._meter = StepMeter()
        self._term_norms = TermNorms(self._term_norms.every)
        self._losses_finite = True

    def training_step(self, batch: WindowStep, batch_idx: int) -> Tensor:
        """One micro-step: open the window if need be, then the loss of its slice."""
        if self._window is None or self._window.number != batch.window:
            self._window = self._open(batch)
        # rollouts, validation or a resume in between must not change what happens next
        seed_everything("step", self.seed, batch.window, batch.micro_step, self.global_rank)
        plan = self._window.plan
        scale = float(plan.accumulate * plan.world_size)
        terms = self.loss_terms(self._window, batch.micro_step)
        loss, values = total_loss(terms, scale)
        if self._term_norms.due(self.trainer.global_step):
            self._term_norms.add(terms, scale, self)
        self._meter.add_terms(terms, values, loss)
        self._losses_finite = self._losses_finite and bool(torch.isfinite(loss))
        return loss

    def _open(self, step: WindowStep) -> OpenWindow:
        plan = self.plan
        if plan is None:
            raise RuntimeError("train_loader was not called")
        restored, self._restored = self._restored, None
        if restored is not None and step.micro_step > 0:
            state = restored["window"]
            if state is not None and state[self.global_rank]["number"] == step.window:
                return self.restore(state[self.global_rank], step, plan)
            raise ConfigError(NO_ROLLOUTS)
        return self.open(step, plan)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave the step out on all ranks if it is not finite on one, and log the step. Under DeepSpeed ``optimizer_step`` does."""
        if engine_of(self) is not None:
            return
        norm = gradient_norm(self.parameters())
        finite = all_finite(norm if self._losses_finite else norm * float("nan"), self.sum_over_ranks)
        if not finite:
            for parameter in self.parameters():
                parameter.grad = None
        self._end_step(norm, finite)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step. DeepSpeed leaves steps out by itself: log what it did, or raise RuntimeError for what it should not have."""
        super().optimizer_step(*args, **kwargs)
        engine = engine_of(self)
        if engine is None:
            return
        norm, applied = torch.tensor(float(engine.get_global_grad_norm() or 0.0)), engine.was_step_applied()
        if applied and not all_finite(norm if self._losses_finite else norm * float("nan"), self.sum_over_ranks):
            raise RuntimeError(
                f"the loss or gradient of step {self.global_step} is not finite, and DeepSpeed took the step; resume from the last "
                "checkpoint with a lower learning rate, or use --trainer.strategy fsdp2, which leaves it out"
            )
        self._end_step(norm, applied)

    def _end_step(self, norm: Tensor, finite: bool) -> None:
        """Log an optimiser step and count it."""
        self._losses_finite = True
        # at every step of the window: a row holds the same columns whether or not the run was resumed just before it
        if self._window is not None:
            self._meter.add_means(self._window.metrics)
        metrics = self._meter.compute(self.sum_over_ranks, self.device)
        metrics |= {"grad_norm": float(norm), "skipped_steps": float(self.skipped.total + (not finite))}
        metrics |= self.step_metrics()
        self._meter.log(self, metrics)  # of all ranks already
        self._log_term_norms()
        self.skipped.record(finite, f"step {self.global_step} (window {self._window.number if self._window else 0})")

    def _log_term_norms(self) -> None:
        norms = self._term_norms.compute(self.sum_over_ranks)
        # past Lightning's log, which repeats a value at all later steps of the epoch
        for logger in self.loggers if norms else ():
            logger.log_metrics({f"train/{name}": value for name, value in norms.items()}, step=self.global_step)

    @property
    def window(self) -> Any:
        """The open window of this rank."""
        return self._window

    # Checkpoints ---------------------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What ``aapa export`` needs beside the weights."""
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the module's description and, inside a window, every rank's share of it."""
        plan = self.plan
        state: dict[str, Any] = {**self.describe(), "skipped": self.skipped.state_dict()}
        if plan is not None:
            rewind_progress(checkpoint, plan.accumulate)
            inside = plan.locate(checkpoint["global_step"] * plan.accumulate)[1] != 0
            failing = sys.exc_info()[0] is not None  # the other ranks may not come here: do not gather
            window = self._window.state() if inside and not failing and self._window is not None else None
            state |= {"plan": plan.fingerprint(), "window": gather_over_ranks(window) if inside and not failing else None}
            state |= {"seed": self.seed, "optimizer": self._optimizer.now}
            state |= {"data": {name: stream.fingerprint for name, stream in self._streams.items()}}
        checkpoint["aapa"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the next training step needs."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("aapa", {})
        if "plan" in state and self._trainer is not None:  # load_from_checkpoint wants weights, and has no trainer
            check_optimizer(checkpoint, self.trainer)
            rescale_progress(checkpoint, state["plan"]["accumulate"], self.trainer.accumulate_grad_batches)
            self._optimizer.loaded(checkpoint, state.get("optimizer"))
            self._restored = state
            self.skipped.load_state_dict(state["skipped"])
