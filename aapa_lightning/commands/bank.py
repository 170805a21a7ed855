"""``aapa bank``: build a bank of expert responses with their sentence logits."""

from __future__ import annotations

import argparse

from aapa_lightning.commands.columns import add_column_option, parse_columns


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
    build.add_argument("--device", default="cpu", help="where to score (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Build the bank."""
    import torch

    from aapa_lightning.anchor.bank import ExpertBank
    from aapa_lightning.anchor.load import load_discriminator
    from aapa_lightning.data.records import read_records
    from aapa_lightning.errors import ConfigError

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {args.device}: torch {torch.__version__} finds no GPU; use --device cpu")
    records = read_records(args.data, split=args.split, experts=args.experts, columns=parse_columns(args.column))
    if args.missing_experts == "drop":
        records = [record for record in records if record.experts]
    discriminator = load_discriminator(args.discriminator, encoder=args.encoder).to(args.device)
    bank = ExpertBank.build(args.out, records, discriminator, batch_size=args.batch_size, score_thinking=args.score_thinking)
    print(f"{len(bank)} records, written to {args.out}")
    if not bank.cross_fitted:
        print(
            "note: the discriminator may have been trained on these very experts, which then look better than they are; train with folds: 2"
        )
    return 0
