"""What a causal language model is called with, for rows side by side and for rows behind each other."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aapa_lightning.logprobs.head import causal_model, text_config

#: What tables of learned positions are called.
_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


def keeps_rotations(inner: Any) -> bool:
    """Whether a token's rotary position is its own affair: `dynamic` and `longrope` turn all tokens by the longest position of a call."""
    return rotary_limit(inner) is None


def rotary_limit(inner: Any) -> int | None:
    """Length up to which rows keep their rotary positions whatever stands beside them, where these change with length; else None.

    Beyond it `dynamic` turns all tokens of a call by the length of the longest row, and `longrope` by its long factors.
    """
    config = text_config(inner)
    whole = getattr(config, "max_position_embeddings", None)
    original = getattr(config, "original_max_position_embeddings", None) or whole

    def limits(node: Any) -> Iterator[int | None]:
        if not isinstance(node, Mapping):
            return
        kind = str(node.get("rope_type", node.get("type")))
        if "dynamic" in kind:
            yield whole
        elif kind in ("longrope", "su"):
            yield node.get("original_max_position_embeddings", original)
        for value in node.values():
            yield from limits(value)

    found = [limit or 0 for name in ("rope_parameters", "rope_scaling") for limit in limits(getattr(config, name, None))]
    return min(found, default=None)


def forget_lengths(inner: nn.Module) -> None:
    """Let `dynamic` rotary positions be computed anew at the next call: transformers keeps those of the longest row that it has seen."""
    for module in inner.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, 0)


def learned_positions(inner: nn.Module) -> int | None:
    """How many positions a model has learned, beyond which it cannot read; None where positions are computed."""
    tables = [module for name, module in inner.named_modules() if name.endswith(_POSITIONS) and isinstance(module, nn.Embedding)]
    return min((table.num_embeddings - int(getattr(table, "offset", 0)) for table in tables), default=None)


def dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where a model keeps dropout probabilities: modules, and the attributes that hold one, such as ``p`` or ``attention_dropout``."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            yield module, "p"
        numbers = [name for name, value in vars(module).items() if isinstance(value, float)]
        yield from ((module, name) for name in numbers if name.endswith(("dropout", "layerdrop")))


def padded_inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int | None = None) -> dict[str, Any]:
    """What a model is called with for rows side by side.

    Args:
        model: a causal language model, wrapped or not.
        input_ids: int64 ``[N, T]``.
        attention_mask: bool ``[N, T]``.
        keep: logits of the last ``keep`` positions only.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "use_cache": False}
    # Models without absolute or rotary positions (ALiBi, state space) have no such argument.
    if "position_ids" in inspect.signature(causal_model(model).forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return inputs if keep is None else inputs | {"logits_to_keep": keep}


def packed_inputs(inner: Any, input_ids: Tensor, position_ids: Tensor, lengths: Sequence[int]) -> dict[str, Any]:
    """What a model is called with for rows behind each other. No mask: it follows from the positions.

    Args:
        inner: the causal language model itself.
        input_ids: int64 ``[B, S]``.
        position_ids: int64 ``[B, S]``, 0 at the first token of every row.
        lengths: of the rows, in order.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
    kinds = [parameter.kind for parameter in inspect.signature(inner.forward).parameters.values()]
    if uses_flash(inner) and inspect.Parameter.VAR_KEYWORD in kinds:
        # Said once; else every layer reads the bounds of the rows off the positions, and waits for the device.
        ends = torch.tensor([0, *lengths], device=input_ids.device).cumsum(0, dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    return inputs


def uses_flash(inner: Any) -> bool:
    """Whether a model computes with a flash attention, whose variable-length kernels take one long row."""
    return "flash" in str(getattr(text_config(inner), "_attn_implementation", None))
