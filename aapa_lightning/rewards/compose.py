"""Several rewards as one: names, weights, and errors that name the reward and the record."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aapa_lightning.advantages import scored_rows
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.rewards.base import Reward
from aapa_lightning.thinking import Judged, ScoreThinking, as_thinking
from aapa_lightning.types import Record
from aapa_lightning.users_code import culprit, label, users_code

logger = logging.getLogger(__name__)

#: A reward, or its ``score_or_abstain``.
Judge = Callable[[Sequence[str], Sequence[Record]], Any]


class RewardSet:
    """Rewards and their weights.

    Args:
        rewards: at least one, with different names.
        weights: one finite number per reward; default 1 each.
        score_thinking: let rewards judge the thinking before an answer too; a reward's own option counts more. ``Thinking`` names other
            tags.

    Raises:
        ConfigError: no reward, equal names, or weights that do not fit.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float] | None = None, *, score_thinking: ScoreThinking = False) -> None:
        if not rewards:
            raise ConfigError("expected at least one reward, found none; set rewards")
        for reward in rewards:
            if not callable(reward) or not isinstance(getattr(reward, "name", None), str):
                raise ConfigError(f"expected a reward (callable, with a 'name'), found {reward!r}; wrap a function in FunctionReward")
        self.rewards = list(rewards)
        self.score_thinking = score_thinking
        self.names = [reward.name for reward in rewards]
        if repeated := [name for name, count in Counter(self.names).items() if count > 1]:
            raise ConfigError(f"rewards need different names, found {repeated[0]!r} more than once; set 'name'")
        self.weights = [1.0] * len(rewards) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(rewards):
            raise ConfigError(f"expected one weight per reward ({', '.join(self.names)}), found {len(self.weights)} weights")
        if not all(map(math.isfinite, self.weights)):
            raise ConfigError(f"reward weights must be finite, found {self.weights}")

    def score(self, responses: Sequence[str], records: Sequence[Record], prompt_ends: Sequence[str] = ()) -> Tensor:
        """Unweighted rewards of ``N`` responses, float32 ``[N, R]`` on the CPU; NaN where a reward that may abstain did.

        Args:
            responses: whole responses; each reward is given what it is to judge of them (``aapa_lightning.thinking``).
            records: their records.
            prompt_ends: the last characters of their prompts, or nothing where they are not known.

        Raises:
            DataError: a reward raised, or returned another number of values or a value that is not finite; the message names the reward and
                the record.
        """
        return torch.stack([_column(reward, self._judged(reward, responses, prompt_ends), records) for reward in self.rewards], dim=1)

    def _judged(self, reward: Reward, responses: Sequence[str], prompt_ends: Sequence[str]) -> list[Judged]:
        own = getattr(reward, "score_thinking", None)
        return as_thinking(self.score_thinking if own is None else own).answers(responses, prompt_ends)

    def total(self, columns: Tensor) -> Tensor:
        """Weighted sum of the rewards, float32 ``[N]``, of ``score``'s columns ``[N, R]`` on any device; NaN where no reward scored."""
        # not a matrix product, which autocast would round to 16 bits
        known = columns.masked_fill(columns.isnan(), 0.0)
        total = (known * torch.tensor(self.weights, device=columns.device)).sum(1)
        return total.masked_fill(~scored_rows(columns), math.nan)

    def select(self, records: Sequence[Record]) -> list[int]:
        """Indices of the records to train on: those that no reward leaves out. Called once, before training.

        Raises:
            DataError: a reward cannot score a record, or every record is left out.
        """
        hooks = [(reward.name, reward.skip_reason) for reward in self.rewards if hasattr(reward, "skip_reason")]
        if not hooks:
            return list(range(len(records)))
        kept: list[int] = []
        reasons: Counter[str] = Counter()
        for i, record in enumerate(records):
            why = next((f"{name}: {reason}" for name, hook in hooks if (reason := hook(record)) is not None), None)
            if why is None:
                kept.append(i)
            else:
                reasons[why] += 1
        if reasons:
            summary = "; ".join(f"{why} ({count})" for why, count in reasons.most_common())
            if not kept:
                raise DataError(f"the rewards leave out all {len(records)} records: {summary}")
            logger.warning("%d of %d records left out by rewards: %s", len(records) - len(kept), len(records), summary)
        return kept


def _column(reward: Reward, responses: Sequence[str], records: Sequence[Record]) -> Tensor:
    """Scores of one reward, float32 ``[N]``."""
    judge: Judge = getattr(reward, "score_or_abstain", reward)
    may_abstain = judge is not reward

    def alone(i: int) -> object:
        return _numbers(judge([responses[i]], [records[i]]), may_abstain)

    with users_code(f"reward {reward.name!r}", lambda: culprit(alone, responses, [label(record) for record in records])):
        values, abstained = _numbers(judge(responses, records), may_abstain)
    if values.shape != (len(responses),):
        raise DataError(
            f"reward {reward.name!r} must return one number per response, {len(responses)} in all; found shape {tuple(values.shape)} "
            f"(first record {label(records[0]) if records else 'none'})"
        )
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        i = bad[0]
        raise DataError(
            f"reward {reward.name!r} must return finite numbers, found {float(values[i])} for {label(records[i])}, "
            f"response {responses[i][:80]!r}"
        )
    values[abstained] = math.nan
    return values


def _numbers(found: Any, may_abstain: bool) -> tuple[Tensor, list[int]]:
    """Scores, float32 on the CPU, and the indices at which a reward gave None where it may; those have score 0."""
    abstained = [i for i, value in enumerate(found) if value is None] if may_abstain else []
    if abstained:
        found = [0.0 if value is None else value for value in found]
    return torch.as_tensor(found, dtype=torch.float32).detach().cpu().clone(), abstained
