"""Rows that must not share a batch: of models that see padding, and of rotary positions that depend on the longest row.

A model is asked once, by a trial on a few tokens, whether padding changes what it makes of a row. Recurrent models that take no mask
(RecurrentGemma, RWKV) and models that count positions without it (BART's decoders, RoFormer) do. Their rows are read without padding: rows
of one length together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from aapa_lightning.errors import ConfigError
from aapa_lightning.logprobs.head import causal_model, text_config
from aapa_lightning.logprobs.inputs import forget_lengths, rotary_limit
from aapa_lightning.logprobs.trial import agree, evaluating, half_precision
from aapa_lightning.sharding import is_sharded

Side = Literal["left", "right"]
#: From ids int64 ``[N, T]`` and mask bool ``[N, T]`` to what a model makes of them: ``[N, T, ...]``, or one value a row ``[N, ...]``.
Reader = Callable[[Tensor, Tensor], Tensor]

#: Tokens of the row of the trial, of its beginning that is changed to see what a token is worth, and of the padding.
_ROW, _CHANGED, _PADDING = 8, 3, 5
#: Whether padding on a side changes what a model makes of a row.
_TRIED: WeakKeyDictionary[nn.Module, dict[Side, bool]] = WeakKeyDictionary()


def sees_padding(
    model: nn.Module, read: Reader, vocabulary: int, device: torch.device, side: Side, pad_token_id: int | None = None
) -> bool:
    """Return whether padding on a side changes what a model makes of a row, tried once: three forward passes of a few tokens.

    They run in eval mode, without gradient, and draw no random numbers. What padding changes is measured in shares of what other tokens in
    the row's beginning change. A model that cannot be called with padding at all answers yes.

    Args:
        model: of any kind.
        read: calls it.
        vocabulary: ids below it are used.
        device: of its inputs.
        side: where the padding stands.
        pad_token_id: what it must be made of, for models that look for the id. Any other text shows more: the embedding of the padding
            token is often 0, which hides what a state makes of it until the biases have moved.
    """
    tried = _TRIED.setdefault(causal_model(model), {})
    if side not in tried:
        with torch.no_grad(), evaluating(model):
            tried[side] = _changes(model, read, vocabulary, device, side, pad_token_id)
        if tried[side]:
            warnings.warn(
                f"{type(causal_model(model)).__name__} reads padding on the {side} like text: rows of unequal length are read one after "
                "the other, without padding",
                stacklevel=2,
            )
    return tried[side]


def _changes(model: nn.Module, read: Reader, vocabulary: int, device: torch.device, side: Side, pad_token_id: int | None) -> bool:
    ids = (torch.arange(2 * _ROW + _PADDING, device=device) * 7919 + 31) % max(vocabulary, 2)
    if pad_token_id is not None:
        ids = torch.where(ids == pad_token_id, (ids + 1) % max(vocabulary, 2), ids)
    row, other, more = ids.split((_ROW, _ROW, _PADDING))
    changed = torch.cat((other[:_CHANGED], row[_CHANGED:]))
    padding = more.flip(0) if pad_token_id is None else torch.full_like(more, pad_token_id)
    ones, blank = torch.ones_like(row, dtype=torch.bool), torch.zeros_like(more, dtype=torch.bool)
    whole = torch.ones(1, _ROW + _PADDING, dtype=torch.bool, device=device)
    left = side == "left"
    padded, mask = (torch.cat(parts if left else parts[::-1])[None] for parts in ((padding, row), (blank, ones)))
    beside = torch.cat((more, row))[None]
    try:
        alone, turned = (_own(read(part[None], ones[None]), _ROW, left)[:, _CHANGED:] for part in (row, changed))
        found = _own(read(torch.cat((beside, padded)), torch.cat((whole, mask)))[1:], _ROW, left)[:, _CHANGED:]
    except Exception:  # code of any model: whatever it raises, it is not padded
        return True
    return not agree(found, alone, turned, half=half_precision(model, device))


def _own(values: Tensor, length: int, left: bool) -> Tensor:
    """Return what belongs to a row's own tokens, ``[1, length, ...]``; a value for the whole row counts for each of them."""
    if values.dim() < 3:
        return values[:, None].expand(-1, length, *values.shape[1:])
    return values[:, -length:] if left else values[:, :length]


def rows_apart(model: nn.Module, attention_mask: Tensor, sides: Sequence[Side], sees: Callable[[Side], bool]) -> list[Tensor] | None:
    """Which rows of a batch may be read together: indices int64 ``[n]`` of groups whose rows are of one length.

    Args:
        model: of any kind, wrapped or not.
        attention_mask: bool ``[N, T]``.
        sides: where the batch may be padded.
        sees: whether the model sees padding there, see ``sees_padding``.

    Returns:
        None where all rows may be read as they are. Rows within the limit of rotary positions that change with length are one group of the
        first number, padded.

    Raises:
        ConfigError: rows would have to be read apart, and the model lies in shards, whose ranks call it equally often.
    """
    inner, sharded = causal_model(model), is_sharded(model)
    limit = rotary_limit(inner)
    if limit is not None:
        forget_lengths(inner)  # a longer row before must not turn those of now
    harmless = {side for side, found in _TRIED.get(inner, {}).items() if not found}
    seen = any((sharded or _padded(attention_mask, side)) and sees(side) for side in sides if side not in harmless)
    lengths = attention_mask.sum(1)
    if not seen and (limit is None or not bool((lengths > limit).any())):
        return None
    if sharded:
        reason = "reads padding like text" if seen else f"turns its rotary positions by the longest row beyond {limit} tokens"
        raise ConfigError(
            f"{type(inner).__name__} {reason}, so rows are read apart, and a sharded model is called equally often on all ranks; use "
            "--trainer.strategy ddp" + ("" if seen else f", or rows of at most {limit} tokens")
        )
    keys = lengths if seen or limit is None else torch.where(lengths > limit, lengths, 0)
    return [(keys == key).nonzero().squeeze(1) for key in keys.unique().tolist()]


def pads_right(model: nn.Module, read: Reader, device: torch.device, pad_token_id: int | None = None) -> bool:
    """Return whether rows of unequal length may be padded on the right for a model that is no causal language model, or is used as none."""
    size = int(getattr(text_config(causal_model(model)), "vocab_size", 0) or 32)
    return not sees_padding(model, read, size, device, "right", pad_token_id)


def _padded(attention_mask: Tensor, side: Side) -> bool:
    return not bool(attention_mask[:, 0 if side == "left" else -1].all())
