"""Responses of a file, scored batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aapa_kernels import response_scores
from aapa_lightning.anchor.asking import ask
from aapa_lightning.anchor.base import Discriminator
from aapa_lightning.anchor.segment import Segmenter, segment_texts
from aapa_lightning.anchor.signal import AnchorOptions
from aapa_lightning.commands.joined import Answer
from aapa_lightning.data.records import prompt_hash
from aapa_lightning.thinking import ScoreThinking, as_thinking
from aapa_lightning.types import Record

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True, slots=True)
class Survey:
    """What a first pass over a response file finds.

    Args:
        rows: responses.
        positions: records that are answered, ascending.
        digest: SHA-256 (hex) of the rows.
        alone: responses that are the only expert response to their prompts, so that they would be compared with themselves.
    """

    rows: int
    positions: list[int]
    digest: str
    alone: int


def survey(answers: Iterable[Answer], records: Sequence[Record]) -> Survey:
    """Check every response before any is scored; keeps none of them in memory."""
    digest, positions, rows, alone = hashlib.sha256(), set(), 0, 0
    for answer in answers:
        digest.update(answer.raw.strip() + b"\n")
        positions.add(answer.position)
        rows += 1
        alone += set(records[answer.position].experts) == {answer.response.text}
    return Survey(rows, sorted(positions), digest.hexdigest(), alone)


def digest_records(records: Iterable[Record], *, experts: bool) -> str:
    """SHA-256 (hex) of prompts and their keys, and of their experts where scores depend on them."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(prompt_hash(record.prompt).encode())
        digest.update(hashlib.sha256(repr(record.key).encode()).digest())
        for expert in record.experts if experts else ():
            digest.update(hashlib.sha256(expert.encode()).digest())
    return digest.hexdigest()


def in_batches(answers: Iterable[Answer], size: int) -> Iterator[list[Answer]]:
    """Lists of ``size`` answers; the last may be shorter."""
    iterator = iter(answers)
    while batch := list(islice(iterator, size)):
        yield batch


Batch = tuple[Sequence[Answer], Sequence[Record]]


def start_scorer(
    load: Callable[[], Discriminator], options: AnchorOptions, score_thinking: ScoreThinking, device: str
) -> Callable[[Batch], list[dict[str, Any]]]:
    """A scorer on a device, of answers with the records that they answer; in one argument, as ``map`` gives it."""
    scorer = ResponseScorer(load().to(device), options, score_thinking=score_thinking)
    return lambda batch: scorer(*batch)


class ResponseScorer:
    """Scores texts as ``AnchorTerm`` scores rollouts, without tokens of a policy: sentences weigh the same.

    Args:
        discriminator: the judge.
        options: transform and pool; the rest is not read.
        score_thinking: score ``<think>...</think>`` like any text; otherwise it is cut off first. ``Thinking`` names other tags.
    """

    def __init__(self, discriminator: Discriminator, options: AnchorOptions, *, score_thinking: ScoreThinking = False) -> None:
        self.discriminator, self.thinking = discriminator, as_thinking(score_thinking)
        self._options: dict[str, Any] = {
            "transform": options.transform,
            "tau": options.tau,
            "pool": options.pool,
            "softmin_temperature": options.softmin_temperature,
        }
        segmenter = getattr(discriminator, "segmenter", None) or Segmenter()
        self.segmenter = replace(segmenter, whole_response=discriminator.whole_response)

    def __call__(self, answers: Sequence[Answer], records: Sequence[Record]) -> list[dict[str, Any]]:
        """Score a batch.

        Args:
            answers: ``N`` responses.
            records: the records that they answer, ``N``.

        Returns:
            A row each: the answer's labels, ``score`` (transformed and pooled), ``mean_logit``, and ``sentences`` with ``start`` and
            ``end`` (characters of the whole response), ``logit`` and ``probability``.

        Raises:
            DataError: the discriminator fails or answers anything but a finite number for each sentence; names the response.
        """
        texts = [self.thinking.answer(answer.response.text, answer.response.prompt_end) for answer in answers]
        starts = [len(answer.response.text) - len(text) for answer, text in zip(answers, texts, strict=True)]
        spans = segment_texts(texts, self.segmenter)
        logits = ask(self.discriminator, texts, records, spans, labels=[answer.response.source for answer in answers]).cpu()
        sizes = torch.tensor([len(row) for row in spans.char_spans])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        scores = _numbers(response_scores(logits, spans.token_counts, offsets, **self._options).scores)
        means = _numbers(response_scores(logits, spans.token_counts, offsets, transform="score").scores)
        columns = zip(_numbers(logits), _numbers(torch.sigmoid(logits)), strict=True)
        rows = []
        for i, (answer, start) in enumerate(zip(answers, starts, strict=True)):
            judged = zip(spans.char_spans[i], islice(columns, len(spans.char_spans[i])), strict=True)
            sentences = [
                {"start": start + begin, "end": start + end, "logit": logit, "probability": probability}
                for (begin, end), (logit, probability) in judged
            ]
            rows.append({**answer.labels(), "score": scores[i], "mean_logit": means[i], "sentences": sentences})
        return rows


def schema() -> pyarrow.Schema:
    """Of the rows, for Parquet; keys are text there."""
    import pyarrow as pa

    sentence = pa.struct([("start", pa.int64()), ("end", pa.int64()), ("logit", pa.float32()), ("probability", pa.float32())])
    return pa.schema(
        [
            ("line", pa.int64()),
            ("key", pa.string()),
            ("sample", pa.int64()),
            ("temperature", pa.float64()),
            ("score", pa.float32()),
            ("mean_logit", pa.float32()),
            ("sentences", pa.list_(sentence)),
        ]
    )


def _numbers(values: Tensor) -> list[float]:
    """Float32 values with no more digits than tell them apart."""
    return [float(str(value)) for value in values.numpy()]
