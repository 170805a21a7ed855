"""Digests of what was written, checked when it is read: a flipped bit is an error, not another result.

A file's digest is the SHA-256 of the SHA-256 of its blocks, so that several threads can check one file. A sealed file carries its digest
at its end, in one piece with what it is of: a copy keeps it, and no crash parts the two. Sealed JSON carries it as its last entry.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from aapa_lightning.errors import ConfigError, in_one_line
from aapa_lightning.files import write_text

#: Bytes that are hashed as one.
BLOCK = 2**26
_PIECE = 2**20
_MARK = b"\naapa-sha256 "
_TRAILER = len(_MARK) + 64 + 1
#: How a zip file without a comment, such as those of ``torch.save``, ends: this, and 18 bytes of which the last two are zero.
_END_OF_ZIP, _END_BYTES = b"PK\x05\x06", 22


class Digesting:
    """A binary file that remembers the digest of what is written to it, from the first byte to the last.

    Args:
        file: opened for writing, empty.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._blocks: list[bytes] = []
        self._open, self._room = hashlib.sha256(), BLOCK

    def write(self, data: Any) -> int:
        """Write bytes or a buffer."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        rest = view
        while len(rest):
            part, rest = rest[: self._room], rest[self._room :]
            self._open.update(part)
            self._room -= len(part)
            if not self._room:
                self._blocks.append(self._open.digest())
                self._open, self._room = hashlib.sha256(), BLOCK
        return len(view)

    def flush(self) -> None:
        """As of the file."""
        self._file.flush()

    def seal(self) -> None:
        """Write the digest of all that was written."""
        digests = [*self._blocks, self._open.digest()] if self._room < BLOCK else self._blocks
        self._file.write(_MARK + _of_blocks(digests).encode() + b"\n")


def _of_blocks(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


def file_digest(path: str | os.PathLike[str], size: int | None = None) -> str:
    """Digest of the first ``size`` bytes of a file, or of all; several threads read it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        end = os.fstat(handle).st_size if size is None else size
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return _of_blocks(pool.map(lambda start: range_digest(handle, start, min(start + BLOCK, end)), range(0, end, BLOCK)))
    finally:
        os.close(handle)


def range_digest(handle: int, start: int, stop: int) -> bytes:
    """SHA-256 of bytes ``start`` to ``stop`` of an open file; of fewer, where it ends before."""
    digest = hashlib.sha256()
    while start < stop and (piece := os.pread(handle, min(_PIECE, stop - start), start)):
        digest.update(piece)
        start += len(piece)
    return digest.digest()


def range_digests(path: str | os.PathLike[str], bounds: Sequence[int]) -> bytes:
    """SHA-256 of every stretch of a file between two neighbouring bounds, 32 bytes each."""
    with open(path, "rb") as file:
        return b"".join(range_digest(file.fileno(), start, stop) for start, stop in itertools.pairwise(bounds))


def check_sealed(path: str | os.PathLike[str], advice: str) -> None:
    """Refuse a file that is not what was written.

    A zip file without a digest, which ``torch.save`` or another library wrote, is checked by the CRC of its entries.

    Args:
        path: what ``Digesting`` wrote and sealed.
        advice: how to go on without it.

    Raises:
        ConfigError: it is damaged, cut short, or neither sealed nor a zip file.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(size - _TRAILER, 0))
        end = file.read()
    if end.startswith(_MARK):
        if end[len(_MARK) :] != file_digest(path, size - _TRAILER).encode() + b"\n":
            raise ConfigError(f"{path} is damaged: its bytes are not those that were written (SHA-256); {advice}")
        return
    last = end[-_END_BYTES:]
    if not (last.startswith(_END_OF_ZIP) and last.endswith(b"\0\0")):
        raise ConfigError(f"{path} is not a checkpoint of tensors and primitives, or is damaged: it has no digest at its end; {advice}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged directory fails in many ways
        damaged = in_one_line(error)
    if damaged is not None:
        raise ConfigError(f"{path} is damaged: its bytes are not those that were written (CRC of {damaged}); {advice}")


def write_sealed_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write a JSON object with its own digest as the last entry, atomically."""
    write_text(path, _sealed(value))


def _sealed(value: Mapping[str, Any]) -> str:
    plain = json.dumps(value, indent=2, ensure_ascii=False)
    return json.dumps({**value, "sha256": hashlib.sha256(plain.encode()).hexdigest()}, indent=2, ensure_ascii=False) + "\n"


def read_sealed_json(path: str | os.PathLike[str], advice: str) -> dict[str, Any]:
    """Read what ``write_sealed_json`` wrote.

    Args:
        path: the file.
        advice: how to go on without it.

    Raises:
        ConfigError: it is missing, or a byte is not what was written.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}); {advice}") from error
    try:
        value = json.loads(content)
        value.pop("sha256")
        whole = _sealed(value).encode() == content
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise ConfigError(f"{path} is damaged or of an earlier version: its bytes are not those that were written (SHA-256); {advice}")
    found: dict[str, Any] = value
    return found


def write_digests(folder: str | os.PathLike[str], name: str) -> None:
    """Write the digest of every file of a folder into its file ``name``."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != name)
    write_sealed_json(Path(folder) / name, {str(path.relative_to(folder)): file_digest(path) for path in files})


def check_digests(folder: str | os.PathLike[str], name: str, advice: str) -> None:
    """Refuse a folder in which a file is not what ``write_digests`` found, or is gone; files that came later are no matter.

    Raises:
        ConfigError: the file is named.
    """
    for file, digest in read_sealed_json(Path(folder) / name, advice).items():
        path = Path(folder) / file
        if not path.is_file() or file_digest(path) != digest:
            raise ConfigError(f"{path} is damaged or missing: its bytes are not those that were written (SHA-256); {advice}")
