"""Sampling whose noise belongs to the row, not to the batch.

A token is drawn by the Gumbel-max rule: ``argmax(logits / T + g)``, with ``g`` a pure function of (row key, position, vocabulary
index). Rows can therefore be generated in any batch, in any order and on any rank, and the same tokens come out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aapa_lightning.seeds import derive_seed

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def row_keys(seed: int, window: int, rows: Sequence[tuple[int, int]]) -> Tensor:
    """One int64 key for each (slot, sample) of a window."""
    return torch.tensor([derive_seed("sample", seed, window, slot, sample) for slot, sample in rows], dtype=torch.int64)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 with logical shifts (Steele et al. 2014): a bijection that scatters counters."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def gumbel_noise(keys: Tensor, position: int, size: int) -> Tensor:
    """Standard Gumbel noise, a function of (key, position, index) alone.

    Args:
        keys: int64 ``[B]``.
        position: index of the token in the response.
        size: vocabulary size V.

    Returns:
        float32 ``[B, V]``.
    """
    start = _mix(keys + position * 0x632BE5AB)
    bits = _mix(start[:, None] + torch.arange(1, size + 1, device=keys.device) * _GOLDEN)
    # v is small where the noise is large, so float32 keeps the tail that decides the argmax
    v = (((bits >> 32) & 0xFFFFFFFF).to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-v.clamp_(max=1 - 2.0**-24)))


def filter_logits(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """Set logits outside the top-k and the nucleus of mass ``top_p`` to ``-inf``; the likeliest token always stays.

    Args:
        logits: float32 ``[B, V]``, temperature applied.
        top_p: 1 keeps all.
        top_k: 0 keeps all.
    """
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        mass = ordered.softmax(-1)
        outside = mass.cumsum(-1) - mass >= top_p
        outside[:, 0] = False
        logits = logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return logits
