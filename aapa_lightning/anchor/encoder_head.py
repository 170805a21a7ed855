"""The default discriminator: a frozen encoder, sentence pooling, and a small head."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from aapa_kernels import anchor_score
from aapa_lightning.anchor.base import Discriminator
from aapa_lightning.anchor.context import Encoding
from aapa_lightning.anchor.encoder import Embedded, FrozenEncoder, hash_tensors
from aapa_lightning.anchor.files import read_tensors, write_tensors
from aapa_lightning.anchor.head import Feature, StackedHead, feature_size, fill_unseen, sentence_features
from aapa_lightning.anchor.reference_cache import ReferenceCache
from aapa_lightning.anchor.segment import SEGMENTER_VERSION, Segmenter, segment_texts
from aapa_lightning.anchor.thinking import answer_start
from aapa_lightning.data.records import prompt_hash
from aapa_lightning.documents import read_json
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.files import whole_folder, write_json
from aapa_lightning.types import Record, SentenceSpans

HEAD_FILE = "head.safetensors"
#: What ``discriminator.json`` holds.
KINDS: dict[str, Any] = {
    "encoder": str,
    "encoder_fingerprint": str,
    "hidden_size": int,
    "encoding": dict,
    "features": list,
    "head": dict,
    "segmenter": dict,
    "fingerprint": str,
    "metrics": dict,
}


def fold_of(prompt: str | tuple, folds: int) -> int:
    """The cross-fitting fold of a prompt: head ``fold_of(prompt, K)`` is trained without it, and judges it."""
    return int(prompt_hash(prompt)[:8], 16) % folds


def pick_reference(text: str, record: Record, *, strict: bool, turn: int = 0) -> str:
    """An expert response other than ``text``, without its thinking.

    Args:
        text: the response to be judged.
        record: its record.
        strict: an expert response must not be its own reference: refuse when there is no other. Otherwise a rollout that repeats
            the only expert response is compared with it.
        turn: which of the other expert responses, counted round and round; the first by default.

    Raises:
        DataError: no expert response that will do; names the record.
    """
    answers = [expert[answer_start(expert) :] for expert in record.experts]
    others = [answer for answer, expert in zip(answers, record.experts, strict=True) if text not in (answer, expert)]
    usable = others if strict else others or answers
    if usable:
        return usable[turn % len(usable)]
    needed = "another expert response than the one judged" if record.experts else "an expert response"
    raise DataError(f"{record.source}: the discriminator's 'reference' feature needs {needed}; found {len(record.experts)} in 'experts'")


class EncoderHeadDiscriminator(Discriminator):
    """Judges sentences by a head on frozen, pooled, contextual embeddings.

    A sentence cut off by ``max_length`` gets the mean logit of its response; a response of which nothing is seen (an empty one) gets the
    floor found in training, so that silence does not pay. With ``K > 1`` folds every response is scored by the head of its prompt's fold,
    which was trained without the prompt: experts, rollouts and the logits that the temperature was fitted to have one scale.

    Args:
        encoder: the frozen encoder.
        head: the trained head; its input size must be that of the features.
        features: names out of ``head.FEATURES``.
        segmenter: how the training responses were split, kept for whoever scores.
        metrics: figures of the training run, written beside the weights.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        head: StackedHead,
        features: Sequence[Feature],
        segmenter: Segmenter | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        expected, found = feature_size(features, encoder.hidden_size), len(head.mean)
        if expected != found:
            raise ConfigError(
                f"the discriminator does not fit its encoder {encoder.path!r}: features {list(features)} at hidden size "
                f"{encoder.hidden_size} have {expected} columns, but the head expects {found}; use the encoder that it was trained on"
            )
        self.encoder, self.features, self.segmenter = encoder, tuple(features), segmenter or Segmenter()
        self.head = head.eval().requires_grad_(False)
        self.metrics = dict(metrics or {})
        self.needs_experts = "reference" in features
        self.references = ReferenceCache(encoder, self.segmenter)

    @property
    def cross_fitted(self) -> bool:
        """Whether there is a head for every prompt that was not trained on it."""
        return self.head.folds > 1

    def score(self, responses: Sequence[str], records: Sequence[Record], spans: SentenceSpans) -> Tensor:
        """Log-odds at equal prior, float32 ``[S]``, each by the head of its prompt's fold (the only head, without cross-fitting)."""
        if self.features == ("sentence",):
            return self._fused_logits(responses, records, spans)
        return self._by_fold(self._logits(responses, records, spans, strict=False), records, spans)

    def score_held_out(self, responses: Sequence[str], records: Sequence[Record], spans: SentenceSpans) -> Tensor:
        """Like ``score``, for expert responses: none is its own reference. Raises DataError for one that has no other."""
        return self._by_fold(self._logits(responses, records, spans, strict=True), records, spans)

    def _folds(self, records: Sequence[Record]) -> Tensor:
        return torch.tensor([fold_of(record.prompt, self.head.folds) for record in records], dtype=torch.int64)

    def _by_fold(self, logits: Tensor, records: Sequence[Record], spans: SentenceSpans) -> Tensor:
        rows = self._folds(records)[spans.response_index.cpu()].to(logits.device)
        return logits.gather(0, rows[None])[0]

    @torch.no_grad()
    def _fused_logits(self, responses: Sequence[str], records: Sequence[Record], spans: SentenceSpans) -> Tensor:
        """Straight from hidden states to logits: no embedding is kept."""
        folds, index = self._folds(records), spans.response_index.cpu()
        logits = self.head.mean.new_empty(len(index))
        # standardised features lose nothing in 16 bits that hidden states of 16 bits have kept
        half = logits.is_cuda and self.encoder.encoding.dtype != "float32"
        for fold in folds.unique().tolist():
            head, floor = self.head.of_fold(fold, torch.float16 if half else torch.float32), self.head.floor[fold].item()
            rows = torch.nonzero(folds == fold).flatten().tolist()
            sentences = torch.nonzero(folds[index] == fold).flatten().to(logits.device)
            logits[sentences] = floor
            prompts, texts, char_spans = zip(*((records[i].prompt, responses[i], spans.char_spans[i]) for i in rows), strict=True)
            for batch in self.encoder.batches(prompts, texts, char_spans):
                scored = anchor_score(batch.hidden, batch.starts, batch.lengths, batch.offsets, head, transform="score", floor=floor)
                logits[sentences[batch.sentences]] = scored.logits
        return logits

    @torch.no_grad()
    def _logits(self, responses: Sequence[str], records: Sequence[Record], spans: SentenceSpans, *, strict: bool) -> Tensor:
        embedded = self.encoder([record.prompt for record in records], responses, spans.char_spans)
        references: Embedded | None = None
        reference_of: list[int] = []
        if self.needs_experts:
            chosen = [(record, pick_reference(text, record, strict=strict)) for text, record in zip(responses, records, strict=True)]
            references, reference_of = self.references(chosen)
        features = sentence_features(self.features, embedded, references, reference_of)
        return fill_unseen(self.head(features), embedded, self.head.floor)

    def fingerprint(self) -> str:
        """Hex digest of encoder, settings and head."""
        encoding = {name: value for name, value in asdict(self.encoder.encoding).items() if name != "batch_tokens"}
        settings = json.dumps([encoding, self.features, self.segmenter.settings(), SEGMENTER_VERSION], sort_keys=True)
        return hash_tensors(f"{self.encoder.fingerprint()}|{settings}", self.head.state_dict())

    def to(self, device: torch.device | str) -> Self:
        """Move encoder and head; returns itself."""
        self.encoder.to(device)
        self.head.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write ``head.safetensors`` and ``discriminator.json``; the encoder is referred to by path, relative when inside ``folder``."""
        folder = Path(folder)
        settings = {
            "class": "encoder_head",
            "encoder": _portable(self.encoder.path, folder),
            "encoder_fingerprint": self.encoder.fingerprint(),
            "hidden_size": self.encoder.hidden_size,
            "encoding": asdict(self.encoder.encoding),
            "features": list(self.features),
            "head": {"folds": self.head.folds, "in_features": len(self.head.mean), "hidden_units": self.head.hidden_units},
            "segmenter": self.segmenter.settings(),
            "fingerprint": self.fingerprint(),
            "metrics": self.metrics,
        }
        with whole_folder(folder) as new:
            write_tensors(new / HEAD_FILE, self.head.state_dict())
            write_json(new / "discriminator.json", settings)

    @classmethod
    def load(cls, folder: Path, *, encoder: str | None = None, trust_remote_code: bool = False) -> Self:
        """Read what ``save`` wrote.

        Args:
            folder: the discriminator's folder.
            encoder: where the encoder lies now, if it moved.
            trust_remote_code: for the encoder.

        Raises:
            ConfigError: a file is missing or damaged, or the encoder is not the one that the head was trained on.
        """
        file = Path(folder) / "discriminator.json"
        settings = read_json(file, **KINDS)
        try:
            path = encoder or _resolve(settings["encoder"], Path(folder))
            frozen = FrozenEncoder(path, Encoding(**settings["encoding"]), trust_remote_code=trust_remote_code)
            _check_encoder(frozen, settings, file)
            head = StackedHead(**settings["head"])
            head.load_state_dict(read_tensors(Path(folder) / HEAD_FILE))
            judge = cls(frozen, head, settings["features"], Segmenter(**settings["segmenter"]), settings["metrics"])
            expected = settings["fingerprint"]
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise ConfigError(f"{file} and {HEAD_FILE} are damaged or of another version: {_first_line(error)}; train it again") from error
        if judge.fingerprint() != expected:
            raise ConfigError(
                f"{folder}: {HEAD_FILE} is not the file written with {file.name} (fingerprints differ); train or copy it again"
            )
        return judge


def embed_references(encoder: FrozenEncoder, segmenter: Segmenter, chosen: Sequence[tuple[Record, str]]) -> tuple[Embedded, list[int]]:
    """Embed reference texts, each (prompt, text) once; returns them and the row of each request."""
    rows: dict[tuple[Any, str], int] = {}
    index = [
        rows.setdefault((record.prompt if isinstance(record.prompt, str) else repr(record.prompt), text), len(rows))
        for record, text in chosen
    ]
    first = {row: i for i, row in reversed(list(enumerate(index)))}
    unique = [chosen[first[row]] for row in range(len(rows))]
    texts = [text for _, text in unique]
    return encoder([record.prompt for record, _ in unique], texts, segment_texts(texts, segmenter).char_spans), index


def _check_encoder(encoder: FrozenEncoder, settings: Mapping[str, Any], file: Path) -> None:
    for what, expected, found in (
        ("hidden size", settings["hidden_size"], encoder.hidden_size),
        ("fingerprint", settings["encoder_fingerprint"], encoder.fingerprint()),
    ):
        if expected != found:
            raise ConfigError(
                f"{file}: the discriminator does not fit its encoder {encoder.path!r}: expected {what} {expected}, found {found}; "
                "point it to the encoder that it was trained on, or train it again"
            )


def _portable(path: str, folder: Path) -> str:
    if not Path(path).is_dir():
        return path
    inside = os.path.relpath(path, folder)
    return os.path.abspath(path) if inside.startswith("..") else inside


def _resolve(path: str, folder: Path) -> str:
    return str(folder / path) if (folder / path).is_dir() else path


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
