"""Forward passes of a frozen encoder: rows of like length together, a prompt that many rows share read once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from aapa_lightning.anchor.context import ContextRow, Encoding
from aapa_lightning.anchor.depth import ShallowModel
from aapa_lightning.anchor.prefix import Prefixes, can_share
from aapa_lightning.logprobs import token_logprobs
from aapa_lightning.logprobs.padding import pads_right
from aapa_lightning.types import pad_right

#: Tokens of a forward pass on a CPU: more leave its caches, and every operation waits for memory.
_CPU_TOKENS = 1024


@dataclass(slots=True)
class Encoded:
    """Hidden states of some rows.

    Args:
        rows: their numbers, ``B``.
        skipped: tokens at the beginning of each row that have no hidden states here, ``B``; they belong to no sentence.
        hidden: ``[B, L, D]`` in the encoder's type; what stands after the end of a row means nothing.
    """

    rows: list[int]
    skipped: list[int]
    hidden: Tensor


class RowEncoder:
    """Runs rows of tokens through a model.

    Args:
        model: in eval mode, without gradients.
        encoding: layers, likelihood and ``batch_tokens`` are read.
        pad_id: of the tokenizer.
        causal: whether a token's hidden states depend on nothing after it.
    """

    def __init__(self, model: Any, encoding: Encoding, pad_id: int, *, causal: bool) -> None:
        self.model, self.encoding, self.pad_id, self.causal = model, encoding, pad_id, causal

    @torch.no_grad()
    def __call__(self, rows: Sequence[ContextRow], chosen: Iterable[int]) -> Iterator[Encoded]:
        """Encode the chosen rows, in batches of like length.

        Args:
            rows: all rows.
            chosen: which of them.
        """
        chosen = list(chosen)
        heads = {i: tuple(rows[i].ids[: max(rows[i].head - self.encoding.likelihood, 0)]) for i in chosen}
        if not self._pays(heads, sum(len(rows[i].ids) for i in chosen)):
            lengths = {i: len(rows[i].ids) for i in chosen}
            for batch in _batches(chosen, lengths, self._limit, apart=len(set(lengths.values())) > 1 and not self._pads):
                yield self._encode(rows, batch, None, {})
            return
        users: dict[tuple[int, ...], list[int]] = {}
        for i, head in heads.items():
            users.setdefault(head, []).append(i)
        unique = list(users)
        for part in _batches(range(len(unique)), [len(head) for head in unique], self.encoding.batch_tokens):
            yield from self._after(rows, [unique[k] for k in part], [users[unique[k]] for k in part])

    def _pays(self, heads: dict[int, tuple[int, ...]], tokens: int) -> bool:
        """Whether sharing saves at least half of what stands before the responses, and a twentieth of all ``tokens``."""
        if not self.causal or not heads or not min(map(len, heads.values())):
            return False
        total, unique = sum(map(len, heads.values())), sum(map(len, set(heads.values())))
        return 2 * unique <= total and 20 * (total - unique) >= tokens and self._can_share

    @cached_property
    def _can_share(self) -> bool:
        return can_share(self.model)

    @cached_property
    def _pads(self) -> bool:
        def read(ids: Tensor, mask: Tensor) -> Tensor:
            options = {"use_cache": False} if self.causal else {}
            return self._hidden({"input_ids": ids, "attention_mask": mask.long(), **options})

        return pads_right(self.model, read, self.model.device)

    @cached_property
    def _shallow(self) -> ShallowModel | None:
        shallow = None if self.encoding.likelihood else ShallowModel(self.model, self.encoding.layers)
        return shallow if shallow is not None and shallow.works() else None

    @property
    def _limit(self) -> int:
        return min(self.encoding.batch_tokens, _CPU_TOKENS) if self.model.device.type == "cpu" else self.encoding.batch_tokens

    def _after(self, rows: Sequence[ContextRow], heads: Sequence[tuple[int, ...]], users: Sequence[list[int]]) -> Iterator[Encoded]:
        """Rows after their heads."""
        prefixes = Prefixes(self.model, heads)
        prefix_of = {i: k for k, group in enumerate(users) for i in group}
        lengths = {i: len(rows[i].ids) - len(heads[k]) for i, k in prefix_of.items()}
        # what stands before the rows takes memory too, if no time
        most = max(self.encoding.batch_tokens // max(map(len, heads)), 1)
        for batch in _batches(list(prefix_of), lengths, self._limit, most):
            yield self._encode(rows, batch, prefixes, {i: (prefix_of[i], len(heads[prefix_of[i]])) for i in batch})

    def _encode(
        self, rows: Sequence[ContextRow], batch: list[int], prefixes: Prefixes | None, places: dict[int, tuple[int, int]]
    ) -> Encoded:
        device = self.model.device
        skipped = [places[i][1] if places else 0 for i in batch]
        tails = [rows[i].ids[start:] for i, start in zip(batch, skipped, strict=True)]
        inputs: dict[str, Any] = {"input_ids": pad_right(tails, self.pad_id).to(device)}
        lengths = torch.tensor([len(tail) for tail in tails])
        mask = (torch.arange(inputs["input_ids"].shape[1]) < lengths[:, None]).long().to(device)
        if prefixes is not None:
            inputs |= prefixes.inputs([places[i][0] for i in batch], mask)
        else:
            inputs["attention_mask"] = mask
            if self.causal:
                inputs["use_cache"] = False
        if getattr(self.model.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = pad_right([rows[i].types[start:] for i, start in zip(batch, skipped, strict=True)], 0).to(device)
        return Encoded(batch, skipped, self._hidden(inputs))

    def _hidden(self, inputs: dict[str, Any]) -> Tensor:
        if self.encoding.layers == (-1,) and not self.encoding.likelihood:
            hidden: Tensor = self.model(**inputs).last_hidden_state
            return hidden
        if self._shallow is not None:
            return torch.cat(self._shallow(**inputs), -1)
        outputs = self.model(**inputs, output_hidden_states=True)
        parts = [outputs.hidden_states[layer] for layer in self.encoding.layers]
        if self.encoding.likelihood:
            parts = [part.float() for part in parts] + [_likelihood(outputs.logits, inputs["input_ids"])]
        return torch.cat(parts, -1)


def _likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-prob of each token, and that plus the entropy, float32 ``[B, L, 2]``; 0 for the first, which nothing predicts."""
    logprobs, entropy = token_logprobs(logits[:, :-1], ids[:, 1:], entropy=True)
    columns = torch.stack([logprobs, logprobs + (0.0 if entropy is None else entropy)], -1)
    return torch.nn.functional.pad(columns, (0, 0, 1, 0))


def _batches(
    chosen: Iterable[int], lengths: Sequence[int] | dict[int, int], batch_tokens: int, most: int | None = None, *, apart: bool = False
) -> Iterator[list[int]]:
    """Rows of similar length (``apart``: of one length) together, at most ``most``; at least one row a batch."""
    batch: list[int] = []
    for i in sorted(chosen, key=lambda i: lengths[i]):
        full = lengths[i] * (len(batch) + 1) > batch_tokens or len(batch) == most
        if batch and (full or (apart and lengths[i] != lengths[batch[0]])):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
