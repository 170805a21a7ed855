"""Features of a sentence and the small trainable head on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from aapa_kernels import AnchorHead, response_scores, sentence_pool
from aapa_lightning.anchor.encoder import Embedded
from aapa_lightning.errors import ConfigError

Feature = Literal["sentence", "response", "reference"]
#: Width of each feature in units of the encoder's hidden size ``D``, and extra columns.
FEATURES: dict[str, tuple[int, int]] = {"sentence": (1, 0), "response": (1, 0), "reference": (2, 1)}

#: Divided by less than this, a feature that all but stood still in training may leave the range of float16 (65504).
_LEAST_STD = 1e-3


def feature_size(names: Sequence[Feature], hidden_size: int) -> int:
    """Columns of ``sentence_features``. Raises ConfigError for an unknown, repeated or empty list of names."""
    if not names or len(set(names)) != len(names) or not set(names) <= FEATURES.keys():
        raise ConfigError(f"features must be distinct names out of {list(FEATURES)}, found {list(names)}")
    return sum(FEATURES[name][0] * hidden_size + FEATURES[name][1] for name in names)


def sentence_features(
    names: Sequence[Feature], embedded: Embedded, references: Embedded | None = None, reference_of: Sequence[int] = ()
) -> Tensor:
    """Features of ``S`` sentences.

    ``sentence``: the embedding e. ``response``: mean of the response's token embeddings. ``reference``: the sentence m of the reference
    text with the largest cosine with e, as m, abs(e - m) and that cosine.

    Args:
        names: which features, in order.
        embedded: the sentences to describe.
        references: sentences of the reference texts, for ``reference``.
        reference_of: the reference text of each of the ``N`` responses.

    Returns:
        float32 ``[S, F]``.
    """
    columns = []
    for name in names:
        if name == "sentence":
            columns.append(embedded.embeddings)
        elif name == "response":
            columns.append(response_means(embedded)[embedded.response_index])
        elif references is not None:
            columns.append(_best_match(embedded, references, reference_of))
    return torch.cat(columns, dim=-1)


def response_means(embedded: Embedded) -> Tensor:
    """Token-weighted mean of each response's sentences, float32 ``[N, D]``; 0 for a response of which nothing was seen."""
    weights = embedded.counts.to(embedded.embeddings.dtype)
    offsets = embedded.offsets
    # the mean over sentences of n_s e_s is the sum over tokens, but for the number of sentences
    weighted = sentence_pool(embedded.embeddings * weights[:, None], offsets[:-1], offsets.diff())
    totals = torch.segment_reduce(weights, "sum", offsets=offsets, axis=0, initial=0.0)
    return weighted * (offsets.diff() / totals.clamp_min(1))[:, None]


def _best_match(embedded: Embedded, references: Embedded, reference_of: Sequence[int]) -> Tensor:
    width = embedded.embeddings.shape[-1]
    out = embedded.embeddings.new_zeros(len(embedded.response_index), 2 * width + 1)
    bounds = torch.bincount(references.response_index, minlength=references.size).cumsum(0).tolist()
    start = 0
    for i, size in enumerate(torch.bincount(embedded.response_index, minlength=embedded.size).tolist()):
        mine = embedded.embeddings[start : start + size]
        row = reference_of[i]
        theirs = slice(bounds[row - 1] if row else 0, bounds[row])
        candidates = references.embeddings[theirs][references.counts[theirs] > 0]
        if len(candidates):
            cosine = functional.normalize(mine, dim=-1) @ functional.normalize(candidates, dim=-1).T
            best, which = cosine.max(-1)
            matched = candidates[which]
            out[start : start + size] = torch.cat([matched, (mine - matched).abs(), best[:, None]], dim=-1)
        start += size
    return out


class StackedHead(nn.Module):
    """``K`` heads side by side, one per fold: standardise, then a linear map or a perceptron with one hidden layer (GELU).

    Head ``k`` judges the prompts of fold ``k``, in training and afterwards; a prompt that training did not meet has a fold too.

    In evaluation mode logits are divided by ``temperature``, which ``fit_temperature`` finds after training; in training they are not.

    Args:
        folds: ``K``; head ``k`` is trained without the prompts and texts of fold ``k``. 1 is a single head trained on everything.
        in_features: ``F``.
        hidden_units: width of the hidden layer; 0 for a linear map.
        dropout: on the standardised features and on the hidden layer, in training.
        seed: of the initial weights.
    """

    mean: Tensor
    std: Tensor
    floor: Tensor
    temperature: Tensor

    def __init__(self, folds: int, in_features: int, hidden_units: int = 256, dropout: float = 0.2, seed: int = 0) -> None:
        super().__init__()
        self.dropout = dropout
        generator = torch.Generator().manual_seed(seed)

        def uniform(fan_in: int, *shape: int) -> nn.Parameter:
            return nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(fan_in))

        width = hidden_units or in_features
        if hidden_units:
            self.hidden_weight = uniform(in_features, folds, in_features, hidden_units)
            self.hidden_bias = nn.Parameter(torch.zeros(folds, 1, hidden_units))
        self.weight = uniform(width, folds, width, 1)
        self.bias = nn.Parameter(torch.zeros(folds, 1, 1))
        self.hidden_units = hidden_units
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("std", torch.ones(in_features))
        self.register_buffer("floor", torch.zeros(folds))
        self.register_buffer("temperature", torch.ones(()))

    @property
    def folds(self) -> int:
        """Number of heads."""
        return self.bias.shape[0]

    def forward(self, features: Tensor) -> Tensor:
        """Logits float32 ``[K, S]`` of features ``[S, F]``."""
        x = (features.float() - self.mean) / self.std
        x = functional.dropout(x, self.dropout, self.training)
        stacked = x.expand(self.folds, *x.shape)
        if self.hidden_units:
            stacked = functional.gelu(torch.baddbmm(self.hidden_bias, stacked, self.hidden_weight))
            stacked = functional.dropout(stacked, self.dropout, self.training)
        logits = torch.baddbmm(self.bias, stacked, self.weight).squeeze(-1)
        return logits if self.training else logits / self.temperature

    @torch.no_grad()
    def of_fold(self, fold: int, dtype: torch.dtype = torch.float32) -> AnchorHead:
        """One of the heads in evaluation mode, as ``anchor_score`` takes it.

        Args:
            fold: which.
            dtype: of the hidden layer's weights; float32 instead of float16 where a feature all but stood still in training.
        """
        last = (self.weight[fold].flatten() / self.temperature, self.bias[fold].flatten() / self.temperature)
        shared = (self.mean, self.std.reciprocal())
        if not self.hidden_units:
            return AnchorHead(*shared, *last)
        if dtype == torch.float16 and float(self.std.min()) < _LEAST_STD:
            dtype = torch.float32
        return AnchorHead(*shared, *last, self.hidden_weight[fold].to(dtype).contiguous(), self.hidden_bias[fold].flatten())

    @torch.no_grad()
    def fit_scale(self, features: Tensor) -> None:
        """Set the standardisation from training features ``[S, F]``."""
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0, correction=0).clamp_min(1e-6))


def fill_unseen(logits: Tensor, embedded: Embedded, floor: Tensor) -> Tensor:
    """Give the sentences that the encoder did not see (cut off, empty) a neutral logit.

    It is the mean over the response's seen sentences, so that averages do not move. A response of which nothing was seen gets
    ``floor``: silence must not pay.

    Args:
        logits: float32 ``[K, S]``.
        embedded: the sentences.
        floor: float32 ``[K]``.

    Returns:
        float32 ``[K, S]``.
    """
    offsets = embedded.offsets
    rows = [
        response_scores(row, embedded.counts, offsets, transform="score", floor=value).logits
        for row, value in zip(logits, floor.tolist(), strict=True)
    ]
    return torch.stack(rows)
