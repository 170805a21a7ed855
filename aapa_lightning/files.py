"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

#: Endings of files, which no name on the Hub is read as.
_ENDINGS = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".zip", ".zst", ".bz2", ".xz", ".pkl"} | {
    ".yaml", ".yml", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".md", ".py"
}  # fmt: skip


def refuse_missing(
    name: str, expected: str = "expected a folder that is here, or a Hub name", error: type[Exception] = FileNotFoundError
) -> None:
    """Raise ``error`` for what does not exist and is spelled like a path, so that it is never looked up on the Hub.

    A path begins with ``.``, ``/`` or ``~``, ends with ``/``, has more than one slash, has the ending of a file, or names something in a
    folder that is here.

    Args:
        name: a path or a Hub name.
        expected: what was expected, for the message.
        error: what to raise.
    """
    path = Path(name)
    if path.exists():
        return
    inside = "/" in name and path.parent.is_dir()
    if inside or name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or path.suffix.lower() in _ENDINGS:
        raise error(f"{name} does not exist; {expected}")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write beside ``path``, flush to disk, then replace it in one step.

    An exception leaves an existing file as it was and no temporary file behind.

    Args:
        path: the file to write; missing parent folders are made.

    Yields:
        A binary file object.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes it private
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
