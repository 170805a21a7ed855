"""Scoring answers without the thinking that precedes them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aapa_lightning.types import Rollouts, SentenceSpans

_OPEN, _CLOSE = "<think>", "</think>"


def answer_start(text: str) -> int:
    """Characters of thinking at the beginning of a response: 0 without any, all of it when the thinking never ends.

    The opening tag may stand in the prompt (some chat templates write it there), so a closing tag alone ends thinking too.
    """
    close = text.find(_CLOSE)
    opens = text.lstrip().startswith(_OPEN)
    if close >= 0 and (opens or _OPEN not in text[:close]):
        return close + len(_CLOSE)
    return len(text) if opens else 0


@dataclass(frozen=True, slots=True)
class AnswerView:
    """Rollouts as if they had begun with their answers.

    Args:
        rollouts: the same tokens; texts without thinking; a thinking token writes no character, so that it belongs to the first sentence.
        starts: where each answer begins in the full text, ``N``.
        thinking: bool ``[N, L]``, the tokens of thinking.
    """

    rollouts: Rollouts
    starts: list[int]
    thinking: Tensor

    def scored(self, spans: SentenceSpans) -> SentenceSpans:
        """Spans of the view with thinking tokens left out of ``token_counts``: they are not scored and carry no weight.

        They stay in the first sentence, which answers for the whole response, and so does the thinking that led to it.
        """
        first = torch.ones_like(spans.response_index, dtype=torch.bool)
        first[1:] = spans.response_index[1:] != spans.response_index[:-1]
        thought = self.thinking.sum(-1)[spans.response_index] * first
        return replace(spans, token_counts=spans.token_counts - thought)

    def in_full_text(self, spans: SentenceSpans) -> SentenceSpans:
        """Spans of the view with character offsets into the full texts; the first sentence begins where the answer does."""
        moved = [[(a + start, b + start) for a, b in row] for row, start in zip(spans.char_spans, self.starts, strict=True)]
        return replace(spans, char_spans=moved)


def answer_view(rollouts: Rollouts) -> AnswerView:
    """Cut the thinking off every response."""
    starts = [answer_start(text) for text in rollouts.texts]
    offset = torch.tensor(starts, dtype=torch.int64, device=rollouts.token_ends.device).reshape(-1, 1)
    thinking = rollouts.response_mask & (rollouts.token_ends <= offset) & (offset > 0)
    texts = [text[start:] for text, start in zip(rollouts.texts, starts, strict=True)]
    ends = torch.where(rollouts.response_mask, (rollouts.token_ends - offset).clamp_min(0), 0)
    return AnswerView(replace(rollouts, texts=texts, token_ends=ends), starts, thinking)
