"""Decoding with a policy: each prompt is read once, however many responses it gets, and rows that have ended leave the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aapa_lightning.logprobs.head import causal_model, text_config
from aapa_lightning.logprobs.inputs import keeps_rotations
from aapa_lightning.rollout.base import SamplingParams
from aapa_lightning.rollout.rows import Stops, perturb
from aapa_lightning.types import pad_left

#: Kinds of layers that remember keys and values.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
#: Rows leave once this share of the batch has ended: picking the others out of the cache costs a copy of it.
_LEAVE = 0.25
#: Tokens between looks at which rows have ended; on a GPU a look waits for the device.
_LOOK_EVERY = {"cpu": 1}
_LOOK_EVERY_ELSEWHERE = 8


@dataclass(slots=True)
class Drawn:
    """Responses of ``B`` rows.

    Args:
        ids: int64 ``[B, T]``; beyond a row's length anything.
        logprobs: float32 ``[B, T]`` nats, as sampled (temperature applied, top-p and top-k not); beyond a row's length anything.
        lengths: int64 ``[B]``.
        ended: bool ``[B]``, by an EOS or a stop string.
    """

    ids: Tensor
    logprobs: Tensor
    lengths: Tensor
    ended: Tensor


def can_decode(model: nn.Module) -> bool:
    """Whether ``decode`` knows the model.

    Its state between tokens must be a cache of attention alone, passed as ``past_key_values``, and positions must keep their meaning as
    rows grow.
    """
    inner: Any = causal_model(model)
    odd = set(getattr(text_config(inner), "layer_types", None) or ()) - _ATTENTION
    stateful = odd or getattr(inner, "_is_stateful", False) or getattr(inner.config, "is_encoder_decoder", False)
    return "past_key_values" in inspect.signature(inner.forward).parameters and not stateful and keeps_rotations(inner)


def local(going: bool) -> bool:
    """The ``agree`` of a model that every rank holds whole."""
    return going


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    owners: Sequence[int],
    keys: Tensor,
    params: SamplingParams,
    stops: Stops,
    pad_token_id: int,
    agree: Callable[[bool], bool] = local,
) -> Drawn:
    """Draw a response for every row.

    Args:
        model: a causal language model in eval mode, see ``can_decode``.
        prompts: token ids, at least one each.
        owners: the prompt of each of the ``B`` rows, at least one row.
        keys: int64 ``[B]`` on the model's device, the noise of each row; see ``row_keys``.
        params: how.
        stops: what ends a row.
        pad_token_id: any id.
        agree: from "this rank has a row that goes on" to "some rank has one". Where weights are split over ranks, all of them must run the
            model equally often.
    """
    state = _State(model, prompts, owners, pad_token_id)
    rows = torch.arange(len(owners), device=keys.device)  # of the batch, among all
    ids = torch.full((len(owners), params.max_new_tokens), pad_token_id, dtype=torch.int64, device=keys.device)
    logprobs = torch.zeros(ids.shape, device=keys.device)
    lengths = torch.full_like(rows, params.max_new_tokens)
    ended = torch.zeros_like(rows, dtype=torch.bool)
    look_every = _LOOK_EVERY.get(keys.device.type, _LOOK_EVERY_ELSEWHERE)
    for position in range(params.max_new_tokens):
        _, drawn, drawn_logprobs = perturb(state.logits, keys[rows], position, params)
        ids[rows, position], logprobs[rows, position] = drawn, drawn_logprobs
        done = stops(ids[rows, max(position + 1 - stops.reach, 0) : position + 1]) & ~ended[rows]
        lengths[rows] = torch.where(done, position + 1, lengths[rows])
        ended[rows] |= done
        last = position + 1 == params.max_new_tokens
        if not last and (position + 1) % look_every == 0:
            alive = ~ended[rows]
            count = int(alive.sum())
            last = not agree(count > 0)
            if not last and 0 < count <= (1 - _LEAVE) * len(rows):
                kept = alive.nonzero().squeeze(-1)
                rows, drawn = rows[kept], drawn[kept]
                state.keep(kept)
        if last:
            break
        state.advance(drawn)
    return Drawn(ids, logprobs, lengths.clamp(max=position + 1), ended)


class _State:
    """The model's state before the next token of each row: cache, mask, positions, logits."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], owners: Sequence[int], pad_token_id: int) -> None:
        from transformers import DynamicCache

        inner: Any = causal_model(model)
        device = next(inner.parameters()).device
        ids, mask = (part.to(device) for part in pad_left(prompts, pad_token_id))
        self._model = model
        self._cache: Any = DynamicCache(config=inner.config)
        self._positions = "position_ids" in inspect.signature(inner.forward).parameters
        # without padding no mask is needed, and attention takes its fast paths
        self._mask = None if bool(mask.all()) else mask.long()
        self._next = mask.sum(-1)
        self.logits = self._forward(ids, (mask.long().cumsum(-1) - 1).clamp(min=0))
        self.keep(torch.tensor(list(owners), device=device))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, which may repeat."""
        self._cache.reorder_cache(rows)
        self._mask = None if self._mask is None else self._mask[rows]
        self._next = self._next[rows]
        self.logits = self.logits[rows]

    def advance(self, tokens: Tensor) -> None:
        """Read one more token of every row, int64 ``[B]``."""
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], -1)
        self.logits = self._forward(tokens[:, None], self._next[:, None])
        self._next = self._next + 1

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        options: dict[str, Any] = {"position_ids": positions} if self._positions else {}
        output = self._model(
            input_ids=ids, attention_mask=self._mask, past_key_values=self._cache, use_cache=True, logits_to_keep=1, **options
        )
        logits: Tensor = output.logits[:, -1]
        return logits
