"""A reward model's score as the reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from aapa_lightning.data.records import require_experts
from aapa_lightning.rewards.base import Reward
from aapa_lightning.thinking import ScoreThinking
from aapa_lightning.types import Record


class ResponseScorer(Protocol):
    """What the reward asks of a reward model: ``aapa_lightning.anchor.polar.RewardModelDiscriminator``, or one of your own."""

    #: Whether it compares a response with the record's expert responses.
    needs_experts: bool

    def raw(self, responses: Sequence[str], records: Sequence[Record]) -> Tensor:
        """Finite scores of ``N`` responses, float32 ``[N]``."""
        ...


class RewardModelReward(Reward):
    """The raw score of a reward model: no temperature, no sigmoid.

    Args:
        scorer: the reward model.
        score_thinking: judge the thinking before an answer too (``Reward``).
        name: logged name.
    """

    def __init__(self, scorer: ResponseScorer, *, score_thinking: ScoreThinking | None = None, name: str = "reward_model") -> None:
        self.scorer, self.score_thinking, self.name = scorer, score_thinking, name

    def skip_reason(self, record: Record) -> str | None:
        """Raises DataError for a record without the expert response that scores need; leaves none out."""
        if self.scorer.needs_experts:
            require_experts([record], f"reward {self.name!r} compares every response with an expert's")
        return None

    def __call__(self, responses: Sequence[str], records: Sequence[Record]) -> Tensor:
        """Score ``N`` responses: float32 ``[N]``."""
        return self.scorer.raw(self.judged(responses), records)
