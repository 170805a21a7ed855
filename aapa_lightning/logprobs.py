"""Log-probabilities and entropies of tokens under a causal language model."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def token_logprobs(
    logits: Tensor, ids: Tensor, temperature: float = 1.0, *, entropy: bool = False, entropy_grad: bool = True
) -> tuple[Tensor, Tensor | None]:
    r"""Log-probs of tokens, and the entropy of the distributions they came from, at softmax(logits / temperature).

    Args:
        logits: ``[..., V]``, any floating dtype; computed in float32 (float64 stays).
        ids: int64 ``[...]``.
        temperature: positive; 0 (greedy decoding) is treated as 1.
        entropy: also return entropies.
        entropy_grad: entropies carry a gradient; false saves two vocabulary-sized buffers where they are only logged.

    Returns:
        Log-probs ``[...]`` and entropies ``[...]`` or None, nats, float32.

    >>> token_logprobs(torch.zeros(1, 4), torch.tensor([2]), entropy=True)
    (tensor([-1.3863]), tensor([1.3863]))
    """
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature not in (0.0, 1.0):
        scaled = scaled / temperature
    normaliser = scaled.logsumexp(-1)
    logprobs = scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - normaliser
    if not entropy:
        return logprobs, None
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        return logprobs, _entropy(scaled, normaliser)


def _entropy(logits: Tensor, normaliser: Tensor) -> Tensor:
    # A forbidden token (-inf) has probability 0 and contributes 0; the finite floor keeps 0 * log 0 and its gradient from being NaN.
    all_logprobs = (logits - normaliser.unsqueeze(-1)).clamp(min=torch.finfo(logits.dtype).min)
    return -(all_logprobs.exp() * all_logprobs).sum(-1)


def _takes_position_ids(model: nn.Module) -> bool:
    # Models without absolute or rotary positions (ALiBi, state space) have no such argument; adapters, DDP, Fabric and torch.compile hide
    # their model's signature behind one of their own.
    inner: Any = model
    for name in ("_forward_module", "module", "_orig_mod"):
        inner = getattr(inner, name, inner)
    base = getattr(inner, "get_base_model", None)
    return "position_ids" in inspect.signature((inner if base is None else base()).forward).parameters


def _last_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
    options: dict[str, Any] = {}
    if _takes_position_ids(model):
        options["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    logits: Tensor = model(
        input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False, logits_to_keep=keep, **options
    ).logits
    return logits[:, -keep:-1]


def response_logprobs(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    response_ids: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
    *,
    entropy: bool = False,
    entropy_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of sampled responses. Logits exist for response positions alone, and padding changes no value.

    Args:
        model: any Hugging Face causal language model, adapters included.
        prompt_ids: int64 ``[N, P]``, padded on the left, at least one token a row.
        prompt_mask: bool ``[N, P]``.
        response_ids: int64 ``[N, L]``, padded on the right.
        response_mask: bool ``[N, L]``.
        temperature: of softmax(logits / temperature); 0 is treated as 1.
        entropy: also return entropies of the next-token distributions.
        entropy_grad: entropies carry a gradient.

    Returns:
        Log-probs ``[N, L]`` and entropies ``[N, L]`` or None, nats, float32, 0 on padding.
    """
    input_ids = torch.cat((prompt_ids, response_ids), dim=1)
    attention_mask = torch.cat((prompt_mask, response_mask), dim=1)
    logits = _last_logits(model, input_ids, attention_mask, response_ids.shape[1] + 1)
    logprobs, entropies = token_logprobs(logits, response_ids, temperature, entropy=entropy, entropy_grad=entropy_grad)
    off = ~response_mask
    return logprobs.masked_fill(off, 0.0), None if entropies is None else entropies.masked_fill(off, 0.0)


def sequence_logprobs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor | None = None) -> Tensor:
    """Log-probs of every token but the first, at temperature 1, for demonstrations.

    Args:
        model: any Hugging Face causal language model.
        input_ids: int64 ``[N, T]``, padded on the right, T at least 2.
        attention_mask: bool ``[N, T]``.
        response_mask: bool ``[N, T]``, tokens of interest. Logits exist only from the first of them (over all rows) on.

    Returns:
        float32 ``[N, T - 1]`` nats; column t belongs to token t + 1. 0 on padding, and outside ``response_mask`` where given.
    """
    wanted = (attention_mask if response_mask is None else response_mask & attention_mask).bool()[:, 1:]
    width = wanted.shape[1]
    columns = wanted.any(0).nonzero()
    # At least one column stays, so that a batch without tokens still has a graph.
    count = width - int(columns[0]) if len(columns) else 1
    logits = _last_logits(model, input_ids, attention_mask, count + 1)
    logprobs, _ = token_logprobs(logits, input_ids[:, -count:])
    return nn.functional.pad(logprobs, (width - count, 0)).masked_fill(~wanted, 0.0)
