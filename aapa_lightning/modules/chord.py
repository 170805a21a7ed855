"""CHORD: GRPO and weighted imitation in every step, anchorable."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from aapa_lightning.errors import COUNT, SHARE, STEPS, check_numbers, choose
from aapa_lightning.loop.demonstrations import demonstration_logprobs
from aapa_lightning.loop.plan import WindowPlan
from aapa_lightning.loop.terms import LossTerm
from aapa_lightning.loop.window import Window
from aapa_lightning.modules.grpo import GRPOModule
from aapa_lightning.objectives.chord import WEIGHTS, SFTWeight, chord_mu, chord_sft_loss
from aapa_lightning.policy import PolicySpec


class CHORDModule(GRPOModule):
    """``(1 - mu) L_GRPO + mu L_SFT`` with an expert batch of its own size and normaliser (arXiv 2508.11408).

    Args:
        policy: which model to train.
        expert_batch_size: demonstrations of an optimiser step, over all devices and accumulated micro-steps.
        mu_warmup_steps: optimiser steps of linear warm-up from 0.
        mu_decay_steps: optimiser steps of cosine decay to the valley.
        mu_peak: share of imitation at its peak, which it keeps without decay.
        mu_valley: share of imitation once it has decayed; None is 0.1.
        sft_weight: ``phi`` p(1 - p) (CHORD-phi), ``none`` (CHORD-mu) or ``is`` p; detached.
        **kwargs: see ``GRPOModule``.
    """

    needs_experts = "CHORD imitates expert responses"

    def __init__(
        self,
        policy: PolicySpec,
        *,
        expert_batch_size: int = 8,
        mu_warmup_steps: int = 0,
        mu_decay_steps: int = 0,
        mu_peak: float = 0.1,
        mu_valley: float | None = None,
        sft_weight: SFTWeight = "phi",
        **kwargs: Any,
    ) -> None:
        check_numbers(locals(), {"expert_batch_size": COUNT, "mu_warmup_steps": STEPS, "mu_decay_steps": STEPS})
        check_numbers(locals(), {"mu_peak": SHARE, "mu_valley": SHARE})
        choose(WEIGHTS, sft_weight, "sft_weight")
        super().__init__(policy, **kwargs)
        self.expert_batch_size = expert_batch_size
        self.sft_weight = sft_weight
        self._mu = partial(chord_mu, warmup_steps=mu_warmup_steps, decay_steps=mu_decay_steps, peak=mu_peak, valley=mu_valley)
        self._mu(0)  # refuses impossible schedules before anything is loaded

    def make_plan(self, accumulate: int, world_size: int) -> WindowPlan:
        """GRPO's windows with demonstrations in every step."""
        return replace(super().make_plan(accumulate, world_size), demonstrations=self.expert_batch_size)

    def loss_terms(self, window: Window, micro_step: int) -> list[LossTerm]:
        """GRPO's terms and imitation; without a share there is no forward over demonstrations, and its figures read 0."""
        mu = self._mu(self.global_step)
        terms = self.policy_terms(window, micro_step, 1.0 - mu)
        rows, counts = window.demonstrations_of(micro_step)
        if mu > 0:
            logprobs, mask = demonstration_logprobs(self.model, rows, self.tokenizer.pad_token_id, self.device)
        else:
            logprobs, mask = torch.zeros(1, 1, device=self.device), torch.zeros(1, 1, dtype=torch.bool, device=self.device)
        terms.append(LossTerm("sft", chord_sft_loss(logprobs, mask, weight=self.sft_weight), mask, counts, weight=mu))
        return terms

    def step_metrics(self) -> dict[str, float]:
        """mu, and lambda where there is an anchor."""
        return {"mu": self._mu(self.global_step)} | super().step_metrics()
