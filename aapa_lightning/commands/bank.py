"""``aapa bank``: build a bank of expert responses with their sentence logits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aapa_lightning.commands.columns import add_column_option, parse_columns

if TYPE_CHECKING:
    from aapa_lightning.anchor.bank import ExpertBank
    from aapa_lightning.anchor.base import Discriminator
    from aapa_lightning.types import Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    example = "example: aapa bank build --data train.jsonl --discriminator runs/disc/export --out bank"
    build = actions.add_parser("build", help="score the expert responses of a dataset", epilog=example)
    build.add_argument("--data", required=True, help="records with expert responses")
    build.add_argument("--split", help="split of a datasets name or folder")
    build.add_argument("--experts", metavar="FILE", help="response file whose responses become the experts")
    build.add_argument("--missing-experts", choices=("error", "drop"), default="error", help="records without one (default: %(default)s)")
    add_column_option(build)
    build.add_argument("--discriminator", required=True, help="folder that a discriminator run exported")
    build.add_argument("--encoder", help="where the discriminator's encoder lies now, if it has moved")
    build.add_argument("--out", required=True, help="folder to write; an existing bank is replaced")
    build.add_argument("--score-thinking", action="store_true", help="keep <think> blocks, as score_thinking of the anchor does")
    build.add_argument("--batch-size", type=int, default=256, help="records scored at a time (default: %(default)s)")
    build.add_argument("--resume", action="store_true", help="go on where a build with the same inputs stopped; starts anew where none is")
    build.add_argument("--shard", metavar="I/N", help="score the I-th of N parts alone, one process each; then `aapa bank join`")
    build.add_argument("--device", default="cpu", help="where to score (default: %(default)s)")
    join = actions.add_parser("join", help="make a bank of shards", epilog="example: aapa bank join --out bank --shards 4")
    join.add_argument("--out", required=True, help="folder that the shards were built for; an existing bank is replaced")
    join.add_argument("--shards", type=int, required=True, help="number of shards")


def run(args: argparse.Namespace) -> int:
    """Build a bank or a shard of one, or join shards."""
    from aapa_lightning.anchor.bank import ExpertBank
    from aapa_lightning.errors import ConfigError

    if args.action == "join":
        if args.shards < 1:
            raise ConfigError(f"--shards: expected a whole number above 0, found {args.shards}")
        return _report(ExpertBank.join(args.out, args.shards), args.out)
    shard = _shard(args.shard)
    inputs = _inputs(args)
    options = {"batch_size": args.batch_size, "score_thinking": args.score_thinking, "resume": args.resume}
    if shard is None:
        return _report(ExpertBank.build(args.out, *inputs, **options), args.out)
    ExpertBank.build_shard(args.out, *inputs, None, shard, **options)
    print(f"shard {shard[0]} of {shard[1]} is built; when all are: aapa bank join --out {args.out} --shards {shard[1]}")
    return 0


def _inputs(args: argparse.Namespace) -> tuple[Sequence[Record], Discriminator]:
    import torch

    from aapa_lightning.anchor.load import load_discriminator
    from aapa_lightning.data.records import read_records, take
    from aapa_lightning.errors import ConfigError

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {args.device}: torch {torch.__version__} finds no GPU; use --device cpu")
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size: expected a whole number above 0, found {args.batch_size}")
    records = read_records(args.data, split=args.split, experts=args.experts, columns=parse_columns(args.column))
    if args.missing_experts == "drop":
        # numbers, not records: of a large file these stay on disk
        records = take(records, [i for i in range(len(records)) if records[i].experts])
    return records, load_discriminator(args.discriminator, encoder=args.encoder).to(args.device)


def _shard(text: str | None) -> tuple[int, int] | None:
    from aapa_lightning.errors import ConfigError

    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ConfigError(f"--shard: expected I/N with I from 1 to N, such as 2/4, found {text!r}")
    return int(number), int(count)


def _report(bank: ExpertBank, out: str) -> int:
    print(f"{len(bank)} records, written to {out}")
    if not bank.cross_fitted:
        print(
            "note: the discriminator may have been trained on these very experts, which then look better than they are; train with folds: 2"
        )
    return 0
