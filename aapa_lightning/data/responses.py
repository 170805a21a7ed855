"""Response files: JSONL of responses to the prompts of a dataset, joined to its records by key, else by prompt.

A row is ``{"key": ..., "prompt": ..., "response": "...", "temperature": 1.0, "sample": 0, "truncated": false}``; ``response`` and one of
``key`` and ``prompt`` are required. ``prompt_end`` says that the prompt, as the policy read it, ends with a tag that opens a
thought. Other columns (such as verdicts) are kept in ``Response.extra``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aapa_lightning.data.dialects import prompt_hash
from aapa_lightning.data.fields import parse_prompt, scalar_key, text
from aapa_lightning.data.jsonl import iter_lines, parse_line
from aapa_lightning.errors import DataError, shown
from aapa_lightning.types import Record


@dataclass(frozen=True, slots=True)
class Response:
    """One row of a response file.

    Args:
        key: key of the record it answers, or None.
        prompt_hash: hash of the prompt it answers, or None where the file gives keys alone.
        text: the response; may be empty.
        source: ``file:line``.
        temperature: sampling temperature, where known.
        sample: which sample of the prompt, from 0.
        truncated: stopped by the length limit.
        prompt_end: the tag that opens a thought where the policy's prompt ends with it, so that the response begins inside the thought.
        extra: every other column.
    """

    key: str | None
    prompt_hash: str | None
    text: str
    source: str
    temperature: float | None = None
    sample: int = 0
    truncated: bool = False
    prompt_end: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


def parse_response(row: Mapping[str, Any], source: str) -> Response:
    """Validate one row. Raises DataError that names ``source``."""
    columns = {name: value for name, value in row.items() if value is not None}
    if "response" not in columns:
        raise DataError(f"{source}: no response; expected a column 'response', found columns {shown(sorted(map(str, row)), 400)}")
    key = scalar_key(columns.pop("key", None), source)
    prompt = parse_prompt(columns.pop("prompt"), source) if "prompt" in columns else None
    if key is None and prompt is None:
        raise DataError(f"{source}: neither 'key' nor 'prompt'; one of them must say which record the response answers")
    return Response(
        key=key,
        prompt_hash=None if prompt is None else prompt_hash(prompt),
        text=text(columns.pop("response"), "response", source, allow_empty=True),
        source=source,
        temperature=_number(columns.pop("temperature", None), "temperature", source),
        sample=_typed(columns.pop("sample", 0), int, "sample", "a whole number", source),
        truncated=_typed(columns.pop("truncated", False), bool, "truncated", "true or false", source),
        prompt_end=text(columns.pop("prompt_end", ""), "prompt_end", source, allow_empty=True),
        extra=columns,
    )


def read_responses(path: str | Path) -> list[Response]:
    """Read and validate a response file. Raises DataError with ``file:line``, or when the file is empty."""
    responses = [parse_response(parse_line(source, line), source) for source, line in iter_lines(path)]
    if not responses:
        raise DataError(f"{path} holds no responses; expected one JSON object a line with 'response' and 'key' or 'prompt'")
    return responses


def response_row(record: Record, response: str, *, temperature: float, sample: int, truncated: bool, **extra: Any) -> dict[str, Any]:
    """The row of a response to ``record``, which ``read_responses`` reads back."""
    prompt = record.prompt if isinstance(record.prompt, str) else list(record.prompt)
    key = {} if record.key is None else {"key": record.key}
    return {**key, "prompt": prompt, "response": response, "temperature": temperature, "sample": sample, "truncated": truncated, **extra}


def join_responses(records: Sequence[Record], responses: Iterable[Response]) -> list[list[Response]]:
    """Responses of each record, in file order: by key where the response has one and a record has the same, else by prompt.

    Responses to prompts that are not among the records are left out.

    Raises:
        DataError: nothing matches, or a key matches a record with another prompt (keys of two different datasets).
    """
    by_key: dict[str, list[int]] = defaultdict(list)
    by_prompt: dict[str, list[int]] = defaultdict(list)
    hashes: list[str] = []
    for i, record in enumerate(records):
        hashes.append(prompt_hash(record.prompt))
        by_prompt[hashes[i]].append(i)
        if record.key is not None:
            by_key[record.key].append(i)
    joined: list[list[Response]] = [[] for _ in hashes]
    first: Response | None = None
    for response in responses:
        first = first or response
        by_its_key = by_key.get(response.key, []) if response.key is not None else []
        for i in by_its_key or by_prompt.get(response.prompt_hash or "", []):
            if response.prompt_hash not in (None, hashes[i]):
                raise DataError(
                    f"{response.source}: key {shown(response.key)} is also that of {records[i].source}, but the prompts differ; "
                    "the file answers another dataset: remove the keys or make them unique"
                )
            joined[i].append(response)
    if first is not None and not any(joined):
        raise DataError(
            f"{first.source}: no response matches a record by key or prompt; expected keys such as {_example_key(by_key)}, "
            f"found {shown(first.key)}; check that both files belong to the same dataset"
        )
    return joined


def _example_key(by_key: Mapping[str, Any]) -> str:
    return repr(next(iter(by_key))) if by_key else "none (the records have no keys: give the responses prompts)"


def _typed(value: Any, kind: type[int], what: str, expected: str, source: str) -> Any:
    if type(value) is not kind or not -(2**63) <= value < 2**63:  # Parquet holds no more
        raise DataError(f"{source}: '{what}' must be {expected}, found {shown(value)}")
    return value


def _number(value: Any, what: str, source: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DataError(f"{source}: '{what}' must be a finite number, found {shown(value)}")
    return number
