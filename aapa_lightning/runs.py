"""A run's folder: its metrics file and where things lie in it."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from typing_extensions import override

from aapa_lightning.files import atomic_write

Row = dict[str, str]


def last_checkpoint(run_dir: str | os.PathLike[str]) -> Path:
    """Where a run keeps the checkpoint that ``--resume`` continues."""
    return Path(run_dir) / "checkpoints" / "last.ckpt"


def holds_run(run_dir: Path) -> bool:
    """Whether the folder has anything but the configuration and an empty log, which a run that failed early leaves."""
    return run_dir.exists() and any(path.name not in ("config.yaml", "tensorboard") for path in run_dir.iterdir())


class MetricsCSV(Logger):
    """One row a step in ``metrics.csv``, on disk as soon as it is logged.

    What is logged several times for one step (training, then validation) is merged into one row. A metric that appears later adds a
    column. After a resume, ``trim`` removes the rows that the interrupted run wrote beyond its checkpoint, so that the file equals
    that of an uninterrupted run. Numbers are written so that they read back exactly. Only rank 0 writes.

    Args:
        run_dir: the folder that holds the file.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(run_dir) / "metrics.csv"
        self._columns: list[str] = []
        self._last: Row = {}
        self._last_offset = 0

    @property
    @override
    def name(self) -> str:
        return "metrics"

    @property
    @override
    def version(self) -> str:
        return ""

    @property
    @override
    def save_dir(self) -> str:
        return str(self.path.parent)

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved configuration lies beside the file."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the row of a step, or add to it.

        Args:
            metrics: names and numbers.
            step: optimiser steps done before this one, from 0; the last row's when left out.
        """
        if not self._columns:
            self._columns, rows = read_rows(self.path) if self.path.exists() else (["step"], [])
            self._rewrite(rows)
        step = int(self._last.get("step", 0)) if step is None else step
        row = {"step": str(step)} | {key: _text(value) for key, value in metrics.items()}
        again = self._last.get("step") == row["step"]
        row = self._last | row if again else row
        if row.keys() <= set(self._columns):
            self._write(row, again)
        else:
            self._widen(row)

    @rank_zero_only
    def trim(self, step: int) -> None:
        """Keep the rows of the first ``step`` optimiser steps; drop later ones and a half-written last line."""
        if self.path.exists():
            self._columns, rows = read_rows(self.path)
            self._rewrite([row for row in rows if int(row["step"]) < step])

    def _write(self, row: Row, replace: bool) -> None:
        with open(self.path, "r+b", buffering=0) as file:
            offset = file.seek(self._last_offset) if replace else file.seek(0, os.SEEK_END)
            file.write(_line([row.get(key, "") for key in self._columns]))
            file.truncate()
        self._last, self._last_offset = row, offset

    def _widen(self, row: Row) -> None:
        """Write the row together with the columns that it adds."""
        _, rows = read_rows(self.path)
        self._columns += [key for key in row if key not in self._columns]
        self._rewrite([old for old in rows if old["step"] != row["step"]] + [row])

    def _rewrite(self, rows: list[Row]) -> None:
        lines = [_line(self._columns)] + [_line([row.get(key, "") for key in self._columns]) for row in rows]
        with atomic_write(self.path) as file:
            file.write(b"".join(lines))
        self._last = {key: value for key, value in rows[-1].items() if value} if rows else {}
        self._last_offset = sum(map(len, lines[:-1]))


def read_rows(path: str | os.PathLike[str]) -> tuple[list[str], list[Row]]:
    """Columns and whole rows of a metrics file; a line cut short by a kill is left out.

    Raises:
        ValueError: the file does not start with a ``step`` column.
    """
    text = Path(path).read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(io.StringIO(whole)))
    if not lines:
        return ["step"], []
    if lines[0][:1] != ["step"]:
        raise ValueError(f"{path}: expected a first column named step, found {lines[0][:3]}")
    columns = lines[0]
    return columns, [dict(zip(columns, line, strict=True)) for line in lines[1:] if len(line) == len(columns) and line[0].isdigit()]


def _line(fields: list[str]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(fields)
    return buffer.getvalue().encode()


def _text(value: Any) -> str:
    number = value.item() if hasattr(value, "item") else value
    return repr(number) if isinstance(number, float) else str(number)
