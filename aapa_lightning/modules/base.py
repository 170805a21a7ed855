"""What every policy in training shares: the window loop inside Lightning's automatic optimisation."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from aapa_lightning.anchor.term import AnchorTerm
from aapa_lightning.data.encode import encode_demonstration, fit_lengths
from aapa_lightning.data.records import require_experts
from aapa_lightning.errors import ConfigError
from aapa_lightning.loop.collect import AdvantageOptions, Rescore, collect, no_rescoring
from aapa_lightning.loop.experience import Experience
from aapa_lightning.loop.loader import WindowLoader, WindowStep
from aapa_lightning.loop.plan import WindowPlan
from aapa_lightning.loop.stream import RecordStream
from aapa_lightning.loop.terms import LossTerm, total_loss
from aapa_lightning.loop.window import Window, open_window, restore_window, rollout_requests, window_state
from aapa_lightning.modules.checkpointing import check_plan, gather_over_ranks, rescale_progress, rewind_progress
from aapa_lightning.modules.inference import InferenceModule
from aapa_lightning.modules.meter import StepMeter
from aapa_lightning.modules.skipping import SkipCounter, all_finite, gradient_norm
from aapa_lightning.policy import PolicySpec, save_policy
from aapa_lightning.seeds import seed_everything
from aapa_lightning.types import Demonstration, Record

OptimizerFactory = Callable[[Iterable], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
Records = Sequence[Record]


def default_optimizer(parameters: Iterable) -> Optimizer:
    """AdamW at 1e-6 without weight decay: a start for policy gradients on a pretrained model."""
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)


class PolicyModule(InferenceModule):
    """A policy in training. A subclass says what a window holds (``make_plan``) and what its loss is (``loss_terms``).

    Args:
        policy: which model to train.
        optimizer: from parameters to an optimiser.
        lr_scheduler: from an optimiser to a scheduler, stepped once per optimiser step.
        max_skipped_steps: steps in a row that may be skipped for a loss or gradient that is not finite.
        **kwargs: see ``InferenceModule``.
    """

    #: Why this objective needs expert responses, or None.
    needs_experts: str | None = None
    #: Whether the rewards shape the loss; otherwise they are figures of evaluation.
    trains_on_rewards = True

    def __init__(
        self,
        policy: PolicySpec,
        *,
        optimizer: OptimizerFactory = default_optimizer,
        lr_scheduler: SchedulerFactory | None = None,
        max_skipped_steps: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, **kwargs)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.anchor: AnchorTerm | None = None
        self.plan: WindowPlan | None = None
        self.skipped = SkipCounter(max_skipped_steps)
        self._window: Window | None = None
        self._restored: dict[str, Any] | None = None
        self._meter = StepMeter()
        self._losses_finite = True

    @abstractmethod
    def make_plan(self, accumulate: int, world_size: int) -> WindowPlan:
        """Sizes of a window on ``world_size`` ranks with ``accumulate`` micro-steps per optimiser step."""

    @abstractmethod
    def loss_terms(self, window: Window, micro_step: int) -> list[LossTerm]:
        """The loss of one micro-step, unreduced."""

    def advantage_options(self) -> AdvantageOptions:
        """How rewards become advantages."""
        return AdvantageOptions()

    def rescore(self) -> Rescore:
        """Old and reference log-probs of a window's rollouts."""
        return no_rescoring

    def configure_optimizers(self) -> Any:
        """The factory's optimiser over the trainable parameters, and the scheduler per step."""
        try:
            optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
            scheduler = None if self.lr_scheduler is None else self.lr_scheduler(optimizer)
        except ValueError as error:  # their way to refuse an argument
            raise ConfigError(f"model: optimizer or lr_scheduler: {error}") from error
        return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Data ----------------------------------------------------------------------------------------------------------------------------

    def train_loader(self, prompts: Sequence[Record], demonstrations: Sequence[Record]) -> WindowLoader:
        """Check the run's numbers and data, and build the loader of this rank's windows.

        Args:
            prompts: what responses are sampled for.
            demonstrations: what is imitated; may be the same records.

        Raises:
            ConfigError: numbers that do not divide, or what a resume or the anchor refuses.
            DataError: missing experts, records over the length limits, instructions that a reward does not know.
        """
        trainer = self.trainer
        plan = self.make_plan(trainer.accumulate_grad_batches, trainer.world_size)
        if plan.demonstrations and self.needs_experts:
            require_experts(demonstrations, self.needs_experts)
        prompts, demonstrations = self.training_records(plan, prompts, demonstrations)
        if self.anchor is not None:
            self.anchor.check_records(prompts)
        self.plan = plan
        loader = WindowLoader(
            plan,
            trainer.global_rank,
            prompts=RecordStream(prompts, self.seed) if plan.prompts else None,
            demonstrations=RecordStream(demonstrations, self.seed) if plan.demonstrations else None,
            position=lambda: trainer.global_step * trainer.accumulate_grad_batches,
        )
        self._check_trainer(plan, len(loader))
        return loader

    def training_records(self, plan: WindowPlan, prompts: Records, demonstrations: Records) -> tuple[Records, Records]:
        """What of the data is trained on: records within the length limits, and of the prompts those that the rewards can score."""
        if plan.prompts:
            prompts = self._fit(self._select(prompts), demonstrations=False)
        if plan.demonstrations:
            demonstrations = self._fit(demonstrations, demonstrations=True)
        return prompts, demonstrations

    def _fit(self, records: Sequence[Record], *, demonstrations: bool) -> Sequence[Record]:
        return fit_lengths(self.tokenizer, records, self.prompt_format, self.eos_token_id, demonstrations=demonstrations)

    def _check_trainer(self, plan: WindowPlan, epoch: int) -> None:
        trainer: Any = self.trainer  # typed as Fabric's shim or the Trainer, which alone has what follows
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
            raise ConfigError("GradientAccumulationScheduler changes the window plan during the run; set accumulate_grad_batches instead")
        limit = trainer.limit_train_batches
        batches = min(limit, epoch) if isinstance(limit, int) else int(limit * epoch)
        if batches % plan.accumulate and not trainer.fast_dev_run:
            raise ConfigError(
                f"limit_train_batches={limit} does not divide by accumulate_grad_batches={plan.accumulate}: it leaves {batches} "
                "micro-steps an epoch"
            )
        interval = trainer.val_check_interval
        if isinstance(interval, int) and interval > batches and trainer.check_val_every_n_epoch is not None:
            raise ConfigError(
                f"val_check_interval={interval} micro-steps is more than the {batches} of an epoch; lower it, or set "
                "check_val_every_n_epoch to null to count over epochs"
            )
        if self._restored is not None:
            position = trainer.global_step * plan.accumulate
            check_plan(self._restored["plan"], plan, inside_window=plan.locate(position)[1] != 0)

    # Training ------------------------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Forget what an earlier fit left behind."""
        if not isinstance(self.trainer.train_dataloader, WindowLoader) or self.plan is None:
            raise ConfigError(
                f"{type(self).__name__}: expected the training loader that its method train_loader builds, found "
                f"{type(self.trainer.train_dataloader).__name__}; train with AapaDataModule, or a datamodule that calls train_loader"
            )
        self._window = None
        self._meter = StepMeter()
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
        self._meter.add_terms(terms, values, loss)
        self._losses_finite = self._losses_finite and bool(torch.isfinite(loss))
        return loss

    def _open(self, step: WindowStep) -> Window:
        plan = self.plan
        if plan is None:
            raise RuntimeError("train_loader was not called")
        demonstrations = [self._demonstration(record) for record in step.demonstrations]
        restored, self._restored = self._restored, None
        if restored is not None and step.micro_step > 0:
            state = restored["window"]
            if state is not None and state[self.global_rank]["number"] == step.window:
                return restore_window(state[self.global_rank], plan, step, demonstrations, self.device)
            raise ConfigError(
                f"resume: the checkpoint lies inside window {step.window} but does not hold its rollouts (it was saved while an exception "
                "was under way); resume from an earlier checkpoint"
            )
        experience = self._collect(step, plan) if plan.prompts else None
        return open_window(step.window, plan, experience, demonstrations, self.sum_over_ranks)

    def _collect(self, step: WindowStep, plan: WindowPlan) -> Experience:
        return collect(
            rollout_requests(self.tokenizer, step, self.prompt_format, plan.samples),
            engine=self.engine,
            sampling=self.sampling,
            seed=self.seed,
            window=step.window,
            rewards=self.rewards if self.trains_on_rewards else None,
            anchor=self.anchor,
            anchor_weight=self.anchor_weight(),
            options=self.advantage_options(),
            rescore=self.rescore(),
            sum_over_ranks=self.sum_over_ranks,
        )

    def _demonstration(self, record: Record) -> Demonstration:
        return encode_demonstration(self.tokenizer, record, record.experts[0], self.prompt_format, self.eos_token_id)

    def anchor_weight(self) -> float:
        """Lambda at the current optimiser step; 0 without an anchor."""
        return self.anchor.weight(self.global_step) if self.anchor is not None else 0.0

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave the step out on all ranks if it is not finite on one, and log the step."""
        norm = gradient_norm(self.parameters())
        healthy = norm if self._losses_finite else norm * float("nan")
        finite = all_finite(healthy, self.sum_over_ranks)
        if not finite:
            for parameter in self.parameters():
                parameter.grad = None
        self._losses_finite = True
        # at every step of the window: a row holds the same columns whether or not the run was resumed just before it
        if self._window is not None and self._window.experience is not None:
            self._meter.add_means(self._window.experience.metrics)
        metrics = self._meter.compute(self.sum_over_ranks, self.device)
        metrics |= {"grad_norm": float(norm), "skipped_steps": float(self.skipped.total + (not finite))}
        metrics |= {"anchor/weight": self.anchor_weight()} if self.anchor is not None else {}
        self.log_dict({f"train/{name}": value for name, value in metrics.items()})  # of all ranks already
        self.skipped.record(finite, f"step {self.global_step} (window {self._window.number if self._window else 0})")

    @property
    def window(self) -> Window | None:
        """The open window of this rank."""
        return self._window

    def export(self, out: str | Path) -> None:
        """Write the policy as a Hugging Face folder, on rank 0."""
        if self.trainer.is_global_zero:
            save_policy(self.model, self.tokenizer, out)

    # Checkpoints ---------------------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the policy's description and, inside a window, every rank's share of it."""
        plan = self.plan
        state: dict[str, Any] = {"policy": self._describe(), "skipped": self.skipped.state_dict()}
        if plan is not None:
            rewind_progress(checkpoint, plan.accumulate)
            inside = plan.locate(checkpoint["global_step"] * plan.accumulate)[1] != 0
            failing = sys.exc_info()[0] is not None  # the other ranks may not come here: do not gather
            window = window_state(self._window) if inside and not failing and self._window is not None else None
            state |= {"plan": plan.fingerprint(), "window": gather_over_ranks(window) if inside and not failing else None}
        checkpoint["aapa"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the next training step needs."""
        state = checkpoint.get("aapa", {})
        if "plan" in state:
            rescale_progress(checkpoint, state["plan"]["accumulate"], self.trainer.accumulate_grad_batches)
            self._restored = {"plan": state["plan"], "window": state["window"]}
            self.skipped.load_state_dict(state["skipped"])

    def _describe(self) -> dict[str, Any]:
        generation = getattr(self.model, "generation_config", None)
        return {
            "config": self.model.config.to_dict(),
            "generation_config": generation.to_dict() if generation is not None else {},
            "tokenizer": self.tokenizer.name_or_path or self.policy.tokenizer or self.policy.model,
        }
