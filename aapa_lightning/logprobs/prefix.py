"""Prompts that several rows begin with, read once: their keys and values stand before each row's own, gradients included."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from aapa_lightning.logprobs.head import causal_model, head_answers
from aapa_lightning.logprobs.inputs import dropouts, keeps_rotations
from aapa_lightning.logprobs.trial import agree, half_precision
from aapa_lightning.sharding import is_sharded

#: Below so many tokens saved, reading prompts apart costs more than it saves.
LEAST_SAVED = 256
#: Layers that can go on behind keys and values of a prefix: all others remember something else.
_ATTENTION = {"full_attention", "sliding_attention"}

_CAN_SHARE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Prefixes:
    """What a causal language model remembers of ``U`` prefixes, each of which ``group_size`` adjacent rows begin with.

    Args:
        model: see ``can_share``.
        ids: int64 ``[U, P]``, padded on the left.
        mask: bool ``[U, P]``.
        group_size: rows of each prefix.
    """

    def __init__(self, model: nn.Module, ids: Tensor, mask: Tensor, group_size: int) -> None:
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        inner: Any = causal_model(model)
        with head_answers(inner.get_output_embeddings(), lambda original, hidden: hidden):
            output = model(
                input_ids=ids,
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        #: 0, to be added to what is made of the rows: FSDP gathers a layer's weights for the backward pass when a gradient reaches the
        #: layer's output, and keys and values by themselves do not lead there.
        self.link = (output.logits.float() * 0).nan_to_num().sum()
        self.width = ids.shape[1]
        self._layers = [(layer.keys, layer.values) for layer in cache.layers]
        self._group_size = group_size

    def before(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model is called with for what follows the prefixes; it may be called more than once.

        Args:
            inputs: what it would be called with for whole rows: ``input_ids``, ``position_ids`` and ``attention_mask``, ``[N, P + T]``.
        """
        rest = {name: inputs[name][:, self.width :] for name in ("input_ids", "position_ids")}
        return inputs | rest | {"past_key_values": cache_behind(self._layers, self._repeat), "use_cache": True}

    def _repeat(self, states: Tensor) -> Tensor:
        # an expansion, whose gradient is a sum in fixed order
        return states[:, None].expand(-1, self._group_size, -1, -1, -1).flatten(0, 1)


def cache_behind(layers: Sequence[tuple[Tensor, Tensor]], spread: Callable[[Tensor], Tensor]) -> Any:
    """A cache of ``transformers`` in which prefixes stand before the rows of every forward; what a forward adds is not kept.

    Args:
        layers: keys and values of the prefixes, ``[U, heads, P, D]`` each.
        spread: from ``[U, ...]`` to ``[N, ...]``, the prefix of each row.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Prefix(DynamicLayer):
        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values  # by which masks are sized
            self._before = (keys, values)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            keys, values = map(spread, self._before)
            return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)

    cache: Any = DynamicCache()
    cache.layers = [Prefix(*layer) for layer in layers]
    return cache


def sharing_pays(model: nn.Module, prompt_mask: Tensor, group_size: int) -> bool:
    """Whether to read the prompts of ``N`` rows once per group.

    Args:
        model: of any kind.
        prompt_mask: bool ``[N, P]``, of groups of adjacent rows.
        group_size: rows of a group.
    """
    rows, width = prompt_mask.shape
    saved = (rows - rows // group_size) * (width - 1)
    # ranks of a sharded model must answer alike, and their prompts differ
    if group_size == 1 or not (saved >= LEAST_SAVED or is_sharded(model)):
        return False
    # recomputed layers take no cache
    checkpointed = model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return not checkpointed and can_share(model)


def can_share(model: nn.Module) -> bool:
    """Whether rows behind prefixes get the logits that they get in one piece: by the kinds of its layers, then tried on a few tokens, once.

    A model that is recurrent, turns positions by the longest of a call (`dynamic` and `longrope`), attends in both directions, drops units
    at random, has no head, or cannot be called so, answers no.
    """
    inner: Any = causal_model(model)
    if inner not in _CAN_SHARE:
        state = torch.get_rng_state()
        _CAN_SHARE[inner] = _keeps_all_tokens(inner) and not _drops(inner) and _tried(model)
        torch.set_rng_state(state)
    return _CAN_SHARE[inner]


def _keeps_all_tokens(inner: Any) -> bool:
    parameters = inspect.signature(inner.forward).parameters
    kinds = set(getattr(inner.config.get_text_config(decoder=True), "layer_types", None) or _ATTENTION)
    if getattr(inner, "_is_stateful", False):  # values would pass the trial where a state is kept inside, gradients would not
        return False
    zero3 = any(hasattr(p, "ds_id") for p in inner.parameters())
    called = {"past_key_values", "position_ids", "logits_to_keep"} <= parameters.keys()
    return called and kinds <= _ATTENTION and keeps_rotations(inner) and not zero3 and isinstance(inner.get_output_embeddings(), nn.Module)


def _drops(inner: nn.Module) -> bool:
    """Whether units are dropped in training: the same ones of a prompt for all rows of its group, if it were shared."""
    return any(getattr(module, name) > 0 for module, name in dropouts(inner))


@torch.no_grad()
def _tried(model: nn.Module) -> bool:
    # any tokens will do; a row of one kind of token would hide wrong positions
    device = next(model.parameters()).device
    ids = torch.tensor([[0, 1, 2, 3, 4, 2, 1], [0, 1, 2, 3, 1, 4, 0], [0, 0, 4, 3, 1, 4, 0], [0, 0, 4, 3, 2, 2, 1]], device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2:, :2] = False
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions, "use_cache": False}
    turned = torch.cat((ids[:, :3].flip(0), ids[:, 3:]), 1)
    try:
        expected, other = (model(**inputs | {"input_ids": tokens}).logits[:, 4:] for tokens in (ids, turned))
        found = model(**Prefixes(model, ids[::2, :4], mask[::2, :4], 2).before(inputs)).logits
    except Exception:  # code of any model: whatever it raises, prompts are read with every row
        return False
    return agree(found, expected, other, half=half_precision(model, device))
