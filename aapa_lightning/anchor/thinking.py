"""Rollouts as if they had begun with their answers: ``aapa_lightning.thinking``'s rule, on tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aapa_lightning.thinking import Thinking
from aapa_lightning.types import Rollouts, SentenceSpans


def answer_start(text: str, prompt_end: str = "") -> int:
    """``Thinking.start`` with the usual tags."""
    return Thinking().start(text, prompt_end)


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


def answer_view(rollouts: Rollouts, thinking: Thinking = Thinking()) -> AnswerView:  # noqa: B008 - frozen, so sharing it is safe
    """Cut the thinking off every response; nothing where ``thinking.score`` says that it is judged too."""
    answers: list[str] = [*thinking.answers(rollouts.texts, rollouts.prompt_ends)]
    starts = [len(text) - len(answer) for text, answer in zip(rollouts.texts, answers, strict=True)]
    offset = torch.tensor(starts, dtype=torch.int64, device=rollouts.token_ends.device).reshape(-1, 1)
    thought = rollouts.response_mask & (rollouts.token_ends <= offset) & (offset > 0)
    ends = torch.where(rollouts.response_mask, (rollouts.token_ends - offset).clamp_min(0), 0)
    return AnswerView(replace(rollouts, texts=answers, token_ends=ends), starts, thought)
