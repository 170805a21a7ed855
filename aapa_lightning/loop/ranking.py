"""Pairs for a reward model: the text it reads, its tokens, and one forward over chosen and rejected responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aapa_lightning.anchor.polar import answer_of
from aapa_lightning.anchor.reference_text import template_text
from aapa_lightning.data.control_tokens import encode
from aapa_lightning.data.records import take
from aapa_lightning.errors import ConfigError, DataError, choose
from aapa_lightning.logprobs.head import causal_model, text_config
from aapa_lightning.logprobs.padding import rows_apart, sees_padding
from aapa_lightning.logprobs.steady import steadily
from aapa_lightning.loop.classifier import padding_id
from aapa_lightning.types import Record, pad_right

#: What happens to a pair of which something would be cut.
OVERLONG = {"truncate": "cut it", "drop": "leave it out", "error": "stop"}


@dataclass(frozen=True, slots=True)
class RankingPair:
    """A record's two responses as a reward model reads them.

    Args:
        chosen: token ids.
        rejected: token ids.
    """

    chosen: list[int]
    rejected: list[int]


class PairEncoder:
    """Makes a reward model's input exactly as ``RewardModelDiscriminator`` makes it, so that training and scoring see the same tokens.

    Thinking and white space around a response are cut off. A response loses its end beyond ``max_response_tokens``, the prompt its
    beginning beyond what is left of ``max_tokens``.

    Args:
        tokenizer: the reward model's.
        template: text with ``{response}``, and ``{prompt}`` where wanted.
        max_tokens: limit of the whole.
        max_response_tokens: limit of a response.

    Raises:
        ConfigError: a template without ``{response}`` or with ``{reference}``.
    """

    def __init__(self, tokenizer: Any, template: str, max_tokens: int, max_response_tokens: int) -> None:
        if "{response}" not in template or "{reference}" in template:
            raise ConfigError(
                "template: expected {response}, {prompt} where wanted and no {reference} (pairs are compared with each other), found "
                f"{template!r}"
            )
        self.tokenizer, self.template = tokenizer, template
        self.limits = {"max_tokens": max_tokens, "max_response_tokens": max_response_tokens}

    def text(self, record: Record, response: str, *, whole: bool = False) -> str:
        """The input, marked (``aapa_lightning.data.control_tokens``); ``whole`` cuts nothing."""
        limits = dict.fromkeys(self.limits, 2**31) if whole else self.limits
        return template_text(self.template, record.prompt, "", answer_of(response), self.tokenizer, **limits)

    def encode(self, record: Record) -> RankingPair:
        """Tokens of a record with both responses. Raises DataError for an input of no tokens."""
        chosen, rejected = (self._ids(record, response) for response in (record.chosen, record.rejected))
        return RankingPair(chosen, rejected)

    def _ids(self, record: Record, response: str | None) -> list[int]:
        text = self.text(record, response or "")
        ids = encode(self.tokenizer, text, add_special_tokens=True).ids
        if not ids:
            raise DataError(f"{record.source}: the reward model's input has no tokens; expected text around {{response}} in the template")
        return ids

    def select(self, records: Sequence[Record], overlong: str) -> Sequence[Record]:
        """Records as ``overlong`` has them: all (``truncate``), those that fit (``drop``), or a DataError for one that does not.

        Pairs whose responses are the same once thinking and overlong ends are cut are left out.
        """
        choose(OVERLONG, overlong, "overlong")
        kept = [i for i, record in enumerate(records) if overlong == "truncate" or self._fits(record)]
        if len(kept) == len(records):
            return self._distinct(records)
        if overlong == "drop" and kept:
            return self._distinct(take(records, kept))
        first = records[min(set(range(len(records))) - set(kept))]
        raise DataError(
            f"{first.source}: the pair has more than max_tokens={self.limits['max_tokens']} tokens, or a response more than "
            f"max_response_tokens={self.limits['max_response_tokens']} ({len(records) - len(kept)} of {len(records)} pairs do); raise the "
            "limits, or set overlong to truncate" + (" or drop" if kept else "")
        )

    def _distinct(self, records: Sequence[Record]) -> Sequence[Record]:
        # encodes each once, so what cannot be encoded is found before training
        kept = [i for i, pair in enumerate(map(self.encode, records)) if pair.chosen != pair.rejected]
        if not kept:
            raise DataError(
                f"{records[0].source}: once thinking and overlong ends are cut, both responses of every pair are the same; raise "
                "max_response_tokens, or give other pairs"
            )
        return records if len(kept) == len(records) else take(records, kept)

    def _fits(self, record: Record) -> bool:
        return all(self.text(record, text or "") == self.text(record, text or "", whole=True) for text in (record.chosen, record.rejected))


def pair_scores(model: nn.Module, tokenizer: Any, pairs: Sequence[RankingPair], device: torch.device) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected responses, float32 ``[B]`` each, in one forward where the model may be padded."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    pad = padding_id(tokenizer)
    ids, mask = (part.to(device) for part in (pad_right(rows, pad), pad_right([[1] * len(row) for row in rows], 0)))

    def read(ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, attention_mask=mask.long()).logits
        return logits

    size = int(getattr(text_config(causal_model(model)), "vocab_size", 0) or len(tokenizer))
    groups = rows_apart(model, mask.bool(), ("right",), lambda side: sees_padding(model, read, size, device, side, pad))

    def score() -> Tensor:
        if groups is None:
            return read(ids, mask).squeeze(-1).float()
        parts = [read(ids[part, : int(mask[part].sum(1).max())], mask[part, : int(mask[part].sum(1).max())]) for part in groups]
        return torch.cat(parts).squeeze(-1).float()[torch.cat(groups).argsort()]

    scores = steadily(model, score, device)
    return scores[: len(pairs)], scores[len(pairs) :]
