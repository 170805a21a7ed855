"""Log-probs and entropies of tokens from logits: the definition that streaming over the vocabulary is held to."""

from __future__ import annotations

import torch
from torch import Tensor


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
