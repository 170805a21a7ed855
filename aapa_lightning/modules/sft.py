"""Supervised fine-tuning, anchorable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from aapa_lightning.errors import COUNT, WEIGHT, check_numbers
from aapa_lightning.loop.plan import WindowPlan
from aapa_lightning.loop.terms import LossTerm
from aapa_lightning.loop.window import Window
from aapa_lightning.modules.base import OptimizerFactory, PolicyModule
from aapa_lightning.objectives.surrogate import clipped_surrogate
from aapa_lightning.policy import PolicySpec
from aapa_lightning.types import LossOutputs, TokenLossInputs


def sft_optimizer(parameters: Iterable) -> Optimizer:
    """AdamW at 1e-5 without weight decay: a start for full fine-tuning of a pretrained model on demonstrations."""
    return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)


class SFTModule(PolicyModule):
    """Token-level negative log-likelihood of expert responses, divided by the tokens of the whole optimiser step.

    With an anchor (AAPA-SFT) it also samples ``anchor_group_size`` responses to each demonstration's prompt and adds the adversarial term
    over their tokens. Without one nothing is sampled in training.

    Args:
        policy: which model to train.
        optimizer: from parameters to an optimiser.
        batch_size: demonstrations of an optimiser step, over all devices and accumulated micro-steps.
        anchor_group_size: responses per prompt when anchored.
        clip_low: lower clip of the adversarial term's ratio.
        clip_high: upper clip.
        **kwargs: see ``PolicyModule``.
    """

    needs_experts = "SFT imitates expert responses"
    trains_on_rewards = False
    full_rate = 1e-5

    def __init__(
        self,
        policy: PolicySpec,
        *,
        optimizer: OptimizerFactory = sft_optimizer,
        batch_size: int = 32,
        anchor_group_size: int = 4,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        **kwargs: Any,
    ) -> None:
        check_numbers(locals(), {"batch_size": COUNT, "anchor_group_size": COUNT, "clip_low": WEIGHT, "clip_high": WEIGHT})
        super().__init__(policy, optimizer=optimizer, **kwargs)
        self.batch_size = batch_size
        self.anchor_group_size = anchor_group_size
        self.clip_low = clip_low
        self.clip_high = clip_high

    def make_plan(self, accumulate: int, world_size: int) -> WindowPlan:
        """One optimiser step a window; responses are sampled only when anchored, to the very prompts that are imitated."""
        return self.demonstration_plan(self.batch_size, self.anchor_group_size, accumulate, world_size, "SFT has none")

    def loss_terms(self, window: Window, micro_step: int) -> list[LossTerm]:
        """Imitation, and the adversarial term when anchored."""
        terms = [self.imitation_term(window, micro_step)]
        if self.anchor is not None:
            terms.append(self.sampled_anchor_term(window, micro_step, self._surrogate))
        return terms

    def _surrogate(self, inputs: TokenLossInputs) -> LossOutputs:
        return clipped_surrogate(inputs, clip_low=self.clip_low, clip_high=self.clip_high)
