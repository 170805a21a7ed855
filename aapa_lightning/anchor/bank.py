"""The expert bank: expert responses with their sentence logits, computed once, on disk, keyed by prompt hash."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from aapa_lightning.anchor.bank_build import (
    BOUNDS,
    DIGESTS,
    INDEX,
    OFFSETS,
    ROWS,
    STAMP,
    PartWriter,
    build_parts,
    join_shards,
    shard_folder,
)
from aapa_lightning.anchor.base import Discriminator
from aapa_lightning.anchor.segment import Segmenter
from aapa_lightning.data.records import prompt_hash
from aapa_lightning.digests import file_digest, range_digest, read_sealed_json
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.thinking import ScoreThinking
from aapa_lightning.types import Record

if TYPE_CHECKING:
    import pyarrow

#: What to do with a bank that cannot be used.
_AGAIN = "build the bank again with `aapa bank build`"


class ExpertBank:
    """Memory-mapped expert responses and their logits.

    A folder of two Arrow files: one row per record (hash, expert responses, logits of their sentences), and a sorted index of hashes. What
    a look-up does not touch stays on disk. The index is checked against its digest when the bank is opened, every batch of rows when a
    look-up first touches it; ``bank.json`` holds the digest of the index, the index those of the batches.

    Args:
        folder: written by ``build``.
        fingerprint: the discriminator's; another one than the bank's is refused.

    Raises:
        ConfigError: the folder is missing or damaged, or belongs to another discriminator; also from a look-up, where its rows are damaged.
    """

    def __init__(self, folder: str | Path, fingerprint: str | None = None) -> None:
        self.folder = Path(folder)
        if not (self.folder / STAMP).is_file():
            raise ConfigError(f"no expert bank at {str(folder)!r}: expected a folder with {STAMP}; build one with `aapa bank build`")
        stamp = read_sealed_json(self.folder / STAMP, _AGAIN)
        if file_digest(_there(self.folder / INDEX)) != stamp["index"]:
            raise ConfigError(f"expert bank file {self.folder / INDEX} is damaged: its bytes are not those that were written; {_AGAIN}")
        index = _open(self.folder / INDEX)
        self._offsets, self._bounds = (np.frombuffer(index.schema.metadata[key], dtype=np.int64).tolist() for key in (OFFSETS, BOUNDS))
        self._digests: bytes = index.schema.metadata[DIGESTS]
        self._file, self._checked = open(_there(self.folder / ROWS), "rb"), set[int]()  # noqa: SIM115 - as long as the bank
        self._check(len(self._bounds) - 2)  # the end of the file, by which Arrow finds the rest
        self._rows = _open(self.folder / ROWS)
        self.fingerprint: str = stamp["fingerprint"]
        self.cross_fitted: bool = stamp["cross_fitted"]
        hashes = index.get_batch(0)
        self._prefixes, self._positions = hashes.column("prefix").to_numpy(), hashes.column("row").to_numpy()
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise ConfigError(
                f"expert bank {str(folder)!r} was built with the discriminator {self.fingerprint[:12]}, but the one in use is "
                f"{fingerprint[:12]}; build the bank again with `aapa bank build`"
            )

    def __len__(self) -> int:
        return self._offsets[-1]

    def experts(self, record: Record) -> list[str]:
        """Expert responses to a record's prompt; none for an unknown prompt."""
        return [text for batch, i in self._find(record) for text in batch.column("experts")[i].as_py()]

    def expert_logits(self, record: Record) -> Tensor | None:
        """Logits of all sentences of the expert responses to a record's prompt, float32 ``[K]``; None for an unknown prompt."""
        parts = [batch.column("logits")[i].values.flatten().to_numpy() for batch, i in self._find(record)]
        # copied: what is handed out must be writable, and not hold on to the file
        found = [torch.tensor(part) for part in parts if len(part)]
        return None if not found else found[0] if len(found) == 1 else torch.cat(found)

    def _find(self, record: Record) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
        """Batch and place of every row of a prompt."""
        key = prompt_hash(record.prompt)
        prefix = int(key[:15], 16)
        begin, end = self._prefixes.searchsorted([prefix, prefix + 1])
        for number in self._positions[begin:end].tolist():
            which = bisect.bisect_right(self._offsets, number) - 1
            self._check(which)
            batch = self._rows.get_batch(which)
            if batch.column("prompt_hash")[number - self._offsets[which]].as_py() == key:
                yield batch, number - self._offsets[which]

    def _check(self, block: int) -> None:
        """Look at the bytes of a batch, or of what follows the last, when they are first touched."""
        if block in self._checked:
            return
        start, stop = self._bounds[block : block + 2]
        if range_digest(self._file.fileno(), start, stop) != self._digests[32 * block : 32 * (block + 1)]:
            raise ConfigError(
                f"expert bank file {self.folder / ROWS} is damaged: bytes {start} to {stop} are not those that were written; {_AGAIN}"
            )
        self._checked.add(block)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        records: Sequence[Record],
        discriminator: Discriminator,
        segmenter: Segmenter | None = None,
        *,
        batch_size: int = 256,
        score_thinking: ScoreThinking = False,
        resume: bool = False,
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
            resume: go on where a build with the same arguments was interrupted.

        Raises:
            DataError: a record without an expert response, or no records.
            ConfigError: ``folder`` exists and is no bank, or what is resumed was another build.
        """
        thinking, whole = score_thinking, (1, 1)
        cls.build_shard(folder, records, discriminator, segmenter, whole, batch_size=batch_size, score_thinking=thinking, resume=resume)
        return cls.join(folder, 1)

    @classmethod
    def build_shard(
        cls,
        folder: str | Path,
        records: Sequence[Record],
        discriminator: Discriminator,
        segmenter: Segmenter | None,
        shard: tuple[int, int],
        *,
        batch_size: int = 256,
        score_thinking: ScoreThinking = False,
        resume: bool = False,
    ) -> None:
        """One process's part of a build by several; ``join`` makes the bank when all are done.

        Args:
            folder: the bank's, as for ``build``; parts lie beside it.
            records: all of them, whatever the shard.
            discriminator: as for ``build``.
            segmenter: as for ``build``.
            shard: which part of the records to score, counted from 1, and of how many.
            batch_size: as for ``build``.
            score_thinking: as for ``build``.
            resume: as for ``build``.
        """
        thinking = score_thinking
        writer = cls.part_writer(folder, records, discriminator, segmenter, shard, batch_size=batch_size, score_thinking=thinking)
        build_parts(writer, shard, resume=resume)

    @staticmethod
    def part_writer(
        folder: str | Path,
        records: Sequence[Record],
        discriminator: Discriminator,
        segmenter: Segmenter | None,
        shard: tuple[int, int],
        *,
        batch_size: int = 256,
        score_thinking: ScoreThinking = False,
    ) -> PartWriter:
        """What writes the parts of a shard, for ``bank_build.build_parts``; arguments and errors as for ``build_shard``."""
        target = Path(folder)
        if target.exists() and not (target / STAMP).is_file() and any(target.iterdir()):
            raise ConfigError(f"{str(folder)!r} exists and is no expert bank; name another folder")
        if len(records) == 0:
            raise DataError("no records to build an expert bank from")
        segmenter = _segmenter_for(discriminator, segmenter)
        return PartWriter(shard_folder(target, shard), records, discriminator, segmenter, batch_size, score_thinking)

    @classmethod
    def join(cls, folder: str | Path, count: int) -> ExpertBank:
        """Make the bank out of ``count`` shards, whole or not at all. Raises ConfigError when one is missing or made otherwise."""
        join_shards(Path(folder), count)
        return cls(folder)


def _segmenter_for(discriminator: Discriminator, segmenter: Segmenter | None) -> Segmenter:
    if discriminator.whole_response:
        return Segmenter(whole_response=True)
    return segmenter or getattr(discriminator, "segmenter", None) or Segmenter()


def _there(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"expert bank file {path} is missing; {_AGAIN}")
    return path


def _open(path: Path) -> pyarrow.RecordBatchFileReader:
    import pyarrow as pa

    try:
        return pa.ipc.open_file(pa.memory_map(str(path), "r"))
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"expert bank file {path} is damaged ({error}); {_AGAIN}") from error
