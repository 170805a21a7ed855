"""Operators of AAPA Lightning, each behind one public function and defined in plain torch; fused versions belong beside the definitions."""

from aapa_kernels.anchor_advantage import AnchorAdvantages, anchor_advantage, group_mean, group_size, group_std
from aapa_kernels.sentence_pool import sentence_pool

__all__ = ["AnchorAdvantages", "anchor_advantage", "group_mean", "group_size", "group_std", "sentence_pool"]
