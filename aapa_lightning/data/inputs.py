"""Whatever a data module is given, as records: one reader's path for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from aapa_lightning.data.dialects import parse_record, refuse_missing_columns
from aapa_lightning.data.records import LazyRecords, attach_experts, joined_sequences, parsed_row, read_records
from aapa_lightning.errors import ConfigError
from aapa_lightning.types import Record

#: A path or Hub name, records, rows, several paths; a ``datasets.Dataset`` too, whose type the command line need not know.
Source = str | Path | Sequence[Record] | Sequence[Mapping[str, Any]] | Sequence[str]


def as_records(
    source: Any, *, columns: Mapping[str, str] | None = None, experts: str | None = None, split: str | None = None
) -> Sequence[Record]:
    """Records of whatever a data module takes.

    Args:
        source: a path or Hub name, records, rows (mappings), a ``datasets.Dataset``, or a list of paths,
            which are read one after the other.
        columns: as of ``read_records``, for all but records.
        experts: as of ``read_records``.
        split: as of ``read_records``, for paths.

    Raises:
        DataError: a row is malformed.
        ConfigError: none of these.
    """
    if isinstance(source, str | Path):
        return read_records(str(source), split=split, experts=experts, columns=columns)
    records = _given_records(source, columns, split)
    return attach_experts(records, experts) if experts else records


def _given_records(source: Any, columns: Mapping[str, str] | None, split: str | None) -> Sequence[Record]:
    if hasattr(source, "column_names") and hasattr(source, "with_format"):
        if isinstance(source, Mapping):
            raise ConfigError(
                f"data: expected one split of a DatasetDict, found all: {sorted(source)}; give the splits to train, val and test"
            )
        rows = source.with_format(None)
        refuse_missing_columns(columns, rows.column_names, "dataset:row 0")
        return LazyRecords(partial(parsed_row, rows, "dataset", columns), len(rows))
    if not isinstance(source, Sequence):
        raise ConfigError(f"data: expected a path, records, a list of rows or a datasets.Dataset, found {type(source).__name__}")
    if all(isinstance(item, Record) for item in source):
        return source
    if all(isinstance(item, str | Path) for item in source):
        return joined_sequences([read_records(str(item), split=split, columns=columns) for item in source])
    for i, row in enumerate(source):
        if not isinstance(row, Mapping):
            raise ConfigError(f"data: expected records, rows or paths, and one kind of them; found {type(row).__name__} at {i}")
    refuse_missing_columns(columns, sorted({name for row in source for name in row}), "rows:row 0")
    return [parse_record(row, f"rows:row {i}", columns) for i, row in enumerate(source)]
