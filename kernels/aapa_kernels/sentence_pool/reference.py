"""Reference of the sentence pooling operator: plain torch, the definition that a fused kernel has to equal."""

from __future__ import annotations

import torch
from torch import Tensor


def sentence_pool(hidden: Tensor, token_sentence: Tensor, num_sentences: int, normalize: bool = False) -> Tensor:
    """Average the hidden states of each sentence's tokens.

    ``e_s = (1 / n_s) sum_{t in s} h_t``, and ``e_s / |e_s|`` with ``normalize``. A sentence without tokens, or with a mean of zero, is the
    zero vector. Hidden states outside every sentence are never read: they may be NaN, and their gradient is 0.

    Args:
        hidden: hidden states ``[N, L, D]`` or ``[T, D]``, any float type.
        token_sentence: int64 ``[N, L]`` or ``[T]``, the sentence of each token in ``0..S-1``; -1 for none.
        num_sentences: ``S``.
        normalize: divide by the Euclidean norm.

    Returns:
        ``[S, D]`` float32 (float64 for float64 hidden states), differentiable in ``hidden``.
    """
    width = hidden.shape[-1]
    sentence = token_sentence.reshape(-1)
    inside = sentence >= 0
    sentence = sentence[inside]
    values = hidden.reshape(-1, width)[inside].to(torch.promote_types(hidden.dtype, torch.float32))
    sums = values.new_zeros(num_sentences, width).index_add(0, sentence, values)
    counts = values.new_zeros(num_sentences).index_add(0, sentence, values.new_ones(sentence.shape[0]))
    means = sums / counts.clamp_min(1)[:, None]
    if not normalize:
        return means
    squared = means.square().sum(-1, keepdim=True)
    # The root is only taken of positive numbers: its gradient at 0 is infinite.
    return means / torch.where(squared > 0, squared, torch.ones_like(squared)).sqrt()
