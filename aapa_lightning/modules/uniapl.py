"""UniAPL: imitation, reinforcement and the adversarial anchor in one gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from aapa_lightning.anchor.schedule import Schedule, as_schedule
from aapa_lightning.errors import STEPS, ConfigError, check_numbers
from aapa_lightning.loop.plan import WindowPlan
from aapa_lightning.loop.terms import LossTerm, join_terms
from aapa_lightning.loop.window import Window
from aapa_lightning.modules.grpo import GRPOModule
from aapa_lightning.policy import PolicySpec


class UniAPLModule(GRPOModule):
    r"""Single-stage preference learning: ``L_SFT + w L_GRPO + lambda L_adv`` over a mixed batch (arXiv 2509.25148, version 1).

    Every optimiser step draws demonstrations and prompts from two datasets of their own sizes (``data.demonstrations`` and ``data.train``).
    Each part has its own normaliser: imitation the tokens of the step's demonstrations, GRPO those of the rollouts to its prompts, the
    adversarial term (with an ``AnchorCallback``; lambda is its weight) those of the rollouts to the prompts of *both*. Without an anchor
    no responses are sampled to the demonstrations. The guard and the rewards look at the prompts of ``train`` alone.

    Without ``demonstrations_per_step`` it is GRPO times w. With w = 0, and no anchor or one of weight 0, it is SFT bit for bit.

    Args:
        policy: which model to train.
        demonstrations_per_step: demonstrations of an optimiser step, over all devices and accumulated micro-steps; 0 for none.
        rl_weight: w, a number or a schedule of ``aapa_lightning.anchor.schedule``; at 0 rollouts are still drawn, rewarded and logged.
        **kwargs: see ``GRPOModule``.
    """

    needs_experts = "UniAPL imitates expert responses"

    def __init__(self, policy: PolicySpec, *, demonstrations_per_step: int = 16, rl_weight: float | Schedule = 1.0, **kwargs: Any) -> None:
        check_numbers(locals(), {"demonstrations_per_step": STEPS})
        super().__init__(policy, **kwargs)
        self.demonstrations_per_step = demonstrations_per_step
        self.rl_weight = as_schedule(rl_weight, "rl_weight")
        if self.rl_weight.adapts:
            raise ConfigError(
                "rl_weight: expected a number or a schedule of the step alone (Linear, Cosine, Warmup), found one that adapts; Adaptive is "
                "for the anchor's weight"
            )

    def make_plan(self, accumulate: int, world_size: int) -> WindowPlan:
        """GRPO's windows with demonstrations in every step, to which responses are sampled only when anchored."""
        plan = super().make_plan(accumulate, world_size)
        if self.demonstrations_per_step and self.anchor is not None and self.anchor.combine != "loss":
            raise ConfigError(
                f"anchor: combine={self.anchor.combine} acts through the task's advantages, and demonstrations have none; use combine=loss"
            )
        sampled = self.anchor is not None and self.demonstrations_per_step > 0
        return replace(plan, demonstrations=self.demonstrations_per_step, sample_demonstrations=sampled)

    def loss_terms(self, window: Window, micro_step: int) -> list[LossTerm]:
        """Imitation, GRPO's terms, and the adversarial term over the rollouts of both."""
        # imitation comes first: dropout then draws what it draws in SFT
        imitation = [self.imitation_term(window, micro_step)] if self.demonstrations_per_step else []
        terms = imitation + self.policy_terms(window, micro_step, self.rl_weight.weight(self.global_step))
        if imitation and self.anchor is not None:
            terms[-1] = join_terms(terms[-1], self.sampled_anchor_term(window, micro_step, self._surrogate))
        return terms

    def step_metrics(self) -> dict[str, float]:
        """w, and lambda where there is an anchor."""
        return {"rl_weight": self.rl_weight.weight(self.global_step)} | super().step_metrics()
