"""JSON Lines, read and written line by line, with ``file:line`` in every error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aapa_lightning.errors import DataError
from aapa_lightning.files import atomic_write


def iter_lines(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """Yield ``(file:line, raw line)`` for every line that is not blank, from line 1. Raises DataError when the file cannot be read."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; expected a JSONL file, one JSON object a line") from error


def parse_line(source: str, line: bytes) -> dict[str, Any]:
    """Decode one line into a JSON object. Raises DataError that names ``source``."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: expected UTF-8 text, found byte {line[error.start]:#04x} at column {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{source}: malformed JSON ({error.msg}, column {error.colno}); expected one JSON object a line") from error
    except RecursionError as error:
        raise DataError(f"{source}: JSON nested too deeply") from error
    if not isinstance(row, dict):
        raise DataError(f"{source}: expected a JSON object, found {type(row).__name__}; write one object a line")
    return row


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows, one JSON object a line. The file appears whole or not at all."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
