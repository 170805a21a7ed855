"""Prompts that several rows begin with, read once: their keys and values stand before each row's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from aapa_lightning.logprobs.inputs import keeps_rotations
from aapa_lightning.logprobs.prefix import cache_behind
from aapa_lightning.logprobs.trial import agree, half_precision
from aapa_lightning.types import pad_left, pad_right


class Prefixes:
    """What a causal model remembers of ``n`` prefixes.

    Args:
        model: a causal model whose every layer attends to everything before it.
        ids: token ids of each prefix, none of them empty.

    Raises:
        ValueError: the model remembers something else than keys and values of all tokens.
    """

    def __init__(self, model: Any, ids: Sequence[Sequence[int]]) -> None:
        device = model.device
        # the last token of each stands right before its row
        padded, mask = (part.to(device) for part in pad_left(ids, 0))
        self.mask = mask.long()
        self.lengths = self.mask.sum(-1)
        positions = (self.mask.cumsum(-1) - 1).clamp_min(0)
        cache = DynamicCache(config=model.config)
        _base(model)(input_ids=padded, attention_mask=self.mask, position_ids=positions, past_key_values=cache, use_cache=True)
        if not all(type(layer) is DynamicLayer for layer in cache.layers):
            raise ValueError(f"expected layers that keep every token, found {sorted({type(layer).__name__ for layer in cache.layers})}")
        layers: list[Any] = cache.layers
        self._layers: list[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in layers]

    def inputs(self, rows: Sequence[int], mask: Tensor) -> dict[str, Any]:
        """Arguments of a forward pass over what follows the prefixes.

        Args:
            rows: the prefix of each of ``B`` rows.
            mask: int64 ``[B, L]``, 1 on the rows' tokens.
        """
        index = torch.tensor(rows, device=mask.device)
        return {
            "attention_mask": torch.cat([self.mask[index], mask], -1),
            # standing still after the end of a row, so that no position is beyond what the model knows
            "position_ids": self.lengths[index, None] + (mask.cumsum(-1) - 1).clamp_min(0),
            "past_key_values": cache_behind(self._layers, lambda states: states[index]),
            "use_cache": True,
        }


def _base(model: Any) -> Any:
    """The model without its head, which prefixes do not need."""
    return getattr(model, model.base_model_prefix, model)


@torch.no_grad()
def can_share(model: Any) -> bool:
    """Whether a row after its prefix gets the hidden states that it gets in one piece: tried out on a few tokens.

    A model that attends in windows or recurrently, in both directions, or that cannot be called so, answers no.
    """
    if not keeps_rotations(model):
        return False
    # any tokens will do; a row of one kind of token would hide wrong positions
    prefixes, tails = [[0, 1, 2, 3, 4], [1, 3]], [[2, 4, 1, 0], [4, 0]]

    def whole(row: list[int]) -> Tensor:
        states: Tensor = _base(model)(input_ids=torch.tensor([row], device=model.device), use_cache=False).last_hidden_state
        return states[0]

    try:
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], device=model.device)
        ids = pad_right(tails, 0).to(model.device)
        shared = _base(model)(input_ids=ids, **Prefixes(model, prefixes).inputs([0, 1], mask)).last_hidden_state
        half = half_precision(model, model.device)
        for row, (prefix, tail) in enumerate(zip(prefixes, tails, strict=True)):
            expected, turned = (whole(before + tail)[len(prefix) :] for before in (prefix, [4 - i for i in prefix]))
            if not agree(shared[row, : len(tail)], expected, turned, half=half):
                return False
    except Exception:  # code of any model: whatever it raises, it is read in one piece
        return False
    return True
