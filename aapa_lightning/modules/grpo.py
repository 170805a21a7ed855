"""Group relative policy optimisation, anchorable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from aapa_lightning.advantages import AdvantageScale, RewardAggregation
from aapa_lightning.anchor.signal import combine_advantages
from aapa_lightning.errors import COUNT, WEIGHT, ConfigError, check_numbers, choose, refuse_idle
from aapa_lightning.loop.collect import AdvantageOptions, Rescore, no_rescoring
from aapa_lightning.loop.experience import Experience
from aapa_lightning.loop.plan import WindowPlan
from aapa_lightning.loop.reference import as_it_started
from aapa_lightning.loop.terms import LossTerm
from aapa_lightning.loop.window import Window, policy_inputs, window_logprobs
from aapa_lightning.modules.base import PolicyModule
from aapa_lightning.objectives.grpo import grpo_loss
from aapa_lightning.objectives.kl import WITH_RATIO
from aapa_lightning.objectives.surrogate import RatioLevel, clipped_surrogate
from aapa_lightning.policy import PolicySpec
from aapa_lightning.reduce import Aggregation
from aapa_lightning.types import LossOutputs, Rollouts, TokenLossInputs

LIMITS = {
    **dict.fromkeys(("prompts_per_window", "group_size", "minibatches", "updates_per_window"), COUNT),
    **dict.fromkeys(("clip_low", "clip_high", "beta", "reward_kl", "entropy_coef"), WEIGHT),
}


class GRPOModule(PolicyModule):
    """GRPO and its relatives: DAPO, Dr. GRPO and GSPO are settings. With an ``AnchorCallback`` it is AAPA-GRPO.

    Args:
        policy: which model to train.
        prompts_per_window: prompts of a generation batch, over all devices and accumulated micro-steps.
        group_size: responses per prompt, G, at least 2.
        minibatches: optimiser steps that a window is cut into.
        updates_per_window: passes over the same rollouts (the paper's mu); above 1, or with minibatches, the policy moves away from the
            rollouts and the clip works.
        aggregation: ``dapo`` (tokens of the step), ``grpo`` (mean of response means), ``dr_grpo`` (constant length), ``bnpo`` (local).
        clip_low: lower clip of the ratio.
        clip_high: upper clip.
        ratio_level: ``token``, or ``sequence`` (GSPO; use it with ``aggregation=grpo``).
        scale_advantages: ``group``, ``batch`` or ``none`` (Dr. GRPO).
        reward_aggregation: ``sum_then_normalize``, or ``normalize_then_sum`` (GDPO).
        beta: weight of the KL loss term; above 0 a frozen copy of the initial policy is kept, under adapters no copy.
        kl_estimator: ``k2`` or ``k3``.
        kl_ratio: multiply the KL by the ratio, which makes its gradient that of KL(pi || ref) per token, also after several updates.
        reward_kl: weight of the k1 KL estimate inside the reward.
        entropy_coef: weight of the entropy bonus.
        log_entropy: log the policy's entropy also without a bonus.
        mask_truncated: leave truncated responses out of the loss.
        **kwargs: see ``PolicyModule``.
    """

    def __init__(
        self,
        policy: PolicySpec,
        *,
        prompts_per_window: int = 16,
        group_size: int = 8,
        minibatches: int = 1,
        updates_per_window: int = 1,
        aggregation: Aggregation = "dapo",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        ratio_level: RatioLevel = "token",
        scale_advantages: AdvantageScale = "group",
        reward_aggregation: RewardAggregation = "sum_then_normalize",
        beta: float = 0.0,
        kl_estimator: Literal["k2", "k3"] = "k3",
        kl_ratio: bool = True,
        reward_kl: float = 0.0,
        entropy_coef: float = 0.0,
        log_entropy: bool = True,
        mask_truncated: bool = False,
        **kwargs: Any,
    ) -> None:
        check_numbers(locals(), LIMITS)
        choose(WITH_RATIO, kl_estimator, "kl_estimator")
        if not beta:
            refuse_idle(GRPOModule, locals(), ("kl_estimator", "kl_ratio"), "without beta")
        super().__init__(policy, **kwargs)
        self.prompts_per_window = prompts_per_window
        self.group_size = group_size
        self.minibatches = minibatches
        self.updates_per_window = updates_per_window
        self.aggregation = aggregation
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.ratio_level: RatioLevel = ratio_level
        self.beta = beta
        self.kl_estimator = kl_estimator
        self.kl_ratio = kl_ratio
        self.entropy_coef = entropy_coef
        self.log_entropy = log_entropy
        self._options = AdvantageOptions(scale_advantages, reward_aggregation, mask_truncated, reward_kl)
        self._reference: list[torch.nn.Module] = []  # in a list: not a submodule, so neither trained nor saved

    def configure_model(self) -> None:
        """Load the policy and, where a KL is asked for, keep a frozen copy of how it starts; under adapters there is no need of one."""
        super().configure_model()
        if (self.beta or self._options.reward_kl) and not self._reference:
            self._reference = [self.frozen_copy()]

    def on_fit_start(self) -> None:
        """Move the reference policy to where the policy is."""
        for reference in self._reference:
            reference.to(self.device)

    def check_start(self) -> None:
        """Raise ConfigError where a KL was switched on inside a window, whose rollouts no reference has scored."""
        super().check_start()
        shares = (self._restored or {}).get("window") or ()
        if self._reference and any(share["experience"]["ref_logprobs"] is None for share in shares if share and share["experience"]):
            raise ConfigError(
                "resume: beta or reward_kl is above 0 and was 0, and the checkpoint lies in a window without log-probs of the reference; "
                "resume from a checkpoint at the boundary of a window, or set them as they were"
            )

    def make_plan(self, accumulate: int, world_size: int) -> WindowPlan:
        """Windows of whole groups."""
        if self.rewards is None:
            raise ConfigError(f"{type(self).__name__}: expected at least one reward, found none; set model.init_args.rewards")
        if self.group_size < 2:
            raise ConfigError(f"{type(self).__name__}: expected group_size >= 2, found {self.group_size}: one response has nothing to beat")
        if self.anchor is not None:
            self.anchor.check_host(group_size=self.group_size, ratio_level=self.ratio_level)
        return WindowPlan(
            prompts=self.prompts_per_window,
            samples=self.group_size,
            minibatches=self.minibatches,
            passes=self.updates_per_window,
            accumulate=accumulate,
            world_size=world_size,
        )

    def advantage_options(self) -> AdvantageOptions:
        """How rewards become advantages."""
        return self._options

    def rescore(self) -> Rescore:
        """Old log-probs where a window is used more than once, reference log-probs where there is a reference."""
        plan = self.plan
        if plan is None or (plan.steps_per_window == 1 and not self._reference):
            return no_rescoring
        needs_old = plan.steps_per_window > 1 or self._options.reward_kl > 0

        def score(rollouts: Rollouts) -> tuple[Tensor | None, Tensor | None]:
            old = window_logprobs(self.model, rollouts, plan, self.sampling.temperature) if needs_old else None
            if not self._reference:
                return old, None
            with as_it_started(self._reference[0]) as reference:
                return old, window_logprobs(reference, rollouts, plan, self.sampling.temperature)

        return score

    def loss_terms(self, window: Window, micro_step: int) -> list[LossTerm]:
        """The task's surrogate, and the anchor's on the same log-probs."""
        return self.policy_terms(window, micro_step, 1.0)

    def policy_terms(self, window: Window, micro_step: int, weight: float) -> list[LossTerm]:
        """GRPO's terms; ``weight`` is the task's share of the loss."""
        experience, counts = window.rollouts_of(micro_step)
        inputs = policy_inputs(
            self.model,
            experience,
            self._advantages(experience),
            self.sampling.temperature,
            entropy=self.log_entropy or self.entropy_coef != 0,
            entropy_grad=self.entropy_coef != 0,
            correction=self.correction,
        )

        def term(name: str, loss: Callable[[TokenLossInputs], LossOutputs], used: TokenLossInputs, share: float) -> LossTerm:
            return LossTerm(
                name, loss(used), used.response_mask, counts, self.aggregation, share, max_response_tokens=self.sampling.max_new_tokens
            )

        terms = [term("policy", self._task_loss, inputs, weight)]
        if self.anchor is not None and self.anchor.combine == "loss" and experience.anchor_advantages is not None:
            anchored = replace(inputs, advantages=experience.anchor_advantages)
            terms.append(term("anchor", self._surrogate, anchored, self.anchor_weight()))
        return terms

    def _advantages(self, experience: Experience) -> Tensor:
        if self.anchor is None or self.anchor.combine != "advantage" or experience.anchor_advantages is None:
            return experience.advantages
        return combine_advantages(experience.advantages, experience.anchor_advantages, self.anchor_weight())

    def _task_loss(self, inputs: TokenLossInputs) -> LossOutputs:
        return grpo_loss(
            inputs,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            ratio_level=self.ratio_level,
            beta=self.beta,
            kl_estimator=self.kl_estimator,
            kl_ratio=self.kl_ratio,
            entropy_coef=self.entropy_coef,
        )

    def _surrogate(self, inputs: TokenLossInputs) -> LossOutputs:
        return clipped_surrogate(inputs, clip_low=self.clip_low, clip_high=self.clip_high, ratio_level=self.ratio_level)
