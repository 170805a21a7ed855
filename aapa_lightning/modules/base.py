"""What every policy in training shares: rollouts, demonstrations and the anchor's signal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from aapa_lightning.adapter_checkpoints import describe_adapters
from aapa_lightning.anchor.term import AnchorTerm
from aapa_lightning.data.encode import NamedText, encode_demonstration, expert_responses, fit_lengths, no_responses
from aapa_lightning.data.records import require_experts
from aapa_lightning.errors import ConfigError
from aapa_lightning.export import save_trained
from aapa_lightning.loop.collect import AdvantageOptions, Rescore, collect, no_rescoring
from aapa_lightning.loop.demonstrations import count_demonstrations, demonstration_logprobs
from aapa_lightning.loop.experience import Experience
from aapa_lightning.loop.loader import WindowLoader, WindowStep
from aapa_lightning.loop.plan import WindowPlan
from aapa_lightning.loop.terms import LossTerm
from aapa_lightning.loop.window import Window, open_window, policy_inputs, restore_window, rollout_requests
from aapa_lightning.modules.ahead import DrawsAhead
from aapa_lightning.modules.windowed import OptimizerFactory, Records, SchedulerFactory, default_optimizer
from aapa_lightning.objectives.correction import CorrectionOptions
from aapa_lightning.objectives.sft import sft_loss
from aapa_lightning.policy import PolicySpec
from aapa_lightning.sharding import gather_state
from aapa_lightning.types import LossOutputs, Record, TokenLossInputs

#: How many times the learning rate of whole weights adapters need.
_ADAPTER_RATE = 10

__all__ = ["OptimizerFactory", "PolicyModule", "Records", "SchedulerFactory", "default_optimizer"]


class PolicyModule(DrawsAhead):
    """A policy in training. A subclass says what a window holds (``make_plan``) and what its loss is (``loss_terms``).

    Args:
        policy: which model to train.
        optimizer: from parameters to an optimiser.
        lr_scheduler: from an optimiser to a scheduler, stepped once per optimiser step.
        max_skipped_steps: steps in a row that may be skipped for a loss or gradient that is not finite.
        term_norms_every: optimiser steps between those that log the gradient norm of every term; 0 for never. See ``WindowedModule``.
        correction: weights for the difference between trainer and engine, for engines that compute with other kernels or older weights.
        asynchronous: draw the rollouts of the next window while this one is scored and trained on. They come from the policy as it was when
            this window opened: one window old. Needs an engine with weights of its own, and a correction. False stays exactly on policy.
        **kwargs: see ``InferenceModule``.
    """

    #: Why this objective needs expert responses, or None.
    needs_experts: str | None = None
    #: Learning rate of the default optimiser, which suits whole weights.
    full_rate = 1e-6
    #: Whether the rewards shape the loss; otherwise they are figures of evaluation.
    trains_on_rewards = True

    def __init__(
        self,
        policy: PolicySpec,
        *,
        optimizer: OptimizerFactory = default_optimizer,
        lr_scheduler: SchedulerFactory | None = None,
        max_skipped_steps: int = 10,
        term_norms_every: int = 0,
        correction: CorrectionOptions | None = None,
        asynchronous: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            policy,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            max_skipped_steps=max_skipped_steps,
            term_norms_every=term_norms_every,
            correction=correction,
            asynchronous=asynchronous,
            **kwargs,
        )
        self.anchor: AnchorTerm | None = None

    def advantage_options(self) -> AdvantageOptions:
        """How rewards become advantages."""
        return AdvantageOptions()

    def rescore(self) -> Rescore:
        """Old and reference log-probs of a window's rollouts."""
        return no_rescoring

    def configure_optimizers(self) -> Any:
        """See ``WindowedModule``. Warns of a learning rate under which adapters hardly move."""
        configured = super().configure_optimizers()
        optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
        rate = max((float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups), default=0.0)
        if self.policy.lora is not None and rate < _ADAPTER_RATE * self.full_rate / 2:
            rank_zero_warn(
                f"policy.lora with a learning rate of {rate:g}: adapters need about {_ADAPTER_RATE} times the rate of whole weights, or "
                f"hardly move; set optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: {_ADAPTER_RATE * self.full_rate:g}, "
                "weight_decay: 0.0}}"
            )
        return configured

    # Data ----------------------------------------------------------------------------------------------------------------------------

    def train_loader(self, splits: Mapping[str, Records]) -> WindowLoader:
        """Check the run's numbers and data, and build the loader of this rank's windows.

        Args:
            splits: ``train``, what responses are sampled for, and ``demonstrations``, what is imitated (``train`` without it).

        Raises:
            ConfigError: numbers that do not divide, or what a resume or the anchor refuses.
            DataError: missing experts, records over the length limits, instructions that a reward does not know.
        """
        trainer = self.trainer
        plan = self.make_plan(trainer.accumulate_grad_batches, trainer.world_size)
        if plan.prompts or plan.sample_demonstrations:
            self.engine.check_training()
            self.engine.check_lengths(self.prompt_format.max_prompt_tokens, self.sampling.max_new_tokens)
        self.check_asynchronous()
        prompts = splits["train"]
        prompts, demonstrations = self.training_records(plan, prompts, splits.get("demonstrations", prompts))
        if self.anchor is not None:
            self.anchor.check_records(prompts if plan.prompts else ())
            self.anchor.check_records(demonstrations if plan.sample_demonstrations else ())
        return self.window_loader(plan, prompts, demonstrations)

    def training_records(self, plan: WindowPlan, prompts: Records, demonstrations: Records) -> tuple[Records, Records]:
        """What of the data is trained on: records within the length limits, and of the prompts those that the rewards can score."""
        if plan.prompts:
            prompts = self._fit(self._select(prompts), no_responses)
        if plan.demonstrations:
            if self.needs_experts:
                require_experts(demonstrations, self.needs_experts)
            demonstrations = self._fit(demonstrations, expert_responses)
        return prompts, demonstrations

    def _fit(self, records: Records, responses: Callable[[Record], Sequence[NamedText]]) -> Records:
        return fit_lengths(self.tokenizer, records, self.prompt_format, self.eos_token_id, responses)

    def encode(self, record: Record) -> Any:
        """Tokens of one demonstration."""
        return encode_demonstration(self.tokenizer, record, record.experts[0], self.prompt_format, self.eos_token_id)

    def count(self, rows: Sequence[Any]) -> Tensor:
        """What encoded demonstrations count in normalisers: int64 ``[2]``, tokens and rows."""
        return count_demonstrations(rows)

    # Windows -------------------------------------------------------------------------------------------------------------------------

    def open(self, step: WindowStep, plan: WindowPlan) -> Window:
        """Sample, score and count."""
        experience = self._collect(step, plan) if plan.generates else None
        return open_window(step.window, plan, experience, self._encoded(step), self.sum_over_ranks, self.count)

    def restore(self, state: dict[str, Any], step: WindowStep, plan: WindowPlan) -> Window:
        """The window that a checkpoint holds."""
        return restore_window(state, plan, step, self._encoded(step), self.device)

    def _encoded(self, step: WindowStep) -> list[Any]:
        return [self.encode(record) for _, record in step.demonstrations]

    def _collect(self, step: WindowStep, plan: WindowPlan) -> Experience:
        requests = rollout_requests(self.tokenizer, step, self.prompt_format, plan)
        drawn = self.drawn_ahead(step, plan, requests)
        if drawn is None:
            self.sync_engine()
        experience = collect(
            requests,
            engine=self.engine,
            drawn=drawn,
            sampling=self.sampling,
            seed=self.seed,
            window=step.window,
            rewards=self.rewards if self.trains_on_rewards else None,
            rewarded=len(step.prompts) or None,
            anchor=self.anchor,
            anchor_weight=self.anchor_weight(),
            options=self.advantage_options(),
            rescore=self.rescore(),
            sum_over_ranks=self.sum_over_ranks,
        )
        if self._weight_probe.gap is not None:
            experience.metrics["engine/gap"] = self._weight_probe.gap
        return experience

    def demonstration_plan(self, size: int, samples: int, accumulate: int, world_size: int, why_loss: str) -> WindowPlan:
        """Windows of one optimiser step over demonstrations (or pairs); responses are sampled to their prompts only when anchored.

        Args:
            size: demonstrations of a step, over micro-steps and ranks.
            samples: responses to each prompt, when anchored.
            accumulate: micro-steps of a step.
            world_size: number of ranks.
            why_loss: why the anchor has no reward to join, such as ``"SFT has none"``.

        Raises:
            ConfigError: numbers that do not divide, or an anchor that joins a reward or cannot compare.
        """
        if self.anchor is not None:
            self.anchor.check_host(group_size=samples)
            if "correlation" in self.anchor.guard.lowest:
                raise ConfigError(f"guard.min_correlation does nothing: it asks for rewards, and {why_loss}; leave it out")
            if self.anchor.combine != "loss":
                raise ConfigError(f"anchor: combine={self.anchor.combine} joins a reward, and {why_loss}; use combine=loss")
        return WindowPlan(
            samples=samples,
            demonstrations=size,
            sample_demonstrations=self.anchor is not None,
            accumulate=accumulate,
            world_size=world_size,
        )

    def imitation_term(self, window: Window, micro_step: int) -> LossTerm:
        """The negative log-likelihood of a micro-step's demonstrations, divided by the tokens of the step's."""
        rows, counts = window.demonstrations_of(micro_step)
        logprobs, mask = demonstration_logprobs(self.model, rows, self.tokenizer.pad_token_id, self.device)
        return LossTerm("sft", sft_loss(logprobs, mask), mask, counts)

    def anchor_weight(self) -> float:
        """Lambda at the current optimiser step; 0 without an anchor."""
        return self.anchor.weight(self.global_step) if self.anchor is not None else 0.0

    def sampled_anchor_term(self, window: Window, micro_step: int, surrogate: Callable[[TokenLossInputs], LossOutputs]) -> LossTerm:
        """The adversarial term over responses that were sampled to the demonstrations' prompts."""
        experience, counts = window.sampled_of(micro_step)
        if experience.anchor_advantages is None:
            raise RuntimeError("the window was collected without an anchor")
        weight = self.anchor_weight()
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 0):
            inputs = policy_inputs(
                self.model, experience, experience.anchor_advantages, self.sampling.temperature, correction=self.correction
            )
            outputs = surrogate(inputs)
        return LossTerm("anchor", outputs, experience.loss_mask, counts, weight=weight)

    def step_metrics(self) -> dict[str, float]:
        """Lambda, where there is an anchor."""
        return {} if self.anchor is None else {"anchor/weight": self.anchor_weight()}

    def export(self, out: str | Path) -> None:
        """Write the policy as a Hugging Face folder, adapters merged, on rank 0. All ranks call it together."""
        state = gather_state(self.model)
        if self.trainer.is_global_zero:
            save_trained(self.model, self.tokenizer, out, self.policy, state)

    def describe(self) -> dict[str, Any]:
        """The policy's configuration and tokenizer, and what its adapters lie on."""
        generation = getattr(self.model, "generation_config", None)
        config = self.model.config.to_dict()
        config.pop("quantization_config", None)  # no primitives, and adapters say themselves what they lie on
        policy = {
            "config": config,
            "generation_config": generation.to_dict() if generation is not None else {},
            "tokenizer": self.tokenizer.name_or_path or self.policy.tokenizer or self.policy.model,
            **({} if self.policy.chat_template is None else {"chat_template": self.tokenizer.chat_template}),
            **describe_adapters(self.model, self.policy),
            "freeze": list(self.policy.freeze),
        }
        return {"policy": policy}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See ``WindowedModule``; also refuse to train on with other parts frozen, for which the optimiser's state is none."""
        frozen = checkpoint.get("aapa", {}).get("policy", {}).get("freeze", [])
        training = self._trainer is not None and self._trainer.training  # without a trainer weights alone are read
        if training and frozen != list(self.policy.freeze):
            raise ConfigError(
                f"resume: policy.freeze was {frozen}, found {list(self.policy.freeze)}; use the old one, or start from an export"
            )
        super().on_load_checkpoint(checkpoint)
