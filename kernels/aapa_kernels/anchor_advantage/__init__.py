"""From sentence logits to anchor advantages."""

from aapa_kernels.anchor_advantage.groups import group_mean, group_size, group_std, pooled_std
from aapa_kernels.anchor_advantage.reference import GRANULARITIES, SCALES, AnchorAdvantages, anchor_advantage
from aapa_kernels.anchor_advantage.sentences import POOLS, TRANSFORMS, pool_sentences, transform_logits

__all__ = [
    "GRANULARITIES",
    "POOLS",
    "SCALES",
    "TRANSFORMS",
    "AnchorAdvantages",
    "anchor_advantage",
    "group_mean",
    "group_size",
    "group_std",
    "pool_sentences",
    "pooled_std",
    "transform_logits",
]
