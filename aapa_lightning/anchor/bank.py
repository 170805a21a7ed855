"""The expert bank: expert responses with their sentence logits, computed once, on disk, keyed by prompt hash."""

from __future__ import annotations

import bisect
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aapa_lightning.anchor.base import Discriminator
from aapa_lightning.anchor.files import read_json
from aapa_lightning.anchor.segment import Segmenter, segment_texts
from aapa_lightning.anchor.thinking import answer_start
from aapa_lightning.data.records import prompt_hash
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.files import write_json
from aapa_lightning.types import Record

if TYPE_CHECKING:
    import pyarrow

_ROWS, _INDEX, _STAMP = "experts.arrow", "index.arrow", "bank.json"


class ExpertBank:
    """Memory-mapped expert responses and their logits.

    A folder of two Arrow files: one row per record (hash, expert responses, logits of their sentences), and a sorted index of hashes. What
    a look-up does not touch stays on disk.

    Args:
        folder: written by ``build``.
        fingerprint: the discriminator's; another one than the bank's is refused.

    Raises:
        ConfigError: the folder is missing or damaged, or belongs to another discriminator.
    """

    def __init__(self, folder: str | Path, fingerprint: str | None = None) -> None:
        self.folder = Path(folder)
        if not (self.folder / _STAMP).is_file():
            raise ConfigError(f"no expert bank at {str(folder)!r}: expected a folder with {_STAMP}; build one with `aapa bank build`")
        stamp = read_json(self.folder / _STAMP)
        self._rows, self._index = _open(self.folder / _ROWS), _open(self.folder / _INDEX)
        self._offsets = [0]
        for i in range(self._rows.num_record_batches):
            self._offsets.append(self._offsets[-1] + self._rows.get_batch(i).num_rows)
        try:
            self.fingerprint: str = stamp["fingerprint"]
            self.cross_fitted: bool = stamp["cross_fitted"]
            index = self._index.get_batch(0)
            self._prefixes, self._positions = index.column("prefix").to_numpy(), index.column("row").to_numpy()
            complete = len(self._prefixes) == self._offsets[-1] == stamp["rows"]
        except (KeyError, ValueError, IndexError) as error:
            raise ConfigError(f"expert bank {str(folder)!r} is damaged ({type(error).__name__}: {error}); build it again") from error
        if not complete:
            raise ConfigError(f"expert bank {str(folder)!r} is damaged: {_ROWS}, {_INDEX} and {_STAMP} disagree; build it again")
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise ConfigError(
                f"expert bank {str(folder)!r} was built with the discriminator {self.fingerprint[:12]}, but the one in use is "
                f"{fingerprint[:12]}; build the bank again with `aapa bank build`"
            )

    def __len__(self) -> int:
        return self._offsets[-1]

    def experts(self, record: Record) -> list[str]:
        """Expert responses to a record's prompt; none for an unknown prompt."""
        return [text for row in self._find(prompt_hash(record.prompt)) for text in row["experts"]]

    def expert_logits(self, record: Record) -> Tensor | None:
        """Logits of all sentences of the expert responses to a record's prompt, float32 ``[K]``; None for an unknown prompt."""
        rows = self._find(prompt_hash(record.prompt))
        values = [value for row in rows for logits in row["logits"] for value in logits]
        return torch.tensor(values, dtype=torch.float32) if values else None

    def _find(self, key: str) -> list[dict[str, Any]]:
        prefix = int(key[:15], 16)
        begin, end = self._prefixes.searchsorted([prefix, prefix + 1])
        rows = [self._row(int(i)) for i in self._positions[begin:end]]
        return [row for row in rows if row["prompt_hash"] == key]

    def _row(self, number: int) -> dict[str, Any]:
        batch = bisect.bisect_right(self._offsets, number) - 1
        return self._rows.get_batch(batch).slice(number - self._offsets[batch], 1).to_pylist()[0]

    @classmethod
    def build(
        cls,
        folder: str | Path,
        records: Sequence[Record],
        discriminator: Discriminator,
        segmenter: Segmenter | None = None,
        *,
        batch_size: int = 256,
        score_thinking: bool = False,
    ) -> ExpertBank:
        """Score the expert responses of ``records`` batch by batch and write a bank, whole or not at all.

        A cross-fitted discriminator scores each prompt with the head that was not trained on it.

        Args:
            folder: where to write; an existing bank is replaced, anything else is refused.
            records: each with at least one expert response.
            discriminator: the judge.
            segmenter: how to split; the discriminator's own by default.
            batch_size: records scored at a time.
            score_thinking: keep the thinking before an answer.

        Raises:
            DataError: a record without an expert response, or no records.
            ConfigError: ``folder`` exists and is no bank.
        """
        target = Path(folder)
        if target.exists() and not (target / _STAMP).is_file() and any(target.iterdir()):
            raise ConfigError(f"{str(folder)!r} exists and is no expert bank; name another folder")
        if len(records) == 0:
            raise DataError("no records to build an expert bank from")
        segmenter = _segmenter_for(discriminator, segmenter)
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            rows = _write(partial, _scored(records, discriminator, segmenter, batch_size, score_thinking))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        cross_fitted = bool(getattr(discriminator, "cross_fitted", False))
        stamp = {"fingerprint": discriminator.fingerprint(), "rows": rows, "cross_fitted": cross_fitted, "segmenter": segmenter.settings()}
        write_json(partial / _STAMP, stamp)
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        return cls(target)


def _segmenter_for(discriminator: Discriminator, segmenter: Segmenter | None) -> Segmenter:
    if discriminator.whole_response:
        return Segmenter(whole_response=True)
    return segmenter or getattr(discriminator, "segmenter", None) or Segmenter()


def _scored(
    records: Sequence[Record], discriminator: Discriminator, segmenter: Segmenter, batch_size: int, score_thinking: bool
) -> Iterator[list[dict[str, Any]]]:
    score = getattr(discriminator, "score_held_out", discriminator.score)
    for start in range(0, len(records), batch_size):
        batch = [records[i] for i in range(start, min(start + batch_size, len(records)))]
        for record in batch:
            if not record.experts:
                raise DataError(
                    f"{record.source}: no expert response, but the expert bank needs one for every prompt; add a column 'expert', or "
                    "leave such records out (aapa bank build --missing-experts drop)"
                )
        pairs = [(record, text if score_thinking else text[answer_start(text) :]) for record in batch for text in record.experts]
        texts = [text for _, text in pairs]
        spans = segment_texts(texts, segmenter)
        logits = score(texts, [record for record, _ in pairs], spans).cpu().split([len(row) for row in spans.char_spans])
        answers = iter(zip(texts, logits, strict=True))
        rows = []
        for record in batch:
            mine = [next(answers) for _ in record.experts]
            key = prompt_hash(record.prompt)
            rows.append({"prompt_hash": key, "experts": [text for text, _ in mine], "logits": [values.tolist() for _, values in mine]})
        yield rows


def _write(folder: Path, batches: Iterator[list[dict[str, Any]]]) -> int:
    """Stream rows to disk; only 16 bytes a row (the index) stay in memory."""
    import numpy as np
    import pyarrow as pa

    schema = pa.schema([("prompt_hash", pa.string()), ("experts", pa.list_(pa.string())), ("logits", pa.list_(pa.list_(pa.float32())))])
    prefixes: list[Any] = []
    with pa.OSFile(str(folder / _ROWS), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for rows in batches:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
            prefixes.append(np.array([int(row["prompt_hash"][:15], 16) for row in rows], dtype=np.int64))
    prefix = np.concatenate(prefixes)
    order = np.argsort(prefix, kind="stable").astype(np.int64)
    index = pa.record_batch([pa.array(prefix[order]), pa.array(order)], names=["prefix", "row"])
    with pa.OSFile(str(folder / _INDEX), "wb") as sink, pa.ipc.new_file(sink, index.schema) as writer:
        writer.write_batch(index)
    return len(prefix)


def _open(path: Path) -> pyarrow.RecordBatchFileReader:
    import pyarrow as pa

    try:
        return pa.ipc.open_file(pa.memory_map(str(path), "r"))
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"expert bank file {path} is missing or damaged ({error}); build the bank again") from error
