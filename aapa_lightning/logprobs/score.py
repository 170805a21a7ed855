"""Log-probs of responses and demonstrations: how a model is called, and where its log-probs come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aapa_lightning.logprobs.head import HeadScorer, causal_model, seen, streaming_backend, vocabulary
from aapa_lightning.logprobs.inputs import padded_inputs
from aapa_lightning.logprobs.packing import pack
from aapa_lightning.logprobs.padding import Side, rows_apart, sees_padding
from aapa_lightning.logprobs.prefix import Prefixes, sharing_pays
from aapa_lightning.logprobs.steady import steadily
from aapa_lightning.logprobs.tokens import token_logprobs

#: Size of a vocabulary that a model does not tell.
_SMALL = 32


@dataclass(frozen=True, slots=True)
class _How:
    """How log-probs are computed: arguments of ``response_logprobs``."""

    temperature: float = 1.0
    backend: str | None = None
    entropy: bool = False
    entropy_grad: bool = False

    def of(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """From logits, see ``token_logprobs``."""
        return token_logprobs(logits, ids, self.temperature, entropy=self.entropy, entropy_grad=self.entropy_grad)


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore_rng_state(state: tuple[Tensor, Tensor | None] | None, device: torch.device) -> None:
    if state is not None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)


def apart(model: nn.Module, attention_mask: Tensor, sides: tuple[Side, ...]) -> list[Tensor] | None:
    """Which rows of a causal language model may be scored together, see ``rows_apart``; tried at the first call with padding.

    Raises:
        ConfigError: see ``rows_apart``.
    """
    device, inner = attention_mask.device, causal_model(model)
    size = vocabulary(inner) or _SMALL

    def read(ids: Tensor, mask: Tensor) -> Tensor:
        # called as for scores, but not through DDP: its forward sends buffers to other ranks, which may have nothing to try
        logits: Tensor = inner(**padded_inputs(inner, ids, mask, ids.shape[1])).logits
        return logits

    return rows_apart(model, attention_mask, sides, lambda side: sees_padding(model, read, size, device, side))


def _score_apart(
    groups: list[Tensor],
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    wanted: Tensor,
    how: _How,
) -> tuple[Tensor, Tensor | None]:
    """Like ``_score_last``, of rows of one length at a time, without padding."""
    width = wanted.shape[1]
    mask, full = attention_mask.bool(), nn.functional.pad(wanted, (input_ids.shape[1] - width, 0))
    parts: list[tuple[Tensor, Tensor | None]] = []
    for rows in groups:
        own, lengths = mask[rows], mask[rows].sum(1)
        if int(lengths.max()) != int(lengths.min()):  # short rows of rotary positions that change with length
            parts.append(_score_last(model, input_ids[rows], own, wanted[rows], how))
            continue
        shape = (len(rows), int(lengths[0]))
        ids, scored = (value[rows][own].view(shape) for value in (input_ids, full))
        if not scored.any() and (parts or not shape[1]):  # the first group keeps a graph, whatever is wanted of it
            blank = torch.zeros(len(rows), width, device=input_ids.device)
            parts.append((blank, blank if how.entropy else None))
            continue
        found = _score_last(model, ids, torch.ones_like(scored), scored[:, 1:], how)
        parts.append((_back(found[0], own, width), None if found[1] is None else _back(found[1], own, width)))
    order = torch.cat(groups).argsort()
    entropies = [part for _, part in parts if part is not None]
    return torch.cat([part for part, _ in parts])[order], torch.cat(entropies)[order] if entropies else None


def _back(values: Tensor, own: Tensor, width: int) -> Tensor:
    """Values ``[n, length - 1]`` of all tokens of rows but the first, in the last ``width`` columns of the batch; 0 elsewhere."""
    flat = nn.functional.pad(values, (1, 0)).reshape(-1)
    return values.new_zeros(own.shape).masked_scatter(own, flat)[:, own.shape[1] - width :]


def _score_last(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    wanted: Tensor,
    how: _How,
    prefixes: Prefixes | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropies ``[N, K]`` of the last K tokens of each row, of those in ``wanted``; others have any finite value."""
    packed = pack(model, input_ids, attention_mask, wanted) if prefixes is None else None
    if packed is None:
        keep = wanted.shape[1] + 1
        ids = input_ids[:, input_ids.shape[1] - wanted.shape[1] :]
        inputs = padded_inputs(model, input_ids, attention_mask, keep)
        inputs = inputs if prefixes is None else prefixes.before(inputs)
        return _streamed(model, inputs, ids, wanted, how) or how.of(model(**inputs).logits[:, -keep:-1], ids)
    found = _streamed(model, packed.inputs, packed.ids, packed.wanted, how)
    if found is None:
        logprobs, entropies = how.of(packed.logits(model), packed.pick(packed.ids))
    else:
        logprobs, entropies = packed.pick(found[0]), None if found[1] is None else packed.pick(found[1])
    return packed.spread(logprobs), None if entropies is None else packed.spread(entropies)


def _score(
    groups: list[Tensor] | None, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, wanted: Tensor, how: _How
) -> tuple[Tensor, Tensor | None]:
    """``_score_last`` of rows as they are, or of groups that are read apart."""
    if groups is None:
        return _score_last(model, input_ids, attention_mask, wanted, how)
    return _score_apart(groups, model, input_ids, attention_mask, wanted, how)


def _streamed(
    model: nn.Module,
    inputs: dict[str, Any],
    ids: Tensor,
    wanted: Tensor,
    how: _How,
) -> tuple[Tensor, Tensor | None] | None:
    """Log-probs and entropies ``[N, K]`` from the model's head, or None where they have to come from its logits."""
    chosen = streaming_backend(model, how.backend)
    before = _rng_state(ids.device) if chosen and not seen(model) else None
    while chosen:
        scorer = HeadScorer(causal_model(model), chosen, ids, wanted, how.temperature, how.entropy, how.entropy_grad)
        with scorer.in_place():
            output = model(**inputs).logits
        scores = scorer.read(output)
        if scores is not None:
            entropies = scores[..., 1] if how.entropy else None
            return scores[..., 0], entropies if entropies is None or how.entropy_grad else entropies.detach()
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
    how, prompts = _How(temperature, backend, entropy, entropy_grad), (prompt_ids, prompt_mask)
    input_ids, attention_mask = torch.cat((prompt_ids, response_ids), dim=1), torch.cat((prompt_mask, response_mask), dim=1)
    groups = apart(model, attention_mask, ("left", "right"))

    def score() -> tuple[Tensor, Tensor | None]:
        if groups is None and sharing_pays(model, prompt_mask, group_size):
            return _score_behind_prompts(model, *prompts, response_ids, response_mask, group_size, how)
        return _score(groups, model, input_ids, attention_mask, response_mask.bool(), how)

    logprobs, entropies = steadily(model, score, response_ids.device)
    off = ~response_mask
    return logprobs.masked_fill(off, 0.0), None if entropies is None else entropies.masked_fill(off, 0.0)


def _score_behind_prompts(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    response_ids: Tensor,
    response_mask: Tensor,
    group_size: int,
    how: _How,
) -> tuple[Tensor, Tensor | None]:
    """Like ``_score_last``, of responses whose prompts are read once a group."""
    if prompt_mask.shape[1] == 1:  # of a sharded model's rank: others share
        prompt_ids, prompt_mask = (nn.functional.pad(part, (1, 0)) for part in (prompt_ids, prompt_mask))
    input_ids, attention_mask = torch.cat((prompt_ids, response_ids), dim=1), torch.cat((prompt_mask, response_mask), dim=1)
    # the last prompt token stands with the responses: its logits are those of their first tokens
    prefixes = Prefixes(model, prompt_ids[::group_size, :-1], prompt_mask[::group_size, :-1], group_size)
    logprobs, entropies = _score_last(model, input_ids, attention_mask, response_mask.bool(), how, prefixes)
    return logprobs + prefixes.link, entropies


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
    groups = apart(model, attention_mask, ("right",))
    how = _How(backend=backend)
    logprobs, _ = steadily(model, lambda: _score(groups, model, input_ids, attention_mask, last, how), input_ids.device)
    return nn.functional.pad(logprobs, (width - count, 0)).masked_fill(~wanted, 0.0)
