"""Triton kernels of the anchor advantage: one program per response, or per few rows; sums in an order that never varies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aapa_kernels.anchor_advantage.fused_math import expm1, log1p, transform_block
from aapa_kernels.anchor_advantage.reference import POOLS, TRANSFORMS

_BLOCK = 64  # sentences at a time


@triton.jit
def neutral_logit(p_logit, p_count, i_first, i_last, floor, BK: tl.constexpr):
    """Mean logit of a response's sentences that have tokens; ``floor`` where none has."""
    total = 0.0
    seen = 0.0
    for i_k in range(i_first, i_last, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = (o_k < i_last) & (tl.load(p_count + o_k, mask=o_k < i_last, other=0) > 0)
        total += tl.sum(tl.load(p_logit + o_k, mask=m_k, other=0.0), axis=0)
        seen += tl.sum(m_k.to(tl.float32), axis=0)
    return tl.where(seen > 0, total / tl.maximum(seen, 1.0), floor)


@triton.jit
def first_logit(p_logit, p_count, i_first, neutral, FILL: tl.constexpr):
    logit = tl.load(p_logit + i_first)
    if FILL:
        logit = tl.where(tl.load(p_count + i_first) > 0, logit, neutral)
    return logit


@triton.jit
def response_scores_kernel(
    p_logit,
    p_count,
    p_offset,
    p_expert,
    p_filled,
    p_score,
    tau,
    temperature,
    floor,
    TRANSFORM: tl.constexpr,
    POOL: tl.constexpr,
    FILL: tl.constexpr,
    BK: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    i_first = tl.load(p_offset + i_n)
    i_last = tl.load(p_offset + i_n + 1)
    expert = 0.0
    if TRANSFORM == "bt_gap":
        expert = tl.load(p_expert + i_n)
    neutral = 0.0
    if FILL:
        neutral = neutral_logit(p_logit, p_count, i_first, i_last, floor, BK)
    # sums are of differences to the first sentence: equal sentences have exactly their value as their mean
    first = transform_block(first_logit(p_logit, p_count, i_first, neutral, FILL), expert, tau, TRANSFORM)
    total = 0.0
    weighted = 0.0
    tokens = 0.0
    lowest = float("inf")
    excess = 0.0
    below_one = 0.0
    for i_k in range(i_first, i_last, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < i_last
        # [BK]
        b_count = tl.load(p_count + o_k, mask=m_k, other=0).to(tl.float32)
        b_logit = tl.load(p_logit + o_k, mask=m_k, other=0.0)
        if FILL:
            b_logit = tl.where(b_count > 0, b_logit, neutral)
            tl.store(p_filled + o_k, b_logit, mask=m_k)
        b_g = tl.where(m_k, transform_block(b_logit, expert, tau, TRANSFORM), first)
        total += tl.sum(b_g - first, axis=0)
        if POOL == "token_mean":
            weighted += tl.sum((b_g - first) * b_count, axis=0)
            tokens += tl.sum(b_count, axis=0)
        if (POOL == "min") | (POOL == "softmin"):
            below = tl.minimum(lowest, tl.min(tl.where(m_k, b_g, float("inf")), axis=0))
            if POOL == "softmin":
                # rescaled to the new minimum: exponents stay at most 0; e^(a + b) - 1 = (e^a - 1) + (e^b - 1) e^a
                shrink = tl.where(lowest == below, 0.0, below - lowest) / temperature
                below_one = below_one * tl.exp(shrink) + (i_k - i_first).to(tl.float32) * expm1(shrink)
                excess = excess * tl.exp(shrink)
                b_exponent = tl.where(m_k, below - b_g, 0.0) / temperature
                below_one += tl.sum(tl.where(m_k, expm1(b_exponent), 0.0), axis=0)
                excess += tl.sum(tl.where(m_k, tl.exp(b_exponent), 0.0), axis=0)
            lowest = below
    sentences = tl.maximum(i_last - i_first, 1).to(tl.float32)
    if POOL == "min":
        score = lowest
    elif POOL == "softmin":
        # far below 1 the mean of the exponentials itself has more digits than its distance from 1
        mean = below_one / sentences
        near = log1p(tl.maximum(mean, -0.5))
        score = lowest - temperature * tl.where(mean > -0.5, near, tl.log(excess / sentences))
    elif POOL == "token_mean":
        score = first + tl.where(tokens > 0, weighted / tl.maximum(tokens, 1.0), total / sentences)
    else:
        score = first + total / sentences
    tl.store(p_score + i_n, score)


@triton.jit
def group_statistics_kernel(p_value, p_id, p_mask, p_mean, p_std, p_size, N, C, BR: tl.constexpr, BN: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    i_c = tl.program_id(1).to(tl.int64)
    b_id = tl.load(p_id + o_r, mask=o_r < N, other=0)
    b_size = tl.zeros([BR], dtype=tl.float64)
    b_sum = tl.zeros([BR], dtype=tl.float64)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = (o_n < N) & (tl.load(p_mask + o_n, mask=o_n < N, other=0) != 0)
        b_v = tl.load(p_value + o_n * C + i_c, mask=m_n, other=0.0).to(tl.float64)
        # [BR, BN]
        m_same = (b_id[:, None] == tl.load(p_id + o_n, mask=m_n, other=0)[None, :]) & m_n[None, :]
        b_size += tl.sum(m_same.to(tl.float64), axis=1)
        b_sum += tl.sum(tl.where(m_same, b_v[None, :], 0.0), axis=1)
    b_mean = b_sum / tl.maximum(b_size, 1.0)
    b_square = tl.zeros([BR], dtype=tl.float64)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = (o_n < N) & (tl.load(p_mask + o_n, mask=o_n < N, other=0) != 0)
        b_v = tl.load(p_value + o_n * C + i_c, mask=m_n, other=0.0).to(tl.float64)
        m_same = (b_id[:, None] == tl.load(p_id + o_n, mask=m_n, other=0)[None, :]) & m_n[None, :]
        b_deviation = tl.where(m_same, b_v[None, :] - b_mean[:, None], 0.0)
        b_square += tl.sum(b_deviation * b_deviation, axis=1)
    b_std = tl.sqrt(b_square / tl.maximum(b_size - 1.0, 1.0))
    m_r = o_r < N
    tl.store(p_mean + o_r * C + i_c, b_mean.to(p_mean.dtype.element_ty), mask=m_r)
    tl.store(p_std + o_r * C + i_c, b_std.to(p_std.dtype.element_ty), mask=m_r)
    if i_c == 0:
        tl.store(p_size + o_r, b_size.to(tl.int64), mask=m_r)


@triton.jit
def credit_to_go_kernel(p_logit, p_count, p_offset, p_expert, p_baseline, p_credit, tau, TRANSFORM: tl.constexpr, BK: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    i_first = tl.load(p_offset + i_n)
    i_last = tl.load(p_offset + i_n + 1)
    baseline = tl.load(p_baseline + i_n)
    expert = 0.0
    if TRANSFORM == "bt_gap":
        expert = tl.load(p_expert + i_n)
    tokens = 0.0
    for i_k in range(i_first, i_last, BK):
        o_k = i_k + tl.arange(0, BK)
        tokens += tl.sum(tl.load(p_count + o_k, mask=o_k < i_last, other=0).to(tl.float32), axis=0)
    blank = tokens == 0
    tokens = tl.where(blank, (i_last - i_first).to(tl.float32), tokens)
    later = 0.0
    blocks = tl.cdiv(i_last - i_first, BK)
    for i_b in range(0, blocks):
        o_k = i_first + (blocks - 1 - i_b) * BK + tl.arange(0, BK)
        m_k = o_k < i_last
        # [BK]
        b_count = tl.load(p_count + o_k, mask=m_k, other=0).to(tl.float32)
        b_weight = tl.where(m_k, tl.where(blank, 1.0, b_count), 0.0) / tokens
        b_g = transform_block(tl.load(p_logit + o_k, mask=m_k, other=0.0), expert, tau, TRANSFORM)
        b_part = tl.where(m_k, b_weight * (b_g - baseline), 0.0)
        tl.store(p_credit + o_k, later + tl.cumsum(b_part, axis=0, reverse=True), mask=m_k)
        later += tl.sum(b_part, axis=0)


@triton.jit
def spread_kernel(p_value, p_sentence, p_out, L, i_row_stride, i_token_stride, PER_SENTENCE: tl.constexpr, BL: tl.constexpr):
    i_n = tl.program_id(0).to(tl.int64)
    o_l = tl.program_id(1) * BL + tl.arange(0, BL)
    m_l = o_l < L
    # [BL]
    b_s = tl.load(p_sentence + i_n * i_row_stride + o_l * i_token_stride, mask=m_l, other=-1)
    if PER_SENTENCE:
        b_v = tl.load(p_value + b_s, mask=m_l & (b_s >= 0), other=0.0)
    else:
        b_v = tl.where(b_s >= 0, tl.load(p_value + i_n), 0.0)
    tl.store(p_out + i_n * L + o_l, b_v, mask=m_l)


def response_scores(
    logits: Tensor,
    token_counts: Tensor,
    offsets: Tensor,
    expert_logits: Tensor | None,
    transform: str,
    tau: float,
    pool: str,
    temperature: float,
    floor: float | None,
) -> tuple[Tensor, Tensor]:
    """Launch: filled logits float32 ``[S]`` (``[0]`` without a floor) and scores float32 ``[N]``."""
    logits = logits.float().contiguous()
    size = len(offsets) - 1
    filled = torch.empty(len(logits) if floor is not None else 0, dtype=torch.float32, device=logits.device)
    scores = torch.empty(size, dtype=torch.float32, device=logits.device)
    if size:
        response_scores_kernel[(size,)](
            logits,
            token_counts.contiguous(),
            offsets.contiguous(),
            _expert(logits, expert_logits, transform),
            filled,
            scores,
            tau,
            temperature,
            0.0 if floor is None else floor,
            TRANSFORM=_known(transform, TRANSFORMS),
            POOL=_known(pool, POOLS),
            FILL=floor is not None,
            BK=_BLOCK,
            num_warps=1,
        )
    return filled, scores


def group_statistics(values: Tensor, group_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Launch: means and deviations in the shape and type of ``values``, sizes int64 ``[N]``."""
    values = values.contiguous()
    mean, std, sizes = torch.empty_like(values), torch.empty_like(values), torch.empty_like(group_ids)
    rows, columns = len(group_ids), values[0].numel() if len(values) else 0
    if rows and columns:
        group_statistics_kernel[(triton.cdiv(rows, 16), columns)](
            values,
            group_ids.contiguous(),
            mask.contiguous().view(torch.int8),
            mean,
            std,
            sizes,
            rows,
            columns,
            BR=16,
            BN=64,
            num_warps=4,
            maxnreg=72,  # left alone, ptxas takes 64 and spills on sm_90
        )
    return mean, std, sizes


def credit_to_go(
    logits: Tensor, token_counts: Tensor, offsets: Tensor, baseline: Tensor, expert_logits: Tensor | None, transform: str, tau: float
) -> Tensor:
    """Launch: centred credits float32 ``[S]``."""
    logits = logits.float().contiguous()
    credits = torch.empty_like(logits)
    if len(offsets) > 1:
        credit_to_go_kernel[(len(offsets) - 1,)](
            logits,
            token_counts.contiguous(),
            offsets.contiguous(),
            _expert(logits, expert_logits, transform),
            baseline.float().contiguous(),
            credits,
            tau,
            TRANSFORM=_known(transform, TRANSFORMS),
            BK=_BLOCK,
            num_warps=1,
        )
    return credits


def spread(values: Tensor, token_sentence: Tensor, per_sentence: bool) -> Tensor:
    """Launch: ``[N, L]`` in the type of ``values``."""
    rows, length = token_sentence.shape
    out = torch.empty(rows, length, dtype=values.dtype, device=values.device)
    if out.numel():
        block = 1024
        spread_kernel[(rows, triton.cdiv(length, block))](
            values.contiguous(),
            token_sentence,
            out,
            length,
            token_sentence.stride(0),
            token_sentence.stride(1),
            PER_SENTENCE=per_sentence,
            BL=block,
            num_warps=4,
        )
    return out


def _known(name: str, names: tuple[str, ...]) -> str:
    if name not in names:
        raise ValueError(f"expected one of {names}, not {name!r}")
    return name


def _expert(logits: Tensor, expert_logits: Tensor | None, transform: str) -> Tensor:
    """The experts' logits, or anything to point to where none is read."""
    if transform != "bt_gap":
        return logits
    if expert_logits is None:
        raise ValueError("transform 'bt_gap' needs expert_logits [N]")
    return expert_logits.float().contiguous()
