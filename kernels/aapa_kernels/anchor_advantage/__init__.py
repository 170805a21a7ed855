"""From sentence logits to anchor advantages."""

from aapa_kernels.anchor_advantage.advantage import GRANULARITIES, SCALES, AnchorAdvantages, anchor_advantage
from aapa_kernels.anchor_advantage.groups import equal_within, pooled_std
from aapa_kernels.anchor_advantage.reference import POOLS, TRANSFORMS
from aapa_kernels.anchor_advantage.scores import ResponseScores, credit_to_go, response_scores
from aapa_kernels.anchor_advantage.statistics import GroupStatistics, group_mean, group_size, group_statistics, group_std
from aapa_kernels.anchor_advantage.tokens import spread

__all__ = [
    "GRANULARITIES",
    "POOLS",
    "SCALES",
    "TRANSFORMS",
    "AnchorAdvantages",
    "GroupStatistics",
    "ResponseScores",
    "anchor_advantage",
    "credit_to_go",
    "equal_within",
    "group_mean",
    "group_size",
    "group_statistics",
    "group_std",
    "pooled_std",
    "response_scores",
    "spread",
]
