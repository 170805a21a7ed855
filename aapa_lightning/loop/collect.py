"""From prompts to experience: generate, reward, anchor, advantages. No Trainer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aapa_lightning.advantages import append_reward, task_advantages
from aapa_lightning.anchor.signal import combine_rewards, first_responses
from aapa_lightning.anchor.term import AnchorTerm
from aapa_lightning.errors import ConfigError
from aapa_lightning.loop.experience import Experience, slice_rollouts
from aapa_lightning.objectives.kl import kl_penalty
from aapa_lightning.reduce import Mean, masked_sum
from aapa_lightning.rewards.compose import RewardSet
from aapa_lightning.rollout.base import RolloutEngine, RolloutRequest, SamplingParams
from aapa_lightning.types import Rollouts, SumOverRanks, identity_sum
from aapa_lightning.users_code import users_code

#: Gives (old, reference) log-probs of rollouts, float32 ``[N, L]`` each or None.
Rescore = Callable[[Rollouts], tuple[Tensor | None, Tensor | None]]

BIASED_SAMPLING = (
    "top_p < 1 or top_k > 0: responses are drawn from a truncated distribution, but the ratio is that of the whole one, which biases the "
    "gradient; train with top_p=1 and top_k=0"
)


def no_rescoring(rollouts: Rollouts) -> tuple[None, None]:
    """The ``Rescore`` of one update per window without a reference."""
    return None, None


@dataclass(frozen=True, slots=True)
class AdvantageOptions:
    """How rewards become advantages.

    Args:
        scale: ``group``, ``batch`` or ``none``.
        aggregation: ``sum_then_normalize`` or ``normalize_then_sum``.
        mask_truncated: leave truncated responses out of the loss and its counts (DAPO's overlong filtering); their rewards still count.
        reward_kl: weight of the k1 estimate of KL(pi || ref), summed over the response, subtracted from the reward; 0 for none.
    """

    scale: str = "group"
    aggregation: str = "sum_then_normalize"
    mask_truncated: bool = False
    reward_kl: float = 0.0


def collect(
    requests: Sequence[RolloutRequest],
    *,
    engine: RolloutEngine,
    drawn: Rollouts | None = None,
    sampling: SamplingParams,
    seed: int,
    window: int,
    rewards: RewardSet | None = None,
    rewarded: int | None = None,
    anchor: AnchorTerm | None = None,
    anchor_weight: float = 0.0,
    options: AdvantageOptions | None = None,
    rescore: Rescore = no_rescoring,
    sum_over_ranks: SumOverRanks = identity_sum,
) -> Experience:
    """Collect one rank's share of a window.

    Args:
        requests: the rank's prompts.
        engine: draws the responses.
        drawn: the responses, where they were drawn before; else None.
        sampling: how.
        seed: seed of the run.
        window: number of the window.
        rewards: the task's rewards; None gives task advantages of 0 (SFT).
        rewarded: how many of the requests, from the first, the rewards, the guard and all metrics but the anchor's look at; None for all.
            The responses to the others have rewards of NaN and task advantages of 0.
        anchor: scores the rollouts and takes the guard's measures, which ``anchor.advance`` acts on; None for none.
        anchor_weight: lambda at the window's first step, used where the anchor is combined with the reward.
        options: advantage options.
        rescore: old and reference log-probs.
        sum_over_ranks: sums a tensor over ranks; called equally often on all of them.

    Returns:
        The experience, every tensor on the rollouts' device and without gradient.

    Raises:
        ConfigError: a KL in the reward without old and reference log-probs.
    """
    options = options or AdvantageOptions()
    if sampling.top_p < 1 or sampling.top_k > 0:
        warnings.warn(BIASED_SAMPLING, stacklevel=2)
    with torch.no_grad():
        with users_code(f"engine {type(engine).__name__}", owner=engine):
            rollouts = drawn if drawn is not None else engine.generate(requests, sampling, seed=seed, window=window)
        old, reference = rescore(rollouts)
        # casts of weights made here must not serve the loss under the same autocast: its gradient would end at them (pytorch#112583)
        torch.clear_autocast_cache()
        signal = anchor.signal(rollouts, sum_over_ranks=sum_over_ranks) if anchor is not None else None
        loss_mask = rollouts.response_mask & ~(rollouts.truncated[:, None] & options.mask_truncated)
        rows = slice(0, sum(request.samples for request in requests[:rewarded]))
        task = slice_rollouts(rollouts, rows)
        metrics: dict[str, float] = {}
        columns, weights, scored = _rewards(task, rewards)
        metrics |= scored
        if anchor is not None and signal is not None:
            metrics |= {f"anchor/{name}": value for name, value in signal.metrics.items()}
            total = rewards.total(columns) if rewards is not None else None
            watched = anchor.observe(task, first_responses(signal, len(task)), total, sum_over_ranks=sum_over_ranks)
            metrics |= {f"guard/{name}": value for name, value in watched.items()}
        width = task.response_ids.shape[1]
        columns, weights = _shape(columns, weights, task, options, _cut(old, rows, width), _cut(reference, rows, width))
        if anchor is not None and signal is not None and anchor.combine == "reward":
            columns, weights = combine_rewards(columns, weights, first_responses(signal, len(task)), anchor_weight)
        advantages, found = task_advantages(
            columns,
            weights,
            task.group_ids,
            scale=options.scale,
            aggregation=options.aggregation,
            sum_over_ranks=sum_over_ranks,
        )
        others = len(rollouts) - len(task)
    # the task's own mean reward stays, without what the anchor or a KL put into it
    metrics = (found if rewards is not None else {}) | metrics
    metrics |= {
        "response_length": Mean.of(task.lengths),
        "truncated": Mean.of(task.truncated),
    }
    return Experience(
        rollouts=rollouts,
        loss_mask=loss_mask,
        rewards=nn.functional.pad(columns, (0, 0, 0, others), value=math.nan),
        advantages=nn.functional.pad(advantages, (0, others)),
        scores=signal.scores if signal else None,
        anchor_advantages=signal.advantages if signal else None,
        old_logprobs=old,
        ref_logprobs=reference,
        metrics=metrics,
    )


def _cut(logprobs: Tensor | None, rows: slice, width: int) -> Tensor | None:
    return None if logprobs is None else logprobs[rows, :width]


def _rewards(rollouts: Rollouts, rewards: RewardSet | None) -> tuple[Tensor, Tensor, dict[str, Mean]]:
    device = rollouts.response_ids.device
    if rewards is None:
        return torch.zeros(len(rollouts), 1, device=device), torch.ones(1, device=device), {}
    columns = rewards.score(rollouts.texts, rollouts.records, rollouts.prompt_ends).to(device)
    weights = torch.as_tensor(rewards.weights, dtype=torch.float32, device=device)
    metrics = {f"rewards/{name}": _scored_mean(columns[:, i]) for i, name in enumerate(rewards.names)}
    return columns, weights, metrics | {"reward": _scored_mean(rewards.total(columns))}


def _scored_mean(values: Tensor) -> Mean:
    return Mean.of(values[~values.isnan()])


def _shape(
    columns: Tensor, weights: Tensor, rollouts: Rollouts, options: AdvantageOptions, old: Tensor | None, reference: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Append the k1 penalty as one more reward."""
    if not options.reward_kl:
        return columns, weights
    if old is None or reference is None:
        raise ConfigError("reward_kl needs the old and the reference policy's log-probs, but rescore gave none; see collect(rescore=...)")
    penalty = masked_sum(kl_penalty(old, reference, "k1"), rollouts.response_mask, dim=-1)
    return append_reward(columns, penalty), torch.cat([weights, weights.new_tensor([-options.reward_kl])])
