"""``aapa data pairs`` and ``aapa data best``: preference pairs, and best responses, out of response files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aapa_lightning.commands.columns import add_column_option, parse_columns
from aapa_lightning.console import say
from aapa_lightning.errors import ConfigError, DataError

if TYPE_CHECKING:
    from aapa_lightning.data.pairs import Joined, Scored
    from aapa_lightning.data.responses import Response
    from aapa_lightning.types import Record

CHOSEN = ("experts", "best", "given")


def add_actions(actions: Any) -> None:
    """Add the actions to those of ``aapa data``."""
    pairs = actions.add_parser(
        "pairs",
        help="make preference pairs out of responses",
        epilog="example: aapa data pairs --prompts train.jsonl --responses samples.jsonl --chosen experts --out pairs.jsonl",
    )
    _add_inputs(pairs, responses_required=False)
    pairs.add_argument(
        "--chosen",
        required=True,
        choices=CHOSEN,
        help="experts: every expert over every response; best: by --score; given: the records' own pairs",
    )
    pairs.add_argument("--pairs", choices=("best-worst", "best-rest", "all"), help="with --chosen best: which (default: best-worst)")
    pairs.add_argument("--margin", type=float, help="with --chosen best: least difference of two scores")
    pairs.add_argument("--keep-truncated", action="store_true", help="let responses that the length limit stopped be rejected ones")
    pairs.add_argument("--flip-rate", type=float, metavar="RATE", help="exchange chosen and rejected of this share of the pairs, as noise")
    pairs.add_argument("--flip", choices=("random", "length"), help="any, or where rejected is longer (default: random)")
    pairs.add_argument("--seed", type=int, default=0, help="of the flips (default: %(default)s)")
    best = actions.add_parser(
        "best",
        help="keep the best response to each prompt",
        epilog="example: aapa data best --prompts train.jsonl --responses samples.jsonl --score reward --out best.jsonl",
    )
    _add_inputs(best, responses_required=True)


def _add_inputs(parser: argparse.ArgumentParser, *, responses_required: bool) -> None:
    parser.add_argument("--prompts", required=True, help="records: a JSONL or Parquet file, or a datasets name or folder")
    parser.add_argument("--split", help="split of a datasets name or folder")
    parser.add_argument("--experts", metavar="FILE", help="response file whose responses become the experts")
    add_column_option(parser)
    parser.add_argument(
        "--responses",
        nargs="+",
        default=[],
        required=responses_required,
        metavar="FILE",
        help="JSONL of responses, as `aapa predict` writes it",
    )
    parser.add_argument("--score", required=responses_required, metavar="COLUMN", help="column of numbers or verdicts; higher is better")
    parser.add_argument("--scores", nargs="+", default=[], metavar="FILE", help="where the column is: what `aapa score` or `evaluate` made")
    parser.add_argument("--reduce", choices=("mean", "min"), default="mean", help="of a list; min: all are true (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N responses to a prompt")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSONL to write")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")


def run_pairs(args: argparse.Namespace) -> int:
    """Make pairs, flip some of them if asked, and write them."""
    from aapa_lightning.commands.journal import writing
    from aapa_lightning.data.pairs import expert_pairs, flip_pairs, given_pairs, scored_pairs
    from aapa_lightning.data.rows import record_row, write_rows

    _check_pairs(args)
    _check_out(args)
    records = _records(args)
    pairing, margin = args.pairs or "best-worst", args.margin or 0.0
    make: dict[str, Callable[[Record, list[Response]], list[Record]]] = {
        "experts": expert_pairs,
        "best": lambda record, responses: scored_pairs(record, _scored(args, responses), pairing, margin),
        "given": lambda record, _: given_pairs(record),
    }
    joined = _joined(args, records, keep_truncated=args.keep_truncated)
    asked = _once(records) if args.chosen == "best" else range(len(records))
    made = [make[args.chosen](records[i], joined.responses[i]) for i in asked]
    pairs: Sequence[Record] = [pair for own in made for pair in own]
    report = _counts(joined, asked) | {"without_pair": sum(not own for own in made), "pairs": len(pairs)}
    if args.chosen == "given":
        report = {"prompts": len(records), "without_pair": report["without_pair"], "pairs": len(pairs)}
    else:
        report["without_pair"] -= report["unanswered"]
    if not pairs:
        raise DataError(f"{args.prompts}: not one pair; {_spelled(report)}")
    if args.flip_rate is not None:
        pairs = flip_pairs(pairs, args.flip_rate, how=args.flip or "random", seed=args.seed)
        report["flipped"] = sum(bool(pair.extra["flipped"]) for pair in pairs)
    with writing(args.out):
        write_rows(args.out, ((pair.source, record_row(pair)) for pair in pairs))
    return _say(args, report)


def run_best(args: argparse.Namespace) -> int:
    """Write the best response to each prompt, as a response file."""
    from aapa_lightning.commands.journal import writing
    from aapa_lightning.data.pairs import best
    from aapa_lightning.data.rows import answer_row, write_rows

    _check_scores(args)
    _check_out(args)
    records = _records(args)
    joined = _joined(args, records, keep_truncated=False)
    asked = _once(records)
    found = [(i, top.response) for i in asked if (top := best(_scored(args, joined.responses[i])))]
    if not found:
        raise DataError(f"{args.prompts}: no prompt has a response that is neither empty nor truncated; {_spelled(_counts(joined, asked))}")
    with writing(args.out):
        write_rows(args.out, ((response.source, answer_row(records[i], response)) for i, response in found))
    return _say(args, _counts(joined, asked) | {"unanswered": len(asked) - len(found), "best": len(found)})


ACTIONS = {"pairs": run_pairs, "best": run_best}


def _check_pairs(args: argparse.Namespace) -> None:
    given, scored = args.chosen == "given", args.chosen == "best"
    if given == bool(args.responses):
        found = "some" if args.responses else "none"
        raise ConfigError(f"--chosen {args.chosen}: expected {'no' if given else 'one or more'} --responses, found {found}")
    for option in ("score", "scores", "pairs", "margin"):
        if not scored and getattr(args, option):
            raise ConfigError(f"--{option} goes with --chosen best, found --chosen {args.chosen}")
    if scored and not args.score:
        raise ConfigError("--chosen best: expected --score COLUMN, which says what is best")
    if args.margin is not None and not 0 <= args.margin < float("inf"):
        raise ConfigError(f"--margin: expected a number, 0 or above, found {args.margin}")
    if args.flip and args.flip_rate is None:
        raise ConfigError(f"--flip {args.flip}: expected --flip-rate RATE beside it, found none; nothing would be flipped")
    _check_scores(args)


def _check_scores(args: argparse.Namespace) -> None:
    if args.scores and len(args.scores) != len(args.responses):
        raise ConfigError(
            f"--scores: expected a file for each of {len(args.responses)} --responses, in their order, found {len(args.scores)}"
        )
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit: expected a whole number above 0, found {args.limit}")


def _check_out(args: argparse.Namespace) -> None:
    from aapa_lightning.commands.journal import check_not_input
    from aapa_lightning.data.records import JSON_SUFFIXES

    if Path(args.out).suffix not in JSON_SUFFIXES:
        raise ConfigError(f"--out {args.out}: expected a name that ends with .jsonl")
    inputs = [("prompts", args.prompts), ("experts", args.experts)]
    inputs += [("responses", path) for path in args.responses] + [("scores", path) for path in args.scores]
    for name, path in inputs:
        check_not_input(args.out, **{name: path})


def _records(args: argparse.Namespace) -> Sequence[Record]:
    from aapa_lightning.data.records import read_records

    return read_records(args.prompts, split=args.split, experts=args.experts, columns=parse_columns(args.column))


def _joined(args: argparse.Namespace, records: Sequence[Record], *, keep_truncated: bool) -> Joined:
    from aapa_lightning.data.pairs import join_files
    from aapa_lightning.data.responses import read_responses
    from aapa_lightning.data.scores import attach_scores

    files = [read_responses(path) for path in args.responses]
    if args.scores:
        files = [attach_scores(responses, path) for responses, path in zip(files, args.scores, strict=True)]
    return join_files(records, files, limit=args.limit, keep_truncated=keep_truncated)


def _scored(args: argparse.Namespace, responses: Iterable[Response]) -> list[Scored]:
    from aapa_lightning.data.pairs import Scored
    from aapa_lightning.data.scores import response_score

    return [Scored(response, response_score(response, args.score, args.reduce)) for response in responses]


def _once(records: Sequence[Record]) -> Sequence[int]:
    """The first record of each prompt and key: others would get the same responses, and the same pairs, again."""
    from aapa_lightning.data.records import prompt_hash

    first: dict[tuple[str | None, str], int] = {}
    for i, record in enumerate(records):
        first.setdefault((record.key, prompt_hash(record.prompt)), i)
    return list(first.values())


def _counts(joined: Joined, asked: Sequence[int]) -> dict[str, int]:
    return {
        "prompts": len(asked),
        "responses": joined.read,
        "other_prompts": joined.other_prompts,
        "truncated": joined.truncated,
        "unanswered": sum(not joined.responses[i] for i in asked),
    }


_SPELLED = {
    "prompts": "prompts",
    "responses": "responses",
    "other_prompts": "responses to other prompts, left out",
    "truncated": "truncated responses, left out",
    "unanswered": "without a usable response",
    "without_pair": "without a pair",
    "pairs": "pairs",
    "best": "best responses",
    "flipped": "of them flipped",
}


def _spelled(report: Mapping[str, int]) -> str:
    return "; ".join(f"{_SPELLED[name]}: {count}" for name, count in report.items())


def _say(args: argparse.Namespace, report: Mapping[str, int]) -> int:
    lines = [f"{_SPELLED[name]}: {count}" for name, count in report.items()]
    say(json.dumps(report) if args.json else "\n".join([*lines, f"written to {args.out}"]))
    return 0
