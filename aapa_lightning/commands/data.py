"""``aapa data``: check a dataset, train a tokenizer, write the synthetic world; ``pairs.py`` and ``partition.py`` have more."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aapa_lightning.commands import pairs, partition
from aapa_lightning.commands.columns import add_column_option, parse_columns
from aapa_lightning.console import say
from aapa_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="validate every record", epilog="example: aapa data check train.jsonl --json")
    check.add_argument("path", help="JSONL or Parquet file, or a datasets name or folder")
    check.add_argument("--split", help="split of a datasets name or folder")
    check.add_argument("--experts", metavar="FILE", help="response file whose responses become the experts")
    add_column_option(check)
    check.add_argument("--tokenizer", help="folder or name; lengths are then tokens and the limits count")
    check.add_argument("--chat-template", metavar="FILE", help="chat template in the place of the tokenizer's own: a file or a name")
    check.add_argument("--max-prompt-tokens", type=int, default=1024, help="limit on prompts (default: %(default)s)")
    check.add_argument("--max-response-tokens", type=int, default=1024, help="limit on experts (default: %(default)s)")
    check.add_argument("--errors", type=int, default=20, help="errors to list; all are counted (default: %(default)s)")
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    tokenizer = actions.add_parser(
        "tokenizer", help="train a byte-level BPE", epilog="example: aapa data tokenizer train.jsonl --out tokenizer"
    )
    tokenizer.add_argument("paths", nargs="+", metavar="PATH", help="record files; prompts and experts are learnt from")
    tokenizer.add_argument("--experts", metavar="FILE", help="response file whose responses are learnt from too")
    add_column_option(tokenizer)
    tokenizer.add_argument("--vocab-size", type=int, default=8192, help="tokens at most (default: %(default)s)")
    tokenizer.add_argument("--out", required=True, help="folder to write")
    world = actions.add_parser("synthetic", help="write the synthetic instruction world", epilog="example: aapa data synthetic --out world")
    world.add_argument("--out", required=True, help="folder to write")
    world.add_argument("--train", type=int, default=2000, help="training records (default: %(default)s)")
    world.add_argument("--val", type=int, default=200, help="validation records (default: %(default)s)")
    world.add_argument("--test", type=int, default=200, help="test records (default: %(default)s)")
    world.add_argument("--seed", type=int, default=0, help="seed of the draw (default: %(default)s)")
    world.add_argument("--vocab-size", type=int, default=600, help="tokens of its tokenizer (default: %(default)s)")
    pairs.add_actions(actions)
    partition.add_actions(actions)


def run(args: argparse.Namespace) -> int:
    """Run the chosen action."""
    table = {"check": _check, "tokenizer": _tokenizer, "synthetic": _synthetic, **pairs.ACTIONS, **partition.ACTIONS}
    return table[args.action](args)


def _synthetic(args: argparse.Namespace) -> int:
    from aapa_lightning.data.synthetic import write_world

    folder = write_world(args.out, train=args.train, val=args.val, test=args.test, seed=args.seed, vocab_size=args.vocab_size)
    say(f"written to {folder}")
    return 0


def _tokenizer(args: argparse.Namespace) -> int:
    from aapa_lightning.data.records import prompt_text, read_records
    from aapa_lightning.data.tokenizer import train_tokenizer
    from aapa_lightning.files import whole_folder

    columns = parse_columns(args.column)
    records = (record for path in args.paths for record in read_records(path, experts=args.experts, columns=columns))
    texts = (text for record in records for text in (prompt_text(record.prompt), *record.experts))
    tokenizer = train_tokenizer(texts, args.vocab_size)
    with whole_folder(args.out) as folder:
        tokenizer.save_pretrained(folder)
    say(f"{len(tokenizer)} tokens, written to {args.out}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from aapa_lightning.data.check import check_dataset
    from aapa_lightning.data.prompt_format import PromptFormat
    from aapa_lightning.policy import PolicySpec, load_tokenizer

    if args.chat_template and not args.tokenizer:
        raise ConfigError("--chat-template: expected --tokenizer beside it, found none")
    tokenizer = load_tokenizer(PolicySpec(tokenizer=args.tokenizer, chat_template=args.chat_template)) if args.tokenizer else None
    limits = PromptFormat(max_prompt_tokens=args.max_prompt_tokens, max_response_tokens=args.max_response_tokens)
    report = check_dataset(
        args.path,
        split=args.split,
        experts=args.experts,
        columns=parse_columns(args.column),
        tokenizer=tokenizer,
        fmt=limits,
        eos_token_ids=_ends(args.tokenizer, tokenizer) if tokenizer is not None else (),
        limit=args.errors,
    )
    say(json.dumps(report.to_dict()) if args.json else "\n".join(report.lines()))
    return 0 if report.ok else 2


def _ends(folder: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a response: the tokenizer's, and those of a generation config that lies beside it."""
    from transformers import GenerationConfig

    found: Any = None
    with suppress(OSError, ValueError):  # a tokenizer need not come with one
        found = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    ids = {tokenizer.eos_token_id, *(found if isinstance(found, list) else [found])}
    return tuple(sorted(token for token in ids if isinstance(token, int)))
