"""``aapa data split`` and ``aapa data disjoint``: datasets divided by prompt."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from aapa_lightning.commands.columns import add_column_option, parse_columns
from aapa_lightning.console import say
from aapa_lightning.errors import ConfigError


def add_actions(actions: Any) -> None:
    """Add the actions to those of ``aapa data``."""
    split = actions.add_parser(
        "split",
        help="divide a dataset by prompt",
        epilog="example: aapa data split train.jsonl --parts rm=0.5,policy=0.5 --out parts",
    )
    split.add_argument("path", help="JSONL or Parquet file, or a datasets name or folder")
    split.add_argument("--split", help="split of a datasets name or folder")
    add_column_option(split)
    split.add_argument("--parts", required=True, metavar="NAME=SHARE,...", help="parts and their shares of the prompts, together 1")
    split.add_argument("--seed", type=int, default=0, help="another seed, another division (default: %(default)s)")
    split.add_argument("--out", required=True, metavar="FOLDER", help="folder to write NAME.jsonl of each part to")
    split.add_argument("--json", action="store_true", help="print the counts as JSON")
    disjoint = actions.add_parser(
        "disjoint", help="check that two datasets share no prompt", epilog="example: aapa data disjoint rm.jsonl policy.jsonl"
    )
    disjoint.add_argument("paths", nargs=2, metavar="PATH", help="JSONL or Parquet file, or a datasets name or folder")


def run_split(args: argparse.Namespace) -> int:
    """Write a file for each part."""
    from aapa_lightning.commands.journal import check_not_input, writing
    from aapa_lightning.data.partition import split_by_prompt
    from aapa_lightning.data.records import prompt_hash, read_records
    from aapa_lightning.data.rows import record_row, write_rows

    shares = _shares(args.parts)
    files = {name: str(Path(args.out) / f"{name}.jsonl") for name in shares}
    for file in files.values():
        check_not_input(file, path=args.path)
    parts = split_by_prompt(read_records(args.path, split=args.split, columns=parse_columns(args.column)), shares, args.seed)
    report = {}
    for name, part in parts.items():
        with writing(files[name]):
            write_rows(files[name], ((record.source, record_row(record)) for record in part))
        report[name] = {"file": files[name], "records": len(part), "prompts": len({prompt_hash(record.prompt) for record in part})}
    lines = [f"{cell['records']} records with {cell['prompts']} prompts, written to {cell['file']}" for cell in report.values()]
    say(json.dumps(report) if args.json else "\n".join(lines))
    return 0


def run_disjoint(args: argparse.Namespace) -> int:
    """Check that two datasets have no prompt in common."""
    from aapa_lightning.data.partition import require_disjoint
    from aapa_lightning.data.records import read_records

    first, second = (read_records(path) for path in args.paths)
    require_disjoint(first, second)
    say(f"no prompt in common: {args.paths[0]} ({len(first)} records), {args.paths[1]} ({len(second)} records)")
    return 0


ACTIONS = {"split": run_split, "disjoint": run_disjoint}


def _shares(parts: str) -> dict[str, float]:
    shares: dict[str, float] = {}
    for part in parts.split(","):
        name, _, share = part.strip().partition("=")
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name in shares or not 0 < value <= 1:
            raise ConfigError(f"--parts: expected NAME=SHARE,NAME=SHARE with different names, such as rm=0.5,policy=0.5; found {part!r}")
        shares[name] = value
    return shares
