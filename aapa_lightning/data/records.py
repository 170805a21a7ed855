"""Datasets of records: JSONL, Parquet, a saved ``datasets`` folder or a Hub name; expert files; the train/validation split.

JSONL is validated whole when it is read; a file over ``IN_MEMORY`` bytes then stays on disk, and a record is parsed again when it is
accessed. Parquet and ``datasets`` stay memory-mapped and each row is validated when it is accessed (``aapa data check`` validates them
all).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, overload

from aapa_lightning.data.dialects import parse_record, prompt_hash, prompt_text, refuse_missing_columns
from aapa_lightning.data.jsonl import IndexedLines, iter_lines, may_stay_on_disk, parse_line
from aapa_lightning.data.responses import Response, join_responses, read_responses
from aapa_lightning.data.sources import JSON_SUFFIXES, json_files, open_dataset
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Record

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "JSON_SUFFIXES",
    "LazyRecords",
    "attach_experts",
    "parse_record",
    "prompt_hash",
    "prompt_text",
    "read_records",
    "require_experts",
    "row_parsers",
    "split_records",
    "take",
]

#: JSONL files up to this size, in bytes, are kept in memory, which is faster.
IN_MEMORY = 16 * 2**20


class LazyRecords(Sequence[Record]):
    """A sequence of records that are made when they are accessed.

    Args:
        fetch: makes the record at a non-negative index.
        size: number of records.
    """

    def __init__(self, fetch: Callable[[int], Record], size: int) -> None:
        self._fetch = fetch
        self._size = size

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return take(self, range(*index.indices(self._size)))
        if not -self._size <= index < self._size:
            raise IndexError(f"record {index} of {self._size}")
        return self._fetch(index % self._size)


def take(records: Sequence[Record], indices: Sequence[int]) -> LazyRecords:
    """The records at ``indices``, without copying any."""
    return LazyRecords(partial(_picked, records, indices), len(indices))


def _picked(records: Sequence[Record], indices: Sequence[int], i: int) -> Record:
    return records[indices[i]]


def read_records(
    path: str, *, split: str | None = None, experts: str | None = None, columns: Mapping[str, str] | None = None
) -> Sequence[Record]:
    """Read a dataset.

    Args:
        path: a JSONL or Parquet file, a folder (saved by ``datasets`` or holding data files), or a Hub name ``name``, ``name@config``,
            ``name:split`` or ``name@config:split``.
        split: the split of a folder or Hub dataset; default ``train``. Files have none.
        experts: a response file whose responses become experts of the records they answer (truncated ones do not), after the records' own.
        columns: fields that have another name in this dataset, field to column: ``{"expert": "response"}``.

    Returns:
        The records, at least one.

    Raises:
        DataError: unreadable, malformed or empty; the message names file and line.
        ConfigError: the path and the split contradict each other.
    """
    records: Sequence[Record]
    files = json_files(path, split)
    if files is not None:
        parse = RowParser(columns)
        records = joined_sequences([_jsonl_records(file, parse) for file in files])
        parse.refuse_missing_columns()
    else:
        rows = open_dataset(path, split, columns)
        records = LazyRecords(partial(parsed_row, rows, path, columns), len(rows))
    if not records:
        raise DataError(f"{path} is empty; expected at least one record (one JSON object a line with 'prompt' or 'messages')")
    records[0]
    return attach_experts(records, experts) if experts else records


class RowParser:
    """Makes records of JSON lines, and remembers whether any row had the columns that are asked for.

    Args:
        columns: as of ``read_records``.
    """

    def __init__(self, columns: Mapping[str, str] | None) -> None:
        self.columns = columns
        self._unseen = set((columns or {}).values())
        self._first: tuple[str, list[str]] | None = None

    def __call__(self, source: str, line: bytes) -> Record:
        """The record of a line. Raises DataError."""
        row = parse_line(source, line)
        if self._unseen:
            self._unseen.difference_update(row)
            self._first = self._first or (source, list(row))
        return parse_record(row, source, self.columns)

    def refuse_missing_columns(self) -> None:
        """Raise DataError for a column that no row had: absent means null, but a column that is never there is misspelt."""
        if self._first is not None and self._unseen:
            source, found = self._first
            refuse_missing_columns({name: name for name in sorted(self._unseen)}, found, source)


def _jsonl_records(path: str, parse: Callable[[str, bytes], Record]) -> Sequence[Record]:
    if not may_stay_on_disk(path) or Path(path).stat().st_size <= IN_MEMORY:
        return [parse(source, line) for source, line in iter_lines(path)]
    lines = IndexedLines(path, parse)
    return LazyRecords(partial(_parsed_at, lines, parse), len(lines))


def joined_sequences(parts: Sequence[Sequence[Record]]) -> Sequence[Record]:
    """Several sequences as one, which stays on disk where one of them does."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, list) for part in parts):
        return [record for part in parts for record in part]
    ends = list(accumulate(map(len, parts)))
    return LazyRecords(partial(_in_part, parts, ends), ends[-1] if ends else 0)


def _in_part(parts: Sequence[Sequence[Record]], ends: Sequence[int], i: int) -> Record:
    part = bisect_right(ends, i)
    return parts[part][i - ends[part] + len(parts[part])]


def row_parsers(path: str, *, split: str | None = None, columns: Mapping[str, str] | None = None) -> Iterable[Callable[[], Record]]:
    """One call per row that makes its record or raises DataError: to look at every row, whatever is wrong with the others.

    Raises:
        DataError: from the iterator, what is wrong with the file, or with ``columns``, as a whole.
    """
    files = json_files(path, split)
    if files is not None:
        return _line_parsers(files, RowParser(columns))
    rows = open_dataset(path, split, columns)
    return (partial(parsed_row, rows, path, columns, i) for i in range(len(rows)))


def _line_parsers(files: Sequence[str], parse: RowParser) -> Iterator[Callable[[], Record]]:
    for file in files:
        for source, line in iter_lines(file):
            yield partial(parse, source, line)
    parse.refuse_missing_columns()


def attach_experts(records: Sequence[Record], path: str) -> Sequence[Record]:
    """Records with the responses of a response file as experts, after their own; truncated responses are left out.

    Raises:
        DataError: the file is malformed or answers none of the records.
    """
    joined = join_responses(records, (response for response in read_responses(path) if not response.truncated))
    attached = LazyRecords(partial(_with_experts, records, joined), len(records))
    return list(attached) if isinstance(records, list) else attached


def split_records(records: Sequence[Record], val_fraction: float, seed: int) -> tuple[Sequence[Record], Sequence[Record]]:
    """Split into train and validation by prompt: rows with the same prompt stay together.

    The ``round(val_fraction * prompts)`` (at least one) prompts with the smallest hash of (seed, prompt) validate, so the split depends
    neither on the order of the rows nor on the process.

    Args:
        records: the dataset.
        val_fraction: share of the prompts, in [0, 1); 0 gives no validation records.
        seed: another seed, another split.

    Raises:
        ConfigError: ``val_fraction`` outside [0, 1).
        DataError: fewer than two different prompts.
    """
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"val_fraction must be in [0, 1), found {val_fraction}")
    if val_fraction == 0:
        return records, []
    ranks = [_rank(seed, record) for record in records]
    prompts = sorted(set(ranks))
    if len(prompts) < 2:
        raise DataError(f"a train/validation split needs at least two different prompts, found {len(prompts)}; set val_fraction to 0")
    count = min(max(round(val_fraction * len(prompts)), 1), len(prompts) - 1)
    last = prompts[count - 1]
    train = take(records, [i for i, rank in enumerate(ranks) if rank > last])
    val = take(records, [i for i, rank in enumerate(ranks) if rank <= last])
    return train, val


def require_experts(records: Sequence[Record], why: str) -> None:
    """Raise DataError when a record has no expert response.

    Args:
        records: the dataset.
        why: what needs them, such as ``"SFT imitates expert responses"``.
    """
    for record in records:
        if not record.experts:
            raise DataError(
                f"{record.source}: no expert response, but {why}; add a column 'expert', or join a response file with experts=FILE "
                "(a record needs the file's key or prompt)"
            )


def _parsed_at(lines: IndexedLines, parse: Callable[[str, bytes], Record], i: int) -> Record:
    return parse(*lines[i])


def parsed_row(rows: Dataset, path: str, columns: Mapping[str, str] | None, i: int) -> Record:
    """The record of a row of a table."""
    return parse_record(rows[i], f"{path}:row {i}", columns)


def _with_experts(records: Sequence[Record], joined: Sequence[Sequence[Response]], i: int) -> Record:
    return replace(records[i], experts=records[i].experts + tuple(response.text for response in joined[i]))


def _rank(seed: int, record: Record) -> bytes:
    return hashlib.sha256(f"{seed}:{prompt_hash(record.prompt)}".encode()).digest()
