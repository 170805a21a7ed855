"""The guard: notices when a policy games the frozen discriminator. Knows no Trainer.

``measure`` is a pure function of one window. ``Guard`` compares windows with the first one and with fixed limits. All measures are built
from sums over ranks, so that every rank reaches the same verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from aapa_lightning.anchor.signal import deviations, zero_variance_counts
from aapa_lightning.anchor.thinking import answer_view
from aapa_lightning.errors import COUNT, POSITIVE, SHARE, WEIGHT, Limit, check_numbers, choose, refuse_idle
from aapa_lightning.thinking import Thinking
from aapa_lightning.types import AnchorSignal, Record, Rollouts, SumOverRanks, identity_sum

LIMITS = {
    "max_length_growth": POSITIVE,
    "max_length_vs_expert": POSITIVE,
    "max_zero_variance": SHARE,
    "min_correlation": Limit(),
    "min_entropy_ratio": WEIGHT,
    "min_auroc": SHARE,
    "patience": COUNT,
}
#: Logits are counted in bins of 0.1 between these limits; beyond them the discriminator is certain and the order does not matter.
_LOGIT_LIMIT, _BINS = 20.0, 400


def measure(
    rollouts: Rollouts,
    signal: AnchorSignal,
    task_rewards: Tensor | None = None,
    expert_logits: Tensor | None = None,
    *,
    thinking: Thinking = Thinking(),  # noqa: B008 - frozen, so sharing it is safe
    sum_over_ranks: SumOverRanks = identity_sum,
) -> dict[str, float]:
    """Measures of one window; a measure whose ingredients are missing is left out.

    Args:
        rollouts: ``N`` responses.
        signal: what the anchor said about them.
        task_rewards: ``[N]``, the task's total reward; NaN where there is none.
        expert_logits: ``[M]`` mean logits of expert responses to the same prompts, by a discriminator that was not trained on them.
        thinking: tells answers from the thinking before them, which has no part in lengths.
        sum_over_ranks: sums a tensor over ranks, called once.

    Returns:
        ``length`` mean tokens of an answer; ``length_vs_expert`` characters of answers over those of the experts to the same prompts;
        ``entropy`` nats per token, estimated by minus the log-probs of the sampled tokens, thinking included; ``score_zero_variance`` and
        ``task_zero_variance`` shares of groups whose values are all equal; ``correlation`` of anchor score and task reward within groups;
        ``task_reward`` mean; ``auroc`` probability that an expert response has a higher mean logit than a rollout.
    """
    device = signal.scores.device
    groups = rollouts.group_ids.to(device)
    parts = {
        "lengths": _lengths(rollouts, thinking),
        "score_groups": zero_variance_counts(signal.scores, groups),
        "task_groups": torch.zeros(2) if task_rewards is None else _zero_variance(task_rewards.to(device), groups),
        "moments": torch.zeros(5) if task_rewards is None else _moments(signal.scores, task_rewards.to(device), groups),
        "rollout_bins": _histogram(_response_logits(signal, len(rollouts))),
        "expert_bins": _histogram(torch.zeros(0) if expert_logits is None else expert_logits),
    }
    flat = torch.cat([part.cpu().to(torch.float64) for part in parts.values()]).to(
        device, torch.float32 if device.type == "mps" else torch.float64
    )
    totals = dict(zip(parts, sum_over_ranks(flat).cpu().split([len(part) for part in parts.values()]), strict=True))
    rows, answer_tokens, tokens, neg_logprob, chars, expert_chars = totals["lengths"].tolist()
    reward, covariance, score_variance, task_variance, scored = totals["moments"].tolist()
    ratios: dict[str, tuple[float, float] | list[float]] = {
        "length": (answer_tokens, rows),
        "length_vs_expert": (chars, expert_chars),
        "entropy": (neg_logprob, tokens),
        "score_zero_variance": totals["score_groups"].tolist(),
        "task_zero_variance": totals["task_groups"].tolist(),
        "correlation": (covariance, math.sqrt(score_variance * task_variance)),
        "auroc": _wins(totals["expert_bins"], totals["rollout_bins"]),
    }
    if task_rewards is not None:
        ratios["task_reward"] = (reward, scored)
    return {name: top / bottom for name, (top, bottom) in ratios.items() if bottom > 0}


def _lengths(rollouts: Rollouts, thinking: Thinking) -> Tensor:
    """Rows, tokens of answers, all tokens, minus the sum of log-probs, characters of answers and of experts' (where there are experts)."""
    view = answer_view(rollouts, thinking)
    different = {id(record): record for record in rollouts.records if record.experts}  # a group shares its record
    lengths = {key: _expert_length(record, thinking) for key, record in different.items()}
    pairs = [(len(text), lengths[id(record)]) for text, record in zip(view.rollouts.texts, rollouts.records, strict=True) if record.experts]
    mask = rollouts.response_mask
    tokens, neg_logprob = int(mask.sum()), -float(torch.where(mask, rollouts.engine_logprobs, 0).sum(dtype=torch.float64))
    answers = tokens - int(view.thinking.sum())
    characters = [sum(a for a, _ in pairs), sum(b for _, b in pairs)]
    return torch.tensor([len(rollouts), answers, tokens, neg_logprob, *characters], dtype=torch.float64)


def _expert_length(record: Record, thinking: Thinking) -> float:
    return sum(map(len, thinking.answers(record.experts))) / len(record.experts)


def _zero_variance(rewards: Tensor, group_ids: Tensor) -> Tensor:
    scored = ~rewards.isnan()
    return zero_variance_counts(rewards.masked_fill(~scored, 0.0), group_ids, scored)


def _moments(scores: Tensor, rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Sum of the rewards; sums of products of centred scores and rewards (covariance and both variances, times the count); the count.

    Rows without a reward (NaN) have no part in any of them.
    """
    scored = ~rewards.isnan()
    rewards, scores, group_ids = rewards[scored], scores[scored], group_ids[scored]
    a, b = (deviations(values, group_ids).cpu().double() for values in (scores, rewards))
    count = a.new_tensor(float(len(a)))
    return torch.stack([rewards.cpu().double().sum(), (a * b).sum(), a.square().sum(), b.square().sum(), count])


def _response_logits(signal: AnchorSignal, num_responses: int) -> Tensor:
    """Mean logit of each response ``[N]``."""
    index = signal.spans.response_index
    sums = signal.logits.new_zeros(num_responses).index_add(0, index, signal.logits)
    return sums / torch.bincount(index, minlength=num_responses)


def _histogram(logits: Tensor) -> Tensor:
    return torch.histc(logits.float().cpu().clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT), _BINS, -_LOGIT_LIMIT, _LOGIT_LIMIT)


def _wins(positive: Tensor, negative: Tensor) -> tuple[float, float]:
    """Pairs in which the positive lies in the higher bin (half for equal bins), and all pairs."""
    below = negative.cumsum(0) - negative
    return float((positive * (below + negative / 2)).sum()), float(positive.sum() * negative.sum())


@dataclass(frozen=True, slots=True)
class GuardReport:
    """The verdict on one window.

    Args:
        tripped: one sentence per limit that was broken ``patience`` times in a row or more; empty when all is well.
        fresh: those that reached ``patience`` just now.
        action: what to do about it.
    """

    tripped: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    action: Literal["warn", "stop"] = "warn"


class Guard:
    """Limits on the measures. Without limits it only measures.

    Args:
        max_length_growth: mean response length in tokens over that of the first window.
        max_length_vs_expert: characters of responses over those of the experts.
        max_zero_variance: share of groups whose anchor scores are all equal.
        min_correlation: within-group correlation of anchor score and task reward; a firmly negative one says that the two fight.
        min_entropy_ratio: entropy over that of the first window.
        min_auroc: of held-out expert responses against rollouts. Clearly below 0.5 the rollouts look more expert-like than the experts: the
            discriminator is being gamed. Needs a bank.
        action: ``warn``, or ``stop`` the run. An ``Adaptive`` schedule lowers lambda either way.
        patience: windows in a row that a limit has to be broken for.
    """

    def __init__(
        self,
        *,
        max_length_growth: float | None = None,
        max_length_vs_expert: float | None = None,
        max_zero_variance: float | None = None,
        min_correlation: float | None = None,
        min_entropy_ratio: float | None = None,
        min_auroc: float | None = None,
        action: Literal["warn", "stop"] = "warn",
        patience: int = 3,
    ) -> None:
        choose(dict.fromkeys(("warn", "stop")), action, "guard.action")
        check_numbers(locals(), LIMITS, "guard.")
        self.highest = _given(length_growth=max_length_growth, length_vs_expert=max_length_vs_expert, score_zero_variance=max_zero_variance)
        self.lowest = _given(correlation=min_correlation, entropy_ratio=min_entropy_ratio, auroc=min_auroc)
        if not (self.highest or self.lowest):
            refuse_idle(Guard, locals(), ("action", "patience"), "without a limit")
        self.action, self.patience = action, patience
        self._first: dict[str, float] = {}
        self._broken: dict[str, int] = {}

    def relative(self, measures: Mapping[str, float]) -> dict[str, float]:
        """The measures, with ``length_growth`` and ``entropy_ratio`` against the first window (1 in the first window itself)."""
        out = dict(measures)
        for name, relative in (("length", "length_growth"), ("entropy", "entropy_ratio")):
            first = self._first.get(name, measures.get(name))
            if first and name in measures:
                out[relative] = measures[name] / first
        return out

    def update(self, measures: Mapping[str, float]) -> GuardReport:
        """Judge one window's ``measure`` and remember it. Call once per window, on every rank with the same numbers."""
        values = self.relative(measures)
        for name in ("length", "entropy"):
            if name in measures:
                self._first.setdefault(name, measures[name])
        tripped, fresh = [], []
        for name, limit, side in [(n, x, "above") for n, x in self.highest.items()] + [(n, x, "below") for n, x in self.lowest.items()]:
            value = values.get(name)
            broken = value is not None and (value > limit if side == "above" else value < limit)
            self._broken[name] = self._broken.get(name, 0) + 1 if broken else 0
            if self._broken[name] >= self.patience:
                tripped.append(f"{name} is {value:.4g}, {side} {limit:g} for {self._broken[name]} windows in a row")
            if self._broken[name] == self.patience:
                fresh.append(tripped[-1])
        return GuardReport(tuple(tripped), tuple(fresh), self.action)

    def state_dict(self) -> dict[str, Any]:
        """The first window's measures and how often each limit was broken in a row."""
        return {"first": dict(self._first), "broken": dict(self._broken)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self._first = dict(state["first"])
        self._broken = dict(state["broken"])


def _given(**limits: float | None) -> dict[str, float]:
    return {name: limit for name, limit in limits.items() if limit is not None}
