"""JSON Lines, read and written line by line, with ``file:line`` in every error."""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from aapa_lightning.errors import DataError
from aapa_lightning.files import atomic_write

#: How a gzip file begins.
GZIP = b"\x1f\x8b"
#: Longest line, in bytes.
LONGEST_LINE = 64 * 2**20
#: A compressed file may unpack to so many bytes, and larger ones to so many times their size, at most to a gibibyte.
_ALWAYS, _RATIO, _AT_MOST = 2**28, 100, 2**30


def iter_lines(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """Yield ``(file:line, raw line)`` for every line that is not blank, from line 1; of a compressed file (gzip), the unpacked lines.

    A file ``.json`` may also be one array of objects: then it yields its items as lines, counted from 1.

    Raises:
        DataError: the file cannot be read, or unpacks to more than its size explains; or a line is longer than ``LONGEST_LINE``.
    """
    try:
        with open(path, "rb") as plain, _unpacked(path, plain) as file:
            if is_array(path, file):
                yield from _items(path, file)
                return
            for number, line in enumerate(_lines(path, file), start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error


@contextmanager
def _unpacked(path: str | Path, plain: io.BufferedReader) -> Iterator[io.BufferedReader]:
    if not plain.peek(2).startswith(GZIP):
        yield plain
        return
    size = os.fstat(plain.fileno()).st_size
    with gzip.GzipFile(fileobj=plain) as file:
        yield io.BufferedReader(_Limited(file, path, min(max(_ALWAYS, _RATIO * size), _AT_MOST)))


class _Limited(io.RawIOBase):
    """Reads a compressed file, up to a limit."""

    def __init__(self, file: gzip.GzipFile, path: str | Path, limit: int) -> None:
        self._file, self._path, self._limit, self._read = file, path, limit, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._read += len(data)
        if self._read > self._limit:
            raise DataError(
                f"{self._path}: unpacks to more than {self._limit / 2**20:.0f} MiB; expected less: unpack it (gunzip) and name that file"
            )
        buffer[: len(data)] = data
        return len(data)


def _lines(path: str | Path, file: BinaryIO) -> Iterator[bytes]:
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise DataError(f"{path}:{number}: the line has more than {LONGEST_LINE // 2**20} MiB; expected one JSON object a line")
        yield line


def is_array(path: str | Path, file: io.BufferedReader) -> bool:
    """Return whether a file is one JSON array; only ``.json`` is asked."""
    named = Path(str(path).lower().removesuffix(".gz")).suffix == ".json"
    return named and file.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def may_stay_on_disk(path: str | Path) -> bool:
    """Return whether a file's lines can be found again by their place: a plain file of lines."""
    if not Path(path).is_file():
        return False
    try:
        with open(path, "rb") as file:
            return not file.peek(2).startswith(GZIP) and not is_array(path, file)
    except OSError as error:
        raise _unreadable(path, error) from error


def _items(path: str | Path, file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    data = file.read(_AT_MOST + 1)
    if len(data) > _AT_MOST:
        raise DataError(f"{path}: an array of more than {_AT_MOST // 2**20} MiB; write one JSON object a line instead")
    try:
        items = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: malformed JSON ({error}); expected an array of objects, or one object a line") from error
    for number, item in enumerate(items, start=1):
        yield f"{path}:{number}", json.dumps(item).encode()


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
        for number, line in enumerate(_lines(self._path, file), start=1):
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


def _unreadable(path: str | Path, error: Exception) -> DataError:
    return DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; expected a JSONL file, one JSON object a line")


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
