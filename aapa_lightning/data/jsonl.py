"""JSON Lines, read and written line by line, with ``file:line`` in every error."""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

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
        raise _unreadable(path, error) from error


class IndexedLines:
    """The lines of a file that are not blank, left on disk: 8 bytes of memory each.

    Args:
        path: the file; it must stay as it is.
        look: called once with ``file:line`` and every line, in order; what it raises ends the reading.

    Raises:
        DataError: the file cannot be read, or changes while it is.
    """

    def __init__(self, path: str | Path, look: Callable[[str, bytes], object]) -> None:
        self._path = path
        self._offsets = array("q")
        self._before_blank = array("q")  # for each blank line, how many others stand before it
        try:
            with open(path, "rb") as file:
                self._stamp = _stamp(file)
                self._index(file, look)
                self._refuse_change(file, str(path))
        except OSError as error:
            raise _unreadable(path, error) from error

    def _index(self, file: BinaryIO, look: Callable[[str, bytes], object]) -> None:
        offset = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                look(f"{self._path}:{number}", line)
                self._offsets.append(offset)
            else:
                self._before_blank.append(len(self._offsets))
            offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> tuple[str, bytes]:
        """``(file:line, raw line)``. Raises DataError when the file is gone or no longer the one that was read."""
        source = f"{self._path}:{index + 1 + bisect_right(self._before_blank, index)}"
        # Opened anew each time: a handle would not survive a fork or the pickling of a loader's worker.
        try:
            with open(self._path, "rb") as file:
                self._refuse_change(file, source)
                file.seek(self._offsets[index])
                return source, file.readline()
        except OSError as error:
            raise _unreadable(self._path, error) from error

    def _refuse_change(self, file: BinaryIO, source: str) -> None:
        if _stamp(file) != self._stamp:
            raise DataError(f"{source}: the file has changed since it was read; expected it to stay as it is: start again")


def _stamp(file: BinaryIO) -> tuple[int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


def _unreadable(path: str | Path, error: OSError) -> DataError:
    return DataError(f"cannot read {path}: {error.strerror or error}; expected a JSONL file, one JSON object a line")


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
    except ValueError as error:  # a whole number of thousands of digits
        raise DataError(f"{source}: malformed JSON ({error}); expected one JSON object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{source}: expected a JSON object, found {type(row).__name__}; write one object a line")
    return row


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows, one JSON object a line. The file appears whole or not at all. Raises ValueError for a number that is not finite."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows)
