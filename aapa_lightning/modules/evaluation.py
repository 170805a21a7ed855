"""Held-out figures of a policy: rewards, judges, likeness to the expert. Right on several ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from aapa_lightning.metrics.expert_logprob import ExpertLogProb
from aapa_lightning.metrics.length_distance import LengthDistance
from aapa_lightning.rewards.base import Reward
from aapa_lightning.rewards.compose import RewardSet
from aapa_lightning.thinking import ScoreThinking
from aapa_lightning.types import Rollouts


class Evaluator:
    """Accumulates the figures of one pass over a split.

    Figures: ``reward`` (weighted total) and ``rewards/<name>``; every judge under its own name; ``response_length`` (tokens),
    ``truncated`` (share); ``expert_logprob`` (nats per token of the expert responses); ``length_distance`` (tokens, Wasserstein-1 between
    response lengths and expert lengths). Of preference pairs: ``pair_accuracy`` (share in which the policy gives the chosen response more
    per token), ``chosen_logprob`` and ``rejected_logprob`` (nats per token, means over responses).

    Args:
        rewards: what the policy is trained on.
        judges: measures that no training sees.
        device: where sums live.
        score_thinking: of the judges, as in ``RewardSet``.
    """

    def __init__(
        self, rewards: RewardSet | None, judges: Sequence[Reward], device: torch.device, *, score_thinking: ScoreThinking = False
    ) -> None:
        self._rewards = rewards
        self._judges = RewardSet(list(judges), score_thinking=score_thinking) if judges else None
        names = ["response_length", "truncated"]
        names += ["reward", *(f"rewards/{name}" for name in rewards.names)] if rewards else []
        names += self._judges.names if self._judges else []
        self._responses = {name: MeanMetric().to(device) for name in names}
        self._expert_logprob = ExpertLogProb().to(device)
        self._length_distance = LengthDistance().to(device)
        self._pairs = {name: MeanMetric().to(device) for name in ("pair_accuracy", "chosen_logprob", "rejected_logprob")}

    def add_rollouts(self, rollouts: Rollouts) -> None:
        """Add responses; their expert lengths come with ``add_experts``."""
        lengths = rollouts.lengths
        self._mean("response_length", lengths)
        self._mean("truncated", rollouts.truncated)
        self._length_distance.update(lengths, lengths[:0])
        if self._rewards:
            columns = self._rewards.score(rollouts.texts, rollouts.records, rollouts.prompt_ends)
            self._mean("reward", self._rewards.total(columns))
            for name, column in zip(self._rewards.names, columns.unbind(1), strict=True):
                self._mean(f"rewards/{name}", column)
        if self._judges:
            columns = self._judges.score(rollouts.texts, rollouts.records, rollouts.prompt_ends)
            for name, column in zip(self._judges.names, columns.unbind(1), strict=True):
                self._mean(name, column)

    def add_experts(self, logprobs: Tensor, mask: Tensor) -> None:
        """Add the policy's log-probs ``[B, T]`` of expert responses; ``mask`` marks their tokens."""
        self._expert_logprob.update(logprobs, mask)
        lengths = mask.sum(-1)
        self._length_distance.update(lengths[:0], lengths)

    def add_pairs(self, logprobs: Tensor) -> None:
        """Add the policy's mean log-probs per token ``[2B]`` of ``B`` chosen responses, then of their rejected ones."""
        chosen, rejected = logprobs.float().chunk(2)
        for name, values in zip(self._pairs, (0.5 + 0.5 * (chosen - rejected).sign(), chosen, rejected), strict=True):
            self._pairs[name].update(values)

    def compute(self, *, generated: bool, experts: bool, pairs: bool = False) -> dict[str, float]:
        """All figures, over all ranks. ``generated``, ``experts`` and ``pairs`` say which parts were added (on any rank)."""
        figures: dict[str, Metric] = {}
        if generated:
            figures |= self._responses
        if experts:
            figures["expert_logprob"] = self._expert_logprob
        if pairs:
            figures |= self._pairs
        if generated and experts:
            figures["length_distance"] = self._length_distance
        return {name: float(metric.compute()) for name, metric in figures.items()}

    def _mean(self, name: str, values: Tensor) -> None:
        metric = self._responses[name]
        values = values.to(metric.device).float()
        metric.update(values[~values.isnan()])  # what a reward could not score has no part in its mean
