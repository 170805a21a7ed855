"""One number for each response of a file: a column of its own, or of a second file with a row for each response."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from aapa_lightning.data.dialects import prompt_hash
from aapa_lightning.data.fields import parse_prompt, scalar_key
from aapa_lightning.data.jsonl import iter_lines, parse_line
from aapa_lightning.data.responses import Response
from aapa_lightning.errors import DataError, choose, shown


def _mean(values: Sequence[float]) -> float:
    try:
        return fmean(values)
    except OverflowError:  # of their sum, not of their mean
        return sum(value / len(values) for value in values)


#: What becomes of a list, such as the verdicts on several instructions; ``min`` of verdicts is 1 where all are true.
REDUCERS: dict[str, Callable[[Sequence[float]], float]] = {"mean": _mean, "min": min}

_LABELS = ("line", "key", "prompt", "sample", "temperature")


def attach_scores(responses: Sequence[Response], path: str | Path) -> list[Response]:
    """Responses with the columns of the file that ``aapa score`` or ``aapa evaluate`` made of theirs: a row each, in their order.

    Args:
        responses: as ``read_responses`` gives them.
        path: JSONL; each row names its response by ``key``, ``prompt`` or ``line``, and ``sample`` and ``temperature`` where it has them.

    Raises:
        DataError: a row too few or too many, or one that names another response.
    """
    lines = list(iter_lines(path))
    if len(lines) != len(responses):
        file = responses[0].source.rpartition(":")[0] if responses else "the response file"
        raise DataError(
            f"{path} has {len(lines)} rows, {file} has {len(responses)} responses; expected a row for each, in their order: "
            "score that file again"
        )
    return [_with_columns(response, parse_line(source, line), source) for response, (source, line) in zip(responses, lines, strict=True)]


def response_score(response: Response, column: str, reduce: str = "mean") -> float:
    """The number in a column: a number, true (1) or false (0), or a list of them, reduced.

    Args:
        response: with the column in ``extra``.
        column: its name.
        reduce: what becomes of a list, ``mean`` or ``min``.

    Raises:
        DataError: the column is missing or holds anything else; names the response.
        ConfigError: an unknown ``reduce``.
    """
    reducer = choose(REDUCERS, reduce, "reduce")
    own = {name: getattr(response, name) for name in ("temperature", "sample", "truncated")}
    value = response.extra.get(column, own.get(column))
    if value is None:
        raise DataError(
            f"{response.source}: no score; expected a column {column!r}, found {shown(sorted(response.extra), 400)}; name one of them, or "
            "the file with the scores"
        )
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(item, int | float) and _finite(item) for item in values):
        raise DataError(
            f"{response.source}: {column!r} must be a finite number, true or false, or a list of them (not empty), found {shown(value)}"
        )
    return float(reducer(values))


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _with_columns(response: Response, row: Mapping[str, Any], source: str) -> Response:
    labels = {name: row[name] for name in _LABELS if row.get(name) is not None}
    if not {"line", "key", "prompt"} & labels.keys():
        raise DataError(f"{source}: none of 'line', 'key' and 'prompt'; one of them must say which response the row is of")
    own = {
        "line": int(response.source.rpartition(":")[2]),
        "key": response.key,
        "prompt": response.prompt_hash,
        "sample": response.sample,
        "temperature": response.temperature,
    }
    if "key" in labels:
        labels["key"] = scalar_key(labels["key"], source)
    if "prompt" in labels:
        labels["prompt"] = prompt_hash(parse_prompt(labels["prompt"], source))
    for name, value in labels.items():
        if own[name] is not None and own[name] != value:
            raise DataError(
                f"{source}: the {name} differs from that of {response.source}: expected {shown(own[name])}, found {shown(value)}; both "
                "files must have their rows in one order: score that file again"
            )
    columns = {name: value for name, value in row.items() if name not in _LABELS}
    return replace(response, extra={**response.extra, **columns})
