"""Log-probs of responses and demonstrations: how a model is called, and where its log-probs come from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aapa_lightning.logprobs.head import HeadScorer, causal_model, seen, streaming_backend
from aapa_lightning.logprobs.inputs import padded_inputs
from aapa_lightning.logprobs.packing import pack
from aapa_lightning.logprobs.prefix import Prefixes, sharing_pays
from aapa_lightning.logprobs.tokens import token_logprobs


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore_rng_state(state: tuple[Tensor, Tensor | None] | None, device: torch.device) -> None:
    if state is not None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)


def _score_last(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    wanted: Tensor,
    temperature: float,
    backend: str | None,
    prefixes: Prefixes | None = None,
    **options: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies ``[N, K]`` of the last K tokens of each row, of those in ``wanted``; others have any finite value."""
    packed = pack(model, input_ids, attention_mask, wanted) if prefixes is None else None
    if packed is None:
        keep = wanted.shape[1] + 1
        ids = input_ids[:, input_ids.shape[1] - wanted.shape[1] :]
        inputs = padded_inputs(model, input_ids, attention_mask, keep)
        inputs = inputs if prefixes is None else prefixes.before(inputs)
        streamed = _streamed(model, inputs, ids, wanted, temperature, backend, options)
        return streamed or token_logprobs(model(**inputs).logits[:, -keep:-1], ids, temperature, **options)
    found = _streamed(model, packed.inputs, packed.ids, packed.wanted, temperature, backend, options)
    if found is None:
        logprobs, entropies = token_logprobs(packed.logits(model), packed.pick(packed.ids), temperature, **options)
    else:
        logprobs, entropies = packed.pick(found[0]), None if found[1] is None else packed.pick(found[1])
    return packed.spread(logprobs), None if entropies is None else packed.spread(entropies)


def _streamed(
    model: nn.Module,
    inputs: dict[str, Any],
    ids: Tensor,
    wanted: Tensor,
    temperature: float,
    backend: str | None,
    options: dict[str, bool],
) -> tuple[Tensor, Tensor | None] | None:
    """Log-probs and entropies ``[N, K]`` from the model's head, or None where they have to come from its logits."""
    chosen = streaming_backend(model, backend)
    before = _rng_state(ids.device) if chosen and not seen(model) else None
    while chosen:
        scorer = HeadScorer(causal_model(model), chosen, ids, wanted, temperature, options["entropy"], options["entropy_grad"])
        with scorer.in_place():
            output = model(**inputs).logits
        scores = scorer.read(output)
        if scores is not None:
            entropies = scores[..., 1] if options["entropy"] else None
            return scores[..., 0], entropies if entropies is None or options["entropy_grad"] else entropies.detach()
        # The first call to a model has shown what it does to its logits: run once more, with the same dropout.
        _restore_rng_state(before, ids.device)
        chosen = None if scorer.problem else chosen
    return None


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
    backend: str | None = None,
    group_size: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of sampled responses. Logits exist for response positions alone, or not at all, and padding changes no value.

    Backends: ``full`` makes logits ``[N, L, V]``. ``chunked`` lets the model's head answer with log-probs, streamed over tiles of tokens x
    vocabulary: no logits in memory, and no work on padding. ``liger`` does the same by liger-kernel's function (experimental, for CUDA).
    ``auto`` is ``chunked`` for vocabularies from 16,384 on, else ``full``. The head is intercepted inside the model's own forward, where
    DDP, FSDP2 and autocast have prepared its weight; what the model does to its logits afterwards (a scale, a soft cap) is seen
    on the first call and applied inside. A head with adapters or of another kind makes its logits a few tokens at a time. Where a head
    cannot be used at all, one warning says why and full logits are made.

    Args:
        model: any Hugging Face causal language model, adapters included.
        prompt_ids: int64 ``[N, P]``, padded on the left, at least one token a row.
        prompt_mask: bool ``[N, P]``.
        response_ids: int64 ``[N, L]``, padded on the right.
        response_mask: bool ``[N, L]``.
        temperature: of softmax(logits / temperature); 0 is treated as 1.
        entropy: also return entropies of the next-token distributions.
        entropy_grad: entropies carry a gradient.
        backend: ``auto``, ``full``, ``chunked`` or ``liger``; None takes what ``set_logprob_backend`` chose for the model, else ``auto``.
        group_size: rows come in groups of so many adjacent ones with one prompt, which is read once, where the model allows it
            (``prefix.can_share``) and enough is saved.

    Returns:
        Log-probs ``[N, L]`` and entropies ``[N, L]`` or None, nats, float32, 0 on padding.
    """
    input_ids = torch.cat((prompt_ids, response_ids), dim=1)
    attention_mask = torch.cat((prompt_mask, response_mask), dim=1)
    prefixes = None
    if sharing_pays(model, prompt_mask, group_size):
        if prompt_mask.shape[1] == 1:  # of a sharded model's rank: others share
            prompt_ids, prompt_mask = (nn.functional.pad(part, (1, 0)) for part in (prompt_ids, prompt_mask))
            input_ids, attention_mask = (nn.functional.pad(part, (1, 0)) for part in (input_ids, attention_mask))
        # the last prompt token stands with the responses: its logits are those of their first tokens
        prefixes = Prefixes(model, prompt_ids[::group_size, :-1], prompt_mask[::group_size, :-1], group_size)
    parts = (model, input_ids, attention_mask, response_mask.bool(), temperature, backend, prefixes)
    logprobs, entropies = _score_last(*parts, entropy=entropy, entropy_grad=entropy_grad)
    off = ~response_mask
    logprobs = logprobs if prefixes is None else logprobs + prefixes.link
    return logprobs.masked_fill(off, 0.0), None if entropies is None else entropies.masked_fill(off, 0.0)


def sequence_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Log-probs of every token but the first, at temperature 1, for demonstrations.

    Args:
        model: any Hugging Face causal language model.
        input_ids: int64 ``[N, T]``, padded on the right, T at least 2.
        attention_mask: bool ``[N, T]``.
        response_mask: bool ``[N, T]``, tokens of interest. Logits exist only from the first of them (over all rows) on.
        backend: as for ``response_logprobs``.

    Returns:
        float32 ``[N, T - 1]`` nats; column t belongs to token t + 1. 0 on padding, and outside ``response_mask`` where given.
    """
    wanted = (attention_mask if response_mask is None else response_mask & attention_mask).bool()[:, 1:]
    width = wanted.shape[1]
    columns = wanted.any(0).nonzero()
    # At least one column stays, so that a batch without tokens still has a graph.
    count = width - int(columns[0]) if len(columns) else 1
    last = wanted[:, width - count :]
    logprobs, _ = _score_last(model, input_ids, attention_mask, last, 1.0, backend, entropy=False, entropy_grad=False)
    return nn.functional.pad(logprobs, (width - count, 0)).masked_fill(~wanted, 0.0)
