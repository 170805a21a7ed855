"""Fused operators of AAPA Lightning, each behind one public function; torch alone is needed for the references."""

from aapa_kernels.anchor_advantage import AnchorAdvantages, anchor_advantage, group_mean, group_size, group_std
from aapa_kernels.sentence_pool import sentence_pool

__all__ = ["AnchorAdvantages", "anchor_advantage", "group_mean", "group_size", "group_std", "sentence_pool"]
