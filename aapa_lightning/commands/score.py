"""``aapa score``: what a discriminator thinks of the responses of a file, and of each of their sentences."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import islice
from pathlib import Path

from aapa_lightning.commands.devices import add_device_options
from aapa_lightning.commands.thinking import add_thinking_options, parse_thinking
from aapa_lightning.console import say
from aapa_lightning.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--discriminator", required=True, help="folder that a discriminator run exported")
    parser.add_argument("--encoder", help="where the discriminator's encoder lies now, if it has moved")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the encoder's weights")
    parser.add_argument("--prompts", required=True, help="records: a JSONL or Parquet file, or a datasets name or folder")
    parser.add_argument("--split", help="split of a datasets name or folder")
    parser.add_argument("--responses", required=True, metavar="FILE", help="JSONL of responses, as `aapa predict` writes them")
    parser.add_argument("--experts", metavar="FILE", help="response file whose responses become the experts to compare with")
    parser.add_argument("--out", required=True, metavar="FILE", help="what to write, .jsonl or .parquet")
    parser.add_argument("--transform", choices=("gan_ns", "score", "gan_sat"), default="gan_ns", help="of logits (default: %(default)s)")
    parser.add_argument("--tau", type=float, default=1.0, help="temperature of the transform (default: %(default)s)")
    parser.add_argument("--pool", choices=("mean", "min", "softmin"), default="mean", help="of sentences (default: %(default)s)")
    parser.add_argument("--softmin-temperature", type=float, default=1.0, help="of the pool softmin (default: %(default)s)")
    add_thinking_options(parser)
    parser.add_argument("--batch-size", type=int, default=64, help="responses scored at a time (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on where a run with the same inputs stopped; starts anew where none is")
    add_device_options(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything, then score."""
    from transformers.utils.logging import disable_progress_bar

    from aapa_lightning.anchor.load import load_discriminator
    from aapa_lightning.anchor.signal import AnchorOptions
    from aapa_lightning.commands.devices import on_devices, pick_devices
    from aapa_lightning.commands.joined import PromptIndex, read_answers
    from aapa_lightning.commands.journal import Journal, check_not_input, check_output
    from aapa_lightning.commands.progress import Progress
    from aapa_lightning.commands.scoring import digest_records, in_batches, schema, start_scorer, survey
    from aapa_lightning.data.records import read_records, require_experts, take

    options = AnchorOptions(args.transform, args.tau, args.pool, args.softmin_temperature)
    options.check()
    thinking = parse_thinking(args)
    _check(args)
    check_not_input(args.out, prompts=args.prompts, responses=args.responses, experts=args.experts)
    check_output(Path(args.out), resume=args.resume)
    devices = pick_devices(args.device, args.devices)
    if not sys.stderr.isatty():
        disable_progress_bar()
    records = read_records(args.prompts, split=args.split, experts=args.experts)
    index = PromptIndex(records)
    found = survey(read_answers(args.responses, index), records)
    load = partial(load_discriminator, args.discriminator, encoder=args.encoder, trust_remote_code=args.trust_remote_code)
    discriminator = load()
    answered = take(records, found.positions)
    if discriminator.needs_experts:
        require_experts(answered, "the discriminator compares every response with an expert's (--experts FILE)")
        if found.alone:
            say(f"note: {found.alone} responses are the only expert response to their prompts and their own reference", error=True)
    meta = {
        "discriminator": discriminator.fingerprint(),
        "responses": found.digest,
        "prompts": digest_records(answered, experts=discriminator.needs_experts),
        "transform": args.transform,
        "tau": args.tau,
        "pool": args.pool,
        "softmin_temperature": args.softmin_temperature,
        "score_thinking": thinking.setting(),
        "rows": found.rows,
    }
    start = partial(start_scorer, load if len(devices) > 1 else lambda: discriminator, options, thinking)
    with Journal(args.out, meta, resume=args.resume, batch=args.batch_size) as journal:
        if not journal.complete:
            progress = Progress(found.rows, "responses", done=journal.rows)
            rest = islice(read_answers(args.responses, index), journal.rows, None)
            batches = ((batch, [records[answer.position] for answer in batch]) for batch in in_batches(rest, args.batch_size))
            with on_devices(start, devices) as spread:
                for rows in spread(batches):
                    journal.append(rows)
                    progress.advance(len(rows))
            if journal.rows != found.rows:
                raise ConfigError(f"{args.responses} has changed while it was read; run again")
            journal.finish(schema())
    say(f"{found.rows} responses to {len(found.positions)} prompts, written to {args.out}")
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size: expected a whole number above 0, found {args.batch_size}")
    responses = Path(args.responses)
    if responses.exists() and not responses.is_file():
        raise ConfigError(f"--responses {responses} is no plain file; it is read twice, so that mistakes are found before any scoring")
