"""A run's folder: its metrics file and where things lie in it."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from typing_extensions import override

from aapa_lightning.errors import ConfigError
from aapa_lightning.files import atomic_write, sweep
from aapa_lightning.sharding.files import clean
from aapa_lightning.system import writing

Row = dict[str, str]
#: Key under which a run's checkpoints keep its configuration, as YAML.
KEPT = "aapa_config"
_MOVE_AWAY = "expected the metrics that a run writes; move it away, or put the file back as it was"


def last_checkpoint(run_dir: str | os.PathLike[str]) -> Path:
    """Where a run keeps the checkpoint that ``--resume`` continues."""
    return Path(run_dir) / "checkpoints" / "last.ckpt"


def find_checkpoint(run_dir: str | os.PathLike[str]) -> Path | None:
    """A run's last checkpoint, or None where it has none yet.

    Raises:
        ConfigError: it is a link to a folder that is not there, as in a copy without hidden folders.
    """
    last = last_checkpoint(run_dir)
    if last.exists():
        return last
    if last.is_symlink():
        raise ConfigError(
            f"{last} leads to {os.readlink(last)}, which is not there: a sharded checkpoint lies in a hidden folder beside its link; copy "
            "the folder of the run again with all that is hidden in it (cp -a), or name another checkpoint with --ckpt_path"
        )
    return None


def holds_run(run_dir: Path) -> bool:
    """Return whether the folder has anything but the configuration, an empty log and hidden files, which a run that failed early leaves."""
    return run_dir.is_dir() and any(path.name not in ("config.yaml", "tensorboard") and path.name[0] != "." for path in run_dir.iterdir())


def check_beginning(run_dir: Path) -> None:
    """Refuse ``--resume`` of a run without a checkpoint, unless it was stopped before its first.

    Raises:
        ConfigError: no run has begun there; or its checkpoints are gone, and starting anew would write over what it made.
    """
    last = last_checkpoint(run_dir)
    if not (run_dir / "config.yaml").exists():
        raise ConfigError(f"--resume: no checkpoint at {last}, and no run that has begun; leave --resume out to start it")
    made = [path for path in (*sorted(last.parent.glob("*.ckpt")), run_dir / "export") if os.path.lexists(path)]
    if made:
        raise ConfigError(
            f"--resume: no checkpoint at {last}, but the run has made {made[0]}, which starting anew would write over; name a checkpoint "
            "with --ckpt_path, put last.ckpt back, or choose another folder with --run_dir"
        )


def sweep_run(run_dir: Path) -> None:
    """Remove what killed processes left in a run's folder: temporary files, parts of responses, replaced checkpoint folders."""
    for folder, below, _ in os.walk(run_dir):
        sweep(Path(folder))
        below[:] = [name for name in below if not name.startswith(".")]
    for part in run_dir.glob(".responses.jsonl.rank*"):
        part.unlink(missing_ok=True)
    for link in last_checkpoint(run_dir).parent.glob("*.ckpt"):
        if link.is_symlink() and link.exists():
            clean(link)


class RunBoard(TensorBoardLogger):
    """TensorBoard's files of a run, of which a start that fails writes none: nothing is on disk before ``begin``."""

    _begun = False
    _held: tuple[Any, ...] | None = None

    @property
    @override
    def experiment(self) -> Any:
        """TensorBoard's writer; before ``begin``, when the Trainer asks all loggers for theirs, one that writes nothing."""
        return super().experiment if self._begun else _DummyExperiment()

    @rank_zero_only
    def begin(self) -> None:
        """Write from now on, first what was held back."""
        self._begun = True
        if self._held is not None:
            super().log_hyperparams(*self._held)
            self._held = None

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Any = None, step: int | None = None) -> None:
        """Record hyper-parameters, or hold them back."""
        if self._begun:
            super().log_hyperparams(params, metrics, step)
        else:
            self._held = (params, metrics, step)

    @override
    @rank_zero_only
    def save(self) -> None:
        """Write what is buffered."""
        if self._begun:
            super().save()


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
    def check(self) -> None:
        """Raise ConfigError for a file that cannot be gone on with, before anything is written."""
        if os.path.lexists(self.path):
            read_rows(self.path)

    @rank_zero_only
    def trim(self, step: int) -> None:
        """Keep the rows of the first ``step`` optimiser steps; drop later ones and a half-written last line."""
        if self.path.exists():
            self._columns, rows = read_rows(self.path)
            self._rewrite([row for row in rows if int(row["step"]) < step])
        if step and not self._last and (self.path.parent / "config.yaml").exists():  # not where a run goes on from another's checkpoint
            rank_zero_warn(f"{self.path}: the rows of the {step} steps before this resume are gone; it begins with the next")

    def _write(self, row: Row, replace: bool) -> None:
        with writing(self.path), open(self.path, "r+b", buffering=0) as file:
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
        ConfigError: the file cannot be read, does not start with a ``step`` column, or holds other lines than rows.
    """
    try:
        content = Path(path).read_bytes()
        text = content[: content.rfind(b"\n") + 1].decode()
        lines = list(csv.reader(io.StringIO(text)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read {path} ({getattr(error, 'strerror', None) or error}); {_MOVE_AWAY}") from error
    if not lines:
        return ["step"], []
    columns, *rows = lines[0], *filter(None, lines[1:])
    if columns[0] != "step":
        raise ConfigError(f"{path}: expected a first column named step, found {str(columns[:3])[:200]}; {_MOVE_AWAY}")
    for number, row in enumerate(rows, 2):
        if len(row) != len(columns) or not (row[0].isascii() and row[0].isdecimal()):
            raise ConfigError(
                f"{path}: line {number}: expected {len(columns)} values, the first a step, found {str(row)[:200]}; remove the line"
            )
    return columns, [dict(zip(columns, row, strict=True)) for row in rows]


def _line(fields: list[str]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(fields)
    return buffer.getvalue().encode()


def _text(value: Any) -> str:
    number = value.item() if hasattr(value, "item") else value
    return repr(number) if isinstance(number, float) else str(number)
