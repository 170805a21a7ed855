"""Building an expert bank: in parts that survive being killed, by one process or by several, then joined into one file.

A build writes parts of ``PART_BATCHES`` batches into a folder beside the bank, each whole or not there. One that goes on checks the records
behind the parts it keeps, so that no row is lost, doubled or stale. Joining streams the parts into the bank.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aapa_lightning.anchor.asking import ask
from aapa_lightning.anchor.base import Discriminator
from aapa_lightning.anchor.segment import Segmenter, segment_texts
from aapa_lightning.data.records import prompt_hash
from aapa_lightning.digests import file_digest, range_digests, read_sealed_json, write_sealed_json
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.files import replace_folder, write_text
from aapa_lightning.system import make_folder, writing
from aapa_lightning.thinking import ScoreThinking, as_thinking
from aapa_lightning.types import Record

ROWS, INDEX, STAMP, _NOTE = "experts.arrow", "index.arrow", "bank.json", "build.json"
#: First row of each batch, in the index's metadata.
OFFSETS = b"offsets"
#: Byte at which each batch begins, and those where the last one and the file end; and the SHA-256 of each stretch between two of them.
BOUNDS, DIGESTS = b"bounds", b"digests"
#: How to go on without a damaged file of an interrupted build.
_ANEW = "build without --resume to start anew"
#: Batches of a part: what a killed build scores again at most.
PART_BATCHES = 16
Row = dict[str, Any]


def schema() -> Any:
    """Of the rows: a record's prompt, its expert responses as they were scored, and the logits of their sentences."""
    import pyarrow as pa

    return pa.schema([("prompt_hash", pa.string()), ("experts", pa.list_(pa.string())), ("logits", pa.list_(pa.list_(pa.float32())))])


def shard_folder(target: Path, shard: tuple[int, int]) -> Path:
    """Where the parts of one of several processes lie until they are joined; of a single one, until the bank is whole."""
    number, count = shard
    return target.with_name(f"{target.name}.partial" if count == 1 else f"{target.name}.shard-{number}-of-{count}")


@dataclass(frozen=True)
class PartWriter:
    """Scores ranges of the records and writes them down, each as a part that is whole or not there.

    Args:
        folder: where the parts go.
        records: all records, of all shards.
        discriminator: the judge.
        segmenter: how to split.
        batch_size: records scored at a time.
        score_thinking: keep the thinking before an answer.
    """

    folder: Path
    records: Sequence[Record]
    discriminator: Discriminator
    segmenter: Segmenter
    batch_size: int
    score_thinking: ScoreThinking

    def __call__(self, numbers: range) -> None:
        """Score the records of these numbers, batch by batch; keeps what is there already and was made from them."""
        part = self.folder / f"part-{numbers.start:012d}-{numbers.stop:012d}.arrow"
        if part.exists():
            _check_part(part, (self.records[i] for i in numbers), self.score_thinking)
            return
        starts = range(numbers.start, numbers.stop, self.batch_size)
        batches = ([self.records[i] for i in range(first, min(first + self.batch_size, numbers.stop))] for first in starts)
        write_part(part, (_scored(batch, self.discriminator, self.segmenter, self.score_thinking) for batch in batches))


def build_parts(
    writer: PartWriter, shard: tuple[int, int], *, resume: bool, spread: Callable[[Iterable[range]], Iterable[None]] | None = None
) -> None:
    """Write the parts of one shard of the records.

    Args:
        writer: of the parts.
        shard: which, counted from 1, and of how many: contiguous ranges of the records.
        resume: keep the parts of an interrupted build.
        spread: does what ``map(writer, ranges)`` does, on several devices; here by default.

    Raises:
        DataError: a record without an expert response, or one that has changed since its part was written.
        ConfigError: the interrupted build was another one, or is being written by another process.
    """
    number, count = shard
    step, total = writer.batch_size * PART_BATCHES, len(writer.records)
    if not 1 <= number <= count or step < 1:
        raise ConfigError(f"expected a shard from 1 to {count} and a batch_size of at least 1, found {number} and {writer.batch_size}")
    meta = {
        "fingerprint": writer.discriminator.fingerprint(),
        "cross_fitted": bool(getattr(writer.discriminator, "cross_fitted", False)),
        "segmenter": writer.segmenter.settings(),
        "score_thinking": as_thinking(writer.score_thinking).setting(),
        "batch_size": writer.batch_size,
        "rows": total,
        "shards": count,
    }
    with writing(writer.folder):
        make_folder(writer.folder)
    begin, end = total * (number - 1) // count, total * number // count
    ranges = (range(start, min(start + step, end)) for start in range(begin, end, step))
    with _locked(writer.folder):
        _begin(writer.folder, meta, resume=resume)
        try:
            for _ in spread(ranges) if spread else map(writer, ranges):
                pass
        except BaseException:
            if not any(writer.folder.glob("part-*.arrow")):
                shutil.rmtree(writer.folder)  # nothing to go on with
            raise


def _begin(folder: Path, meta: dict[str, Any], *, resume: bool) -> None:
    note = folder / _NOTE
    plain = json.loads(json.dumps(meta))
    if resume and note.exists():
        found = read_sealed_json(note, _ANEW)
        for name in [name for name, value in plain.items() if found.get(name) != value]:
            raise ConfigError(
                f"--resume: {folder} was begun with another value of {name}: expected {str(found.get(name))[:12]}, found "
                f"{str(plain[name])[:12]}; resume with the same, or build without --resume to start anew"
            )
        return
    for old in folder.glob("part-*"):
        old.unlink()
    write_sealed_json(note, plain)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / "lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{folder} is being written by another process; wait for it, or name another --out") from error
        yield


def _scored(batch: Sequence[Record], discriminator: Discriminator, segmenter: Segmenter, score_thinking: ScoreThinking) -> list[Row]:
    answers = [_answers(record, score_thinking) for record in batch]
    pairs = [(record, text) for record, texts in zip(batch, answers, strict=True) for text in texts]
    texts = [text for _, text in pairs]
    spans = segment_texts(texts, segmenter)
    found = ask(discriminator, texts, [record for record, _ in pairs], spans, score=getattr(discriminator, "score_held_out", None)).cpu()
    logits = iter(found.split([len(row) for row in spans.char_spans]))
    return [
        {"prompt_hash": prompt_hash(record.prompt), "experts": mine, "logits": [next(logits).tolist() for _ in mine]}
        for record, mine in zip(batch, answers, strict=True)
    ]


def _answers(record: Record, score_thinking: ScoreThinking) -> list[str]:
    if not record.experts:
        raise DataError(
            f"{record.source}: no expert response, but the expert bank needs one for every prompt; add a column 'expert', or "
            "leave such records out (aapa bank build --missing-experts drop)"
        )
    return [str(answer) for answer in as_thinking(score_thinking).answers(record.experts)]


def write_part(path: Path, batches: Iterator[list[Row]]) -> int:
    """Stream batches of rows into an Arrow file that is whole or not there; returns the number of rows."""
    import pyarrow as pa

    temporary, rows = path.with_name(path.name + ".tmp"), 0
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema()) as writer:
        for batch in batches:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema()))
            rows += len(batch)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    write_text(_digest_of(path), file_digest(temporary))  # first: a part that is there can be checked
    os.replace(temporary, path)
    return rows


def _digest_of(part: Path) -> Path:
    return part.with_suffix(".sha256")


def _check_part(path: Path, records: Iterator[Record], score_thinking: ScoreThinking) -> None:
    """Raise DataError when a part was not made from these records."""
    with _opened(path) as part:
        kept = hashlib.sha256()
        for i in range(part.num_record_batches):
            batch = part.get_batch(i).select(["prompt_hash", "experts"])
            for row in batch.to_pylist():
                kept.update(repr((row["prompt_hash"], row["experts"])).encode())
    now = hashlib.sha256()
    for record in records:
        now.update(repr((prompt_hash(record.prompt), _answers(record, score_thinking))).encode())
    if kept.digest() != now.digest():
        raise DataError(f"--resume: the records behind {path} are not those it was made from; build without --resume to start anew")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    digest = _digest_of(path)
    if not digest.is_file() or digest.read_bytes() != file_digest(path).encode():
        raise ConfigError(f"{path} is damaged (its bytes are not those that were written); remove it and resume")
    try:
        with pa.memory_map(str(path), "r") as source:
            yield pa.ipc.open_file(source)
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"{path} is damaged ({error}); remove it and resume") from error


def _is_whole(folder: Path, number: int) -> bool:
    if not (folder / _NOTE).is_file():
        return False
    note = read_sealed_json(folder / _NOTE, _ANEW)
    rows, count = note["rows"], note["shards"]
    return _covers(sorted(folder.glob("part-*.arrow")), rows * (number - 1) // count, rows * number // count)


def _covers(parts: Sequence[Path], begin: int, end: int) -> bool:
    for part in parts:
        start, stop = map(int, part.stem.split("-")[1:])
        if start != begin:
            return False
        begin = stop
    return begin == end


def join_shards(target: Path, count: int) -> None:
    """Make the bank out of the parts of ``count`` shards, whole or not at all, and remove them.

    Raises:
        ConfigError: parts are missing, or shards were built with different settings.
    """
    folders = [shard_folder(target, (number, count)) for number in range(1, count + 1)]
    if missing := [number for number, folder in enumerate(folders, 1) if not _is_whole(folder, number)]:
        raise ConfigError(
            f"{str(target)!r}: expected {count} whole shards, found that {missing} are missing or not whole; build each of them with "
            f"`aapa bank build --shard I/{count}`, and --resume where it was interrupted"
        )
    notes = [read_sealed_json(folder / _NOTE, _ANEW) for folder in folders]
    if any(note != notes[0] for note in notes):
        raise ConfigError(f"the shards of {str(target)!r} were built with different settings ({_NOTE}); build them again with the same")
    joined = target.with_name(target.name + ".joined")
    shutil.rmtree(joined, ignore_errors=True)
    joined.mkdir(parents=True)
    rows = stream(joined, [part for folder in folders for part in sorted(folder.glob("part-*.arrow"))])
    stamp = {name: notes[0][name] for name in ("fingerprint", "cross_fitted", "segmenter")}
    write_sealed_json(joined / STAMP, {**stamp, "rows": rows, "index": file_digest(joined / INDEX)})
    replace_folder(joined, target)
    for folder in folders:
        shutil.rmtree(folder)


def stream(folder: Path, parts: Sequence[Path]) -> int:
    """Copy parts into one file, batch by batch, and index it: only 16 bytes a row (the index) stay in memory. Returns the rows.

    The index also holds a digest of every batch and of the file's end, so that a look-up can check what it touches.
    """
    import numpy as np
    import pyarrow as pa

    prefixes: list[Any] = [np.empty(0, dtype=np.int64)]
    sizes, bounds = [0], [0]
    with pa.OSFile(str(folder / ROWS), "wb") as sink, pa.ipc.new_file(sink, schema()) as writer:
        for part in parts:
            with _opened(part) as source:
                for i in range(source.num_record_batches):
                    batch = source.get_batch(i)
                    writer.write_batch(batch)
                    sizes.append(batch.num_rows)
                    bounds.append(sink.tell())
                    keys = batch.column("prompt_hash").to_pylist()
                    prefixes.append(np.array([int(key[:15], 16) for key in keys], dtype=np.int64))
                del batch, source
    prefix = np.concatenate(prefixes)
    order = np.argsort(prefix, kind="stable").astype(np.int64)
    # kept beside the index, so that opening a bank reads none of its rows
    bounds.append(os.path.getsize(folder / ROWS))
    metadata = {key: np.array(values, dtype=np.int64).tobytes() for key, values in ((OFFSETS, np.cumsum(sizes)), (BOUNDS, bounds))}
    metadata[DIGESTS] = range_digests(folder / ROWS, bounds)
    index = pa.record_batch([pa.array(prefix[order]), pa.array(order)], names=["prefix", "row"]).replace_schema_metadata(metadata)
    with pa.OSFile(str(folder / INDEX), "wb") as sink, pa.ipc.new_file(sink, index.schema) as writer:
        writer.write_batch(index)
    return len(prefix)
