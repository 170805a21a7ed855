"""``--column FIELD=NAME``: fields that have another name in a dataset, as commands beside the trainer's take them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from aapa_lightning.errors import ConfigError


def add_column_option(parser: argparse.ArgumentParser) -> None:
    """Add the option; it may be given several times."""
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=NAME",
        help="the dataset's name of a field, once per field: --column expert=response",
    )


def parse_columns(pairs: Sequence[str]) -> dict[str, str]:
    """Field to column.

    Raises:
        ConfigError: a pair has no name on one side.
    """
    columns = {}
    for pair in pairs:
        field, _, name = pair.partition("=")
        if not field or not name:
            raise ConfigError(f"--column: expected FIELD=NAME, such as expert=response, found {pair!r}")
        columns[field] = name
    return columns
