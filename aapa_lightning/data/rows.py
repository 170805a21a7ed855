"""Records and responses as rows that are read back as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aapa_lightning.data.fields import turn_of
from aapa_lightning.data.ground_truth import ground_truth_instructions
from aapa_lightning.data.jsonl import write_jsonl
from aapa_lightning.data.responses import Response
from aapa_lightning.errors import DataError
from aapa_lightning.types import Record, Reply


def record_row(record: Record) -> dict[str, Any]:
    """The record as a row that ``parse_record`` reads back."""
    extra = record.extra
    row: dict[str, Any] = {} if record.key is None else {"key": record.key}
    row["prompt"] = record.prompt if isinstance(record.prompt, str) else list(record.prompt)
    # Written even when empty where another column would be read in its place.
    if record.experts or {"completion", "messages"} & extra.keys():
        row["expert"] = [turn_of(expert) if isinstance(expert, Reply) else expert for expert in record.experts]
    in_ground_truth = ground_truth_instructions(extra.get("ground_truth"), record.source) is not None
    if not in_ground_truth and (record.instructions or "instruction_id_list" in extra):
        row["instructions"] = [{"id": instruction.id, "kwargs": dict(instruction.kwargs)} for instruction in record.instructions]
    return {**row, **_sides(record), **extra}


def _sides(record: Record) -> dict[str, Any]:
    """Chosen and rejected: texts, or both as turns where one has more than its content."""
    sides = {name: value for name in ("chosen", "rejected") if (value := getattr(record, name)) is not None}
    as_turns = any(isinstance(value, Reply) for value in sides.values())
    return {name: [turn_of(value)] if as_turns else value for name, value in sides.items()}


def answer_row(record: Record, response: Response) -> dict[str, Any]:
    """A row of a response file that answers ``record``; all columns of ``response`` are kept."""
    row: dict[str, Any] = {} if record.key is None else {"key": record.key}
    row["prompt"] = record.prompt if isinstance(record.prompt, str) else list(record.prompt)
    row |= {"response": response.text, "temperature": response.temperature, "sample": response.sample, "truncated": response.truncated}
    row |= {"prompt_end": response.prompt_end} if response.prompt_end else {}
    return {**row, **response.extra}


def write_rows(path: str | Path, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Write rows as JSONL, whole or not at all.

    Args:
        path: the file.
        rows: source (``file:line``) and columns of each.

    Raises:
        DataError: a column that JSON cannot hold, such as a date of a Parquet file; names the source.
    """
    current = ""

    def remembered() -> Iterator[Mapping[str, Any]]:
        nonlocal current
        for source, row in rows:
            current = source
            yield row

    try:
        write_jsonl(path, remembered())
    except (TypeError, ValueError) as error:
        raise DataError(f"{current}: a column cannot be written as JSON ({error}); remove it from the dataset") from error
