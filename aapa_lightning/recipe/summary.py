"""A table over a recipe's stages, from the metrics that they wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aapa_lightning.documents import check_kinds, read_json
from aapa_lightning.errors import ConfigError
from aapa_lightning.recipe.plan import Recipe
from aapa_lightning.recipe.references import Stage

Table = dict[str, dict[str, float | None]]


@dataclass(frozen=True, slots=True)
class Summary:
    """A recipe's ``summary`` section, checked.

    Args:
        rows: row name to the stage it shows.
        metrics: column name to metric name.
        given: further rows with figures from elsewhere, to compare with.
    """

    rows: dict[str, Stage]
    metrics: dict[str, str]
    given: dict[str, dict[str, float]]


def plan_summary(recipe: Recipe) -> Summary:
    """Check the section before anything runs.

    It has ``rows`` (row name to stage name), ``columns`` (names, or column name to metric name) and possibly ``given`` (row name to column
    name to number).

    Raises:
        ConfigError: the section is malformed, or a row names no stage.
    """
    section = recipe.summary
    if not isinstance(section, dict) or not {"rows", "columns"} <= set(section) <= {"rows", "columns", "given"}:
        raise ConfigError(f"{recipe.path}: summary: expected `rows`, `columns` and possibly `given`")
    rows, columns, given = section["rows"], section["columns"], section.get("given", {})
    if not isinstance(rows, dict) or not isinstance(columns, list | dict) or not isinstance(given, dict):
        raise ConfigError(f"{recipe.path}: summary: expected mappings under rows and given, and a list or a mapping under columns")
    if not all(isinstance(name, str) for name in [*rows.values(), *(columns.values() if isinstance(columns, dict) else columns)]):
        raise ConfigError(f"{recipe.path}: summary: expected names of stages under rows and of metrics under columns, found {section!r}")
    latest = {name: stage for stage in recipe.stages for name in (stage.name, stage.base)}
    for row, name in rows.items():
        if name not in latest:
            raise ConfigError(f"{recipe.path}: summary.rows.{row}: no stage {name!r}; expected one of {', '.join(latest)}")
    metrics = dict(columns) if isinstance(columns, dict) else {str(name): str(name) for name in columns}
    for row, figures in given.items():
        numbers = isinstance(figures, dict) and all(isinstance(figure, int | float) for figure in figures.values())
        if not numbers or not set(figures) <= set(metrics):
            raise ConfigError(
                f"{recipe.path}: summary.given.{row}: expected numbers for columns among {', '.join(metrics)}, found {figures!r}"
            )
    return Summary({row: latest[name] for row, name in rows.items()}, metrics, given)


def summarise(summary: Summary, seconds: Mapping[str, float]) -> Table:
    """Collect the columns of each row.

    Args:
        summary: a metric is read from the stage's ``test_metrics.json``, with or without the prefix ``test/``; ``seconds`` is the stage's
            wall time.
        seconds: wall seconds by stage.

    Returns:
        Row name to column name to number; None where the stage did not report it.
    """
    table = {row: _row(stage, summary.metrics, seconds) for row, stage in summary.rows.items()}
    return table | {row: {column: figures.get(column) for column in summary.metrics} for row, figures in summary.given.items()}


def _row(stage: Stage, metrics: Mapping[str, str], seconds: Mapping[str, float]) -> dict[str, float | None]:
    path = Path(stage.run_dir) / "test_metrics.json"
    found: dict[str, Any] = read_json(path) if path.exists() else {}
    check_kinds(found, str(path), dict.fromkeys(found, (float, type(None))))
    found["seconds"] = seconds.get(stage.name)
    return {column: found.get(metric, found.get(f"test/{metric}")) for column, metric in metrics.items()}


def text_table(table: Table) -> str:
    """Aligned columns for a terminal; also valid Markdown."""
    columns = list(next(iter(table.values()), {}))
    rows = [["", *columns]] + [[name, *(_cell(values[column]) for column in columns)] for name, values in table.items()]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns) + 1)]
    lines = [_line(row, widths) for row in cells]
    rule = "|" + "|".join("-" * (width + 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
    return "| " + " | ".join([first, *rest]) + " |"


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) and abs(value) < 100 else f"{value:.0f}"
