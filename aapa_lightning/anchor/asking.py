"""Asking a discriminator, which may be of the user's own: what it answers is looked at before anything is made of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aapa_lightning.anchor.base import Discriminator
from aapa_lightning.errors import DataError
from aapa_lightning.types import Record, SentenceSpans
from aapa_lightning.users_code import culprit, label, users_code

Score = Callable[[Sequence[str], Sequence[Record], SentenceSpans], Tensor]


def ask(
    discriminator: Discriminator,
    responses: Sequence[str],
    records: Sequence[Record],
    spans: SentenceSpans,
    *,
    score: Score | None = None,
    labels: Sequence[str] | None = None,
) -> Tensor:
    """Logits of ``N`` responses' sentences, float32 ``[S]``, all finite, on the discriminator's device.

    Args:
        discriminator: the judge.
        responses: ``N`` texts.
        records: their records.
        spans: their sentences.
        score: which of its methods; ``score`` by default.
        labels: ``N`` names for messages; the records' by default.

    Raises:
        DataError: it raised, or answered anything but ``S`` finite numbers; names the discriminator, the record and the response.
    """
    score = score or discriminator.score
    name = f"discriminator {type(discriminator).__name__}"
    labels = labels or [label(record) for record in records]

    def where() -> str:
        return culprit(lambda i: score([responses[i]], [records[i]], _alone(spans, i)), responses, labels)

    with users_code(name, where, owner=discriminator):
        logits = score(responses, records, spans)
    sentences = len(spans.response_index)
    if not isinstance(logits, Tensor) or logits.is_complex() or logits.shape != (sentences,):
        found = f"shape {tuple(logits.shape)} of {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(
            f"{name} must return one number per sentence, a float32 tensor of shape ({sentences},) for these {len(responses)} responses; "
            f"found {found} (first record {labels[0] if labels else 'none'})"
        )
    logits = logits.to(torch.float32)
    bad = ~torch.isfinite(logits)
    if bool(bad.any()):
        row = int(spans.response_index.to(bad.device)[bad][0])
        raise DataError(
            f"{labels[row]}: expected finite logits from the {name}, found {float(logits[bad][0])} for the response {responses[row][:80]!r}"
        )
    return logits


def _alone(spans: SentenceSpans, row: int) -> SentenceSpans:
    """The sentences of one response, counted from 0."""
    mine = spans.response_index == row
    first = int(mine.nonzero()[0]) if bool(mine.any()) else 0
    tokens = spans.token_sentence[row : row + 1]
    return SentenceSpans(
        response_index=spans.response_index[mine] - row,
        token_counts=spans.token_counts[mine],
        token_sentence=torch.where(tokens >= 0, tokens - first, tokens),
        char_spans=[spans.char_spans[row]],
    )
