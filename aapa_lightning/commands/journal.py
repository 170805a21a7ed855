"""A file that grows row by row, survives being killed, and appears under its name when it is whole.

Rows go to ``FILE.partial``, one JSON object a line; ``FILE.meta.json`` says what they were made from. A run that resumes drops a line that
was cut short and goes on after the last whole batch. When every row is there, a JSONL file gets its name in one step; a Parquet file is
made from the rows, row group by row group, and then gets its name in one step.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from aapa_lightning.documents import parse_json
from aapa_lightning.errors import ConfigError
from aapa_lightning.files import atomic_write, write_json
from aapa_lightning.system import writing

_GROUP = 1000  # rows of a Parquet row group


class Journal:
    """The rows of an output file.

    Args:
        path: the file to make, ``.jsonl`` or ``.parquet``.
        meta: what the rows are made from; a resumed run must have the same.
        resume: go on with what is there.
        batch: rows that are made together; a resumed run begins at a multiple of it, so that it makes the rows of an uninterrupted one.

    Raises:
        ConfigError: another suffix; a file is there and ``resume`` is false; ``meta`` is another; the folder cannot be written; or a second
            process is at work.
    """

    def __init__(self, path: str | Path, meta: Mapping[str, Any], *, resume: bool, batch: int) -> None:
        self.path = Path(path)
        check_output(self.path, resume=resume)
        self.partial, self.note = _beside(self.path)
        self.meta = json.loads(json.dumps(meta))
        self.complete = resume and self.path.exists()
        # Without a row there is nothing to go on with: a run may be stopped before it has said what it was made from.
        if resume and (self.complete or (self.partial.exists() and self.partial.stat().st_size)):
            self._compare()
        self.rows = self.meta.get("rows", 0) if self.complete else 0
        self._file: BinaryIO | None = None
        if self.complete:
            self.partial.unlink(missing_ok=True)  # a run may be stopped after the Parquet file has its name
            return
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.partial, "ab+")  # noqa: SIM115 - closed by __exit__
            _lock(self._file, self.partial)
            write_json(self.note, self.meta)
        self.rows = _keep_whole_batches(self._file, batch, self.meta.get("rows"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add the rows of a batch, and hand them to the system before returning."""
        if self._file is None:
            raise ValueError(f"{self.path} is complete")
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows]
        self._file.write(b"".join(lines))
        self._file.flush()
        self.rows += len(lines)

    def finish(self, schema: Any = None) -> None:
        """Give the file its name.

        Args:
            schema: pyarrow schema, for Parquet.
        """
        if self._file is None:
            return
        os.fsync(self._file.fileno())
        if self.path.suffix == ".parquet":
            _write_parquet(self.path, self.partial, schema)
            self.partial.unlink(missing_ok=True)
        else:
            os.replace(self.partial, self.path)
        self.complete = True

    def _compare(self) -> None:
        try:
            found = parse_json(self.note.read_bytes(), "the note")
        except (OSError, ConfigError) as error:
            raise ConfigError(
                f"{self.note}: expected what {self.path.name} was made from, found no readable file ({error}); {self._start_anew()}"
            ) from error
        found = found if isinstance(found, dict) else {}
        for name in [name for name, value in self.meta.items() if found.get(name) != value]:
            raise ConfigError(
                f"--resume: {self.path} was begun with another value of {name}: expected {_short(found.get(name))}, found "
                f"{_short(self.meta[name])}; resume with the same, name another --out, or {self._start_anew()}"
            )

    def _start_anew(self) -> str:
        return f"remove {self.path.name}, {self.partial.name} and {self.note.name} to start anew"


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"{path} is being written by another process; wait for it, or name another --out") from error


def _keep_whole_batches(file: BinaryIO, batch: int, rows: int | None) -> int:
    """Cut the file after the last whole batch of sound rows; returns how many rows are left."""
    file.seek(0)
    whole = end = kept = 0
    for count, line in enumerate(file, start=1):
        if not _is_row(line):
            break
        end += len(line)
        if count % batch == 0 or count == rows:
            whole, kept = end, count
    file.truncate(whole)
    return kept


def check_output(path: Path, *, resume: bool) -> None:
    """Raise ConfigError for a suffix that is not known, a folder, or output that is there without ``resume``."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"--out {path}: expected a name that ends with .jsonl or .parquet")
    with writing(path):
        if path.is_dir():
            raise ConfigError(f"--out {path} is a folder; expected the name of a file")
        for file in (path, _beside(path)[0]):
            if file.exists() and not resume:
                raise ConfigError(f"{file} already exists; go on with --resume, name another --out, or remove it")


def check_not_input(out: str, **inputs: str | None) -> None:
    """Raise ConfigError where the output is one of the files that are read: option ``--name`` is ``inputs[name]``."""
    with writing(out):
        for name, given in inputs.items():
            if given and os.path.exists(given) and os.path.exists(out) and os.path.samefile(given, out):
                raise ConfigError(f"--out {out} is the file of --{name}, which would be lost; name another --out")


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_name(path.name + ".partial"), path.with_name(path.name + ".meta.json")


def _is_row(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _short(value: Any) -> str:
    return str(value)[:12] if isinstance(value, str) else str(value)


def _rows(partial: Path) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    with open(partial, "rb") as file:
        for line in file:
            group.append(json.loads(line))
            if len(group) == _GROUP:
                yield group
                group = []
    if group:
        yield group


def _write_parquet(path: Path, partial: Path, schema: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = {field.name for field in schema if field.type == pa.string()}
    with atomic_write(path) as file, pq.ParquetWriter(file, schema) as writer:
        for rows in _rows(partial):
            plain = [{name: str(v) if name in texts and v is not None else v for name, v in row.items()} for row in rows]
            writer.write_table(pa.Table.from_pylist(plain, schema))
