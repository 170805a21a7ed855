"""``aapa bank``: build a bank of expert responses with their sentence logits."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from aapa_lightning.commands.columns import add_column_option, parse_columns
from aapa_lightning.commands.devices import add_device_options, on_devices, pick_devices
from aapa_lightning.commands.thinking import add_thinking_options, parse_thinking
from aapa_lightning.console import say

if TYPE_CHECKING:
    from aapa_lightning.anchor.bank import ExpertBank
    from aapa_lightning.anchor.bank_build import PartWriter


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
    build.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the encoder's weights")
    build.add_argument("--out", required=True, help="folder to write; an existing bank is replaced")
    add_thinking_options(build)
    build.add_argument("--batch-size", type=int, default=256, help="records scored at a time (default: %(default)s)")
    build.add_argument("--resume", action="store_true", help="go on where a build with the same inputs stopped; starts anew where none is")
    build.add_argument("--shard", metavar="I/N", help="score the I-th of N parts alone, on a machine each; then `aapa bank join`")
    add_device_options(build)
    join = actions.add_parser("join", help="make a bank of shards", epilog="example: aapa bank join --out bank --shards 4")
    join.add_argument("--out", required=True, help="folder that the shards were built for; an existing bank is replaced")
    join.add_argument("--shards", type=int, required=True, help="number of shards")


def run(args: argparse.Namespace) -> int:
    """Build a bank or a shard of one, or join shards."""
    from aapa_lightning.anchor.bank import ExpertBank
    from aapa_lightning.anchor.bank_build import build_parts
    from aapa_lightning.errors import ConfigError
    from aapa_lightning.system import check_folder

    if args.action == "join":
        if args.shards < 1:
            raise ConfigError(f"--shards: expected a whole number above 0, found {args.shards}")
        return _report(ExpertBank.join(args.out, args.shards), args.out)
    check_folder(args.out)
    shard = _shard(args.shard)
    devices = pick_devices(args.device, args.devices)
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size: expected a whole number above 0, found {args.batch_size}")
    writer = _writer(args, shard, devices[0] if len(devices) == 1 else "cpu")
    with on_devices(partial(_writer, args, shard) if len(devices) > 1 else lambda _: writer, devices) as spread:
        build_parts(writer, shard, resume=args.resume, spread=spread)
    if args.shard:
        say(f"shard {shard[0]} of {shard[1]} is built; when all are: aapa bank join --out {args.out} --shards {shard[1]}")
        return 0
    return _report(ExpertBank.join(args.out, 1), args.out)


def _writer(args: argparse.Namespace, shard: tuple[int, int], device: str) -> PartWriter:
    from aapa_lightning.anchor.bank import ExpertBank
    from aapa_lightning.anchor.load import load_discriminator
    from aapa_lightning.data.records import read_records, take

    records = read_records(args.data, split=args.split, experts=args.experts, columns=parse_columns(args.column))
    if args.missing_experts == "drop":
        # numbers, not records: of a large file these stay on disk
        records = take(records, [i for i in range(len(records)) if records[i].experts])
    discriminator = load_discriminator(args.discriminator, encoder=args.encoder, trust_remote_code=args.trust_remote_code).to(device)
    options = {"batch_size": args.batch_size, "score_thinking": parse_thinking(args)}
    return ExpertBank.part_writer(args.out, records, discriminator, None, shard, **options)


def _shard(text: str | None) -> tuple[int, int]:
    from aapa_lightning.errors import ConfigError

    if text is None:
        return 1, 1
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ConfigError(f"--shard: expected I/N with I from 1 to N, such as 2/4, found {text!r}")
    return int(number), int(count)


def _report(bank: ExpertBank, out: str) -> int:
    say(f"{len(bank)} records, written to {out}")
    if not bank.cross_fitted:
        say(
            "note: the discriminator may have been trained on these very experts, which then look better than they are; train with folds: 2"
        )
    return 0
