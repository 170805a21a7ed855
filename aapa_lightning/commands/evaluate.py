"""``aapa evaluate``: how many verifiable instructions the responses of a file follow."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aapa_lightning.commands.thinking import add_thinking_options, parse_thinking
from aapa_lightning.console import say

if TYPE_CHECKING:
    from aapa_lightning.commands.joined import Answer
    from aapa_lightning.thinking import Thinking
    from aapa_lightning.types import Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--prompts", required=True, help="records with instructions: a JSONL or Parquet file, or a datasets name or folder")
    parser.add_argument("--split", help="split of a datasets name or folder")
    parser.add_argument("--responses", required=True, metavar="FILE", help="JSONL of responses, as `aapa predict` writes them")
    parser.add_argument("--allow-missing", action="store_true", help="judge what is there when prompts have no response; they are counted")
    add_thinking_options(parser)
    parser.add_argument("--out", metavar="FILE", help="write the verdicts on every response as JSONL")
    parser.add_argument("--resamples", type=_positive, default=1000, help="of the bootstrap over prompts (default: %(default)s)")
    parser.add_argument("--seed", type=_seed, default=0, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Judge the responses and print the report."""
    from aapa_lightning.commands.joined import PromptIndex, read_answers
    from aapa_lightning.commands.journal import check_not_input, writing
    from aapa_lightning.data.jsonl import write_jsonl
    from aapa_lightning.data.records import read_records

    if args.out:
        check_not_input(args.out, prompts=args.prompts, responses=args.responses)
    records = read_records(args.prompts, split=args.split)
    _check(records)
    rows = list(judge(records, read_answers(args.responses, PromptIndex(records)), parse_thinking(args)))
    missing = sorted(set(range(len(records))) - {position for position, _ in rows})
    if missing and not args.allow_missing:
        _refuse(records, missing, args.responses)
    report = summarise(records, rows, missing=len(missing), resamples=args.resamples, seed=args.seed)
    if args.out:
        with writing(args.out):
            write_jsonl(args.out, (row for _, row in rows))
    say(json.dumps(report) if args.json else "\n".join(_lines(report, args.out)))
    return 0


def judge(records: Sequence[Record], answers: Iterable[Answer], thinking: Thinking) -> Iterable[tuple[int, dict[str, Any]]]:
    """Judge responses one by one.

    Args:
        records: with validated instructions.
        answers: responses with the positions of their records.
        thinking: tells what is judged of a response.

    Yields:
        The record's position and the row of the verdict file: ``key``, ``strict`` and ``loose`` (a list each, in the order of the
        instructions), ``sample`` and ``temperature`` where the response file has them, and ``prompt`` where nothing has a key.
    """
    from aapa_lightning.rewards.instructions import follows, follows_loosely

    for answer in answers:
        record, response = records[answer.position], answer.response
        row: dict[str, Any] = {"key": answer.key}
        if answer.key is None:
            row["prompt"] = record.prompt
        text = thinking.answer(response.text, response.prompt_end)
        row["strict"] = [follows(instruction, text) for instruction in record.instructions]
        row["loose"] = [follows_loosely(instruction, text) for instruction in record.instructions]
        if response.temperature is not None:
            row |= {"sample": response.sample, "temperature": response.temperature}
        elif response.sample:
            row["sample"] = response.sample
        yield answer.position, row


def summarise(
    records: Sequence[Record], rows: Sequence[tuple[int, Mapping[str, Any]]], *, missing: int, resamples: int, seed: int
) -> dict[str, Any]:
    """The report: counts, accuracies with 95% intervals, and a table by instruction type.

    Args:
        records: the prompts.
        rows: of ``judge``, at least one.
        missing: prompts without a response.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    import torch

    from aapa_lightning.metrics.functional.instruction_accuracy import (
        ACCURACIES,
        bootstrap_intervals,
        instruction_accuracy,
        verdict_counts,
    )

    positions, place = torch.tensor([position for position, _ in rows]).unique(return_inverse=True)
    counts = torch.zeros(len(positions), 6, dtype=torch.int64)
    counts.index_add_(0, place, torch.tensor([verdict_counts(row["strict"], row["loose"]) for _, row in rows]))
    value = instruction_accuracy(counts.sum(0)).tolist()
    low, high = bootstrap_intervals(counts, resamples=resamples, seed=seed).tolist()
    types: dict[str, list[int]] = {}
    for position, row in rows:
        for instruction, strict, loose in zip(records[position].instructions, row["strict"], row["loose"], strict=True):
            sums = types.setdefault(instruction.id, [0, 0, 0])
            types[instruction.id] = [sums[0] + 1, sums[1] + strict, sums[2] + loose]
    return {
        "prompts": len(records),
        "responses": len(rows),
        "missing": missing,
        "accuracy": {name: {"value": value[i], "low": low[i], "high": high[i]} for i, name in enumerate(ACCURACIES)},
        "types": {id_: {"count": n, "strict": strict / n, "loose": loose / n} for id_, (n, strict, loose) in sorted(types.items())},
        "bootstrap": {"unit": "prompt", "resamples": resamples, "seed": seed},
    }


def _check(records: Sequence[Record]) -> None:
    from aapa_lightning.errors import DataError
    from aapa_lightning.rewards.instructions import validate_instruction

    for record in records:
        if not record.instructions:
            raise DataError(
                f"{record.source}: no instructions to verify; expected 'instruction_id_list' and 'kwargs', or 'instructions'; "
                "leave such records out of --prompts"
            )
        for instruction in record.instructions:
            validate_instruction(instruction, record.source)


def _refuse(records: Sequence[Record], missing: Sequence[int], path: str) -> None:
    from aapa_lightning.errors import DataError

    first = records[missing[0]]
    named = "" if first.key is None else f" (key {first.key!r})"
    raise DataError(
        f"{path}: {len(missing)} of {len(records)} prompts have no response, the first is {first.source}{named}; add them, or judge the "
        "others with --allow-missing"
    )


def _lines(report: Mapping[str, Any], out: str | None) -> list[str]:
    lines = [f"{report['responses']} responses to {report['prompts'] - report['missing']} of {report['prompts']} prompts"]
    if report["missing"]:
        lines.append(f"prompts without a response, left out of everything below: {report['missing']}")
    lines.append("")
    lines.append(f"{'accuracy':<22}{'value':>8}   95% interval")
    for name, cell in report["accuracy"].items():
        lines.append(f"{name.replace('_', ', '):<22}{cell['value']:>8.4f}   {cell['low']:.4f} to {cell['high']:.4f}")
    width = max(map(len, report["types"])) + 2
    lines += ["", f"{'instruction':<{width}}{'count':>6}{'strict':>9}{'loose':>9}"]
    for name, cell in report["types"].items():
        lines.append(f"{name:<{width}}{cell['count']:>6}{cell['strict']:>9.4f}{cell['loose']:>9.4f}")
    return [*lines, "", f"verdicts written to {out}"] if out else lines


def _positive(value: str) -> int:
    return _whole(value, 1, 2**31, "a whole number above 0")


def _seed(value: str) -> int:
    return _whole(value, -(2**63), 2**63, "a whole number of 64 bits")


def _whole(value: str, low: int, high: int, expected: str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = high
    if not low <= number < high:
        raise argparse.ArgumentTypeError(f"expected {expected}, found {value}")
    return number
