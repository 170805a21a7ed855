"""Looks at every row of a dataset and reports what is there and what is wrong, without stopping at the first error."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from aapa_lightning.data.control_tokens import spells_control_tokens
from aapa_lightning.data.encode import PromptFormat, encode_demonstration, encode_prompt, end_of_turn_id
from aapa_lightning.data.records import attach_experts, prompt_hash, prompt_text, row_parsers
from aapa_lightning.data.templates import template_fields, unread_fields, uses_template
from aapa_lightning.errors import DataError
from aapa_lightning.types import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_LIMIT = 2**62


@dataclass(frozen=True)
class Lengths:
    """Lengths of prompts or responses: smallest, median, 95th percentile, largest."""

    unit: str
    minimum: int
    median: float
    p95: int
    maximum: int


@dataclass
class CheckReport:
    """What a dataset holds.

    Args:
        path: the dataset.
        rows: rows looked at.
        valid: rows without an error.
        with_experts: valid rows with at least one expert response.
        experts: expert responses in all.
        with_pairs: valid rows with ``chosen`` and ``rejected``.
        equal_pairs: those of them whose two responses are the same, which no objective on pairs accepts.
        only_chosen: valid rows with ``chosen`` alone, a response labelled desirable.
        only_rejected: valid rows with ``rejected`` alone, a response labelled undesirable.
        instructions: instructions by identifier.
        unverifiable: valid rows with an instruction that no check knows; ``InstructionReward`` refuses them, or leaves them out.
        duplicate_prompts: valid rows whose prompt occurred in a row before.
        prompt_lengths: in tokens where a tokenizer was given, else in characters.
        expert_lengths: the same for experts, EOS included.
        over_limit: rows over a length limit (with a tokenizer).
        template_fields: valid rows by field that is there for a chat template: of turns, ``tools``, ``chat_template_kwargs``.
        unread_fields: of these, rows in which the tokenizer's template writes nothing of it.
        spelled: valid rows with a text that spells a control token of the tokenizer, which stays text.
        error_count: errors found.
        errors: the first of them, each with file and line.
    """

    path: str
    rows: int = 0
    valid: int = 0
    with_experts: int = 0
    experts: int = 0
    with_pairs: int = 0
    equal_pairs: int = 0
    only_chosen: int = 0
    only_rejected: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    unverifiable: int = 0
    duplicate_prompts: int = 0
    prompt_lengths: Lengths | None = None
    expert_lengths: Lengths | None = None
    over_limit: int = 0
    template_fields: dict[str, int] = field(default_factory=dict)
    unread_fields: dict[str, int] = field(default_factory=dict)
    spelled: int = 0
    error_count: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether training can start on it."""
        return self.error_count == 0 and self.valid > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"ok": self.ok}

    def lines(self) -> list[str]:
        """The report as text."""
        lines = [
            f"{self.path}: {self.rows} rows, {self.valid} valid, {self.error_count} errors",
            f"experts: {self.experts} in {self.with_experts} rows; pairs: {self.with_pairs}; repeated prompts: {self.duplicate_prompts}",
        ]
        if self.only_chosen or self.only_rejected:
            lines.append(f"labelled responses: {self.only_chosen} only chosen, {self.only_rejected} only rejected")
        if self.equal_pairs:
            lines.append(f"pairs whose two responses are the same: {self.equal_pairs} ('aapa data pairs --chosen given' leaves them out)")
        for what, lengths in (("prompts", self.prompt_lengths), ("experts", self.expert_lengths)):
            if lengths:
                values = f"{lengths.minimum} to {lengths.maximum}, median {lengths.median:g}, 95% up to {lengths.p95}"
                lines.append(f"{what}: {values} {lengths.unit}")
        if self.over_limit:
            lines.append(f"over a length limit: {self.over_limit}")
        lines += [f"rows with {name} for the chat template: {count}" for name, count in sorted(self.template_fields.items())]
        lines += [f"rows of whose {name} the chat template writes nothing: {count}" for name, count in sorted(self.unread_fields.items())]
        if self.spelled:
            lines.append(f"rows that spell control tokens: {self.spelled} (they stay text; remove them if they were meant to end a turn)")
        lines += [f"instruction {name}: {count}" for name, count in sorted(self.instructions.items())]
        if self.unverifiable:
            lines.append(f"rows with an instruction that no check knows: {self.unverifiable} (a reward can leave them out: 'skip-record')")
        lines += [f"error: {message}" for message in self.errors]
        if self.error_count > len(self.errors):
            lines.append(f"... and {self.error_count - len(self.errors)} more errors")
        return lines


def check_dataset(
    path: str,
    *,
    split: str | None = None,
    experts: str | None = None,
    columns: Mapping[str, str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    fmt: PromptFormat | None = None,
    eos_token_ids: Sequence[int] = (),
    limit: int = 20,
) -> CheckReport:
    """Look at every row.

    Args:
        path: as for ``read_records``.
        split: as for ``read_records``.
        experts: a response file to join.
        columns: as for ``read_records``.
        tokenizer: measures lengths in tokens and applies the limits of ``fmt``; without it lengths are characters.
        fmt: how records become tokens; default ``PromptFormat()``. A row over a limit is an error unless ``overlong`` is ``drop``.
        eos_token_ids: every id that ends a response; none for the tokenizer's own alone.
        limit: how many errors the report lists; all are counted.

    Raises:
        DataError: the dataset cannot be opened.
    """
    report = CheckReport(path)

    def complain(error: DataError) -> None:
        report.error_count += 1
        if len(report.errors) < limit:
            report.errors.append(str(error))

    records: Sequence[Record] | Iterator[Record] = _parsed(row_parsers(path, split=split, columns=columns), report, complain)
    if experts:
        records = list(records)
        try:
            records = attach_experts(records, experts)
        except DataError as error:
            complain(error)
    measure = _Measure(tokenizer, fmt or PromptFormat(), eos_token_ids)
    tally = _Tally(report, measure)
    for record in records:
        try:
            tally.add(record)
        except DataError as error:
            complain(error)
    if report.rows == 0:
        complain(DataError(f"{path} is empty; expected at least one record"))
    tally.close()
    return report


def _parsed(rows: Iterable[Callable[[], Record]], report: CheckReport, complain: Callable[[DataError], None]) -> Iterator[Record]:
    try:
        for parse in rows:
            report.rows += 1
            try:
                yield parse()
            except DataError as error:
                complain(error)
    except DataError as error:  # of the file as a whole
        if report.rows == 0:
            raise
        complain(error)


class _Measure:
    """Lengths in tokens or characters, and the limits on them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, fmt: PromptFormat, eos_token_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.unit = "characters" if tokenizer is None else "tokens"
        self.fmt = fmt
        self._free = replace(fmt, max_prompt_tokens=_NO_LIMIT, max_response_tokens=_NO_LIMIT)
        if tokenizer is not None and tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token; set its eos_token")
        self._eos = 0 if tokenizer is None else end_of_turn_id(tokenizer, fmt, eos_token_ids or (int(tokenizer.eos_token_id),))

    def lengths(self, record: Record) -> tuple[int, list[int]]:
        """Length of the prompt and of each expert. Raises DataError when the record does not encode."""
        if self.tokenizer is None:
            turns = [record.prompt] if isinstance(record.prompt, str) else [turn["content"] for turn in record.prompt]
            return sum(map(len, turns)), [len(expert) for expert in record.experts]
        prompt = len(encode_prompt(self.tokenizer, record, self._free))
        demonstrations = [encode_demonstration(self.tokenizer, record, expert, self._free, self._eos) for expert in record.experts]
        return prompt, [len(demonstration.input_ids) - prompt for demonstration in demonstrations]

    def unread(self, record: Record) -> list[str]:
        """Fields for a chat template that it does not read; none without a tokenizer or a template."""
        if self.tokenizer is None or not uses_template(self.tokenizer, self.fmt):
            return []
        return unread_fields(self.tokenizer, record, self.fmt)

    def spells(self, record: Record) -> bool:
        """Return whether a text of the record spells a control token."""
        if self.tokenizer is None:
            return False
        responses = [text for text in (*record.experts, record.chosen, record.rejected) if text]
        return any(spells_control_tokens(self.tokenizer, text) for text in (prompt_text(record.prompt), *responses))

    def over_limit(self, prompt: int, experts: list[int]) -> bool:
        """Whether a length is over its limit; characters have none."""
        if self.tokenizer is None:
            return False
        return prompt > self.fmt.max_prompt_tokens or max(experts, default=0) > self.fmt.max_response_tokens


class _Tally:
    """Fills a report, record by record."""

    def __init__(self, report: CheckReport, measure: _Measure) -> None:
        self._report = report
        self._measure = measure
        self._seen: set[bytes] = set()
        self._prompts: list[int] = []
        self._experts: list[int] = []
        self._instructions: Counter[str] = Counter()
        self._fields: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()

    def add(self, record: Record) -> None:
        """Count a record. Raises DataError when it does not encode, is over a limit or has malformed arguments of an instruction."""
        report = self._report
        verifiable = _verifiable(record)
        prompt, experts = self._measure.lengths(record)
        self._prompts.append(prompt)
        self._experts += experts
        self._instructions.update(instruction.id for instruction in record.instructions)
        if self._measure.over_limit(prompt, experts):
            report.over_limit += 1
            if self._measure.fmt.overlong == "error":
                longest = max(experts, default=0)
                raise DataError(
                    f"{record.source}: the prompt has {prompt} tokens (limit {self._measure.fmt.max_prompt_tokens}), the longest expert "
                    f"{longest} (limit {self._measure.fmt.max_response_tokens}); raise the limit, or set overlong to 'drop'"
                )
        digest = bytes.fromhex(prompt_hash(record.prompt))
        report.duplicate_prompts += digest in self._seen
        self._seen.add(digest)
        self._fields.update(template_fields(record))
        self._unread.update(self._measure.unread(record))
        report.spelled += self._measure.spells(record)
        report.valid += 1
        report.with_experts += bool(record.experts)
        report.experts += len(record.experts)
        sides = (record.chosen is not None, record.rejected is not None)
        report.with_pairs += sides == (True, True)
        report.equal_pairs += sides == (True, True) and record.chosen == record.rejected
        report.only_chosen += sides == (True, False)
        report.only_rejected += sides == (False, True)
        report.unverifiable += not verifiable

    def close(self) -> None:
        """Write what needs all records."""
        self._report.instructions = dict(self._instructions)
        self._report.template_fields, self._report.unread_fields = dict(self._fields), dict(self._unread)
        self._report.prompt_lengths = _summary(self._prompts, self._measure.unit)
        self._report.expert_lengths = _summary(self._experts, self._measure.unit)


def _verifiable(record: Record) -> bool:
    """Whether a check knows every instruction. Raises DataError for arguments that a known one refuses."""
    if not record.instructions:
        return True
    from aapa_lightning.rewards.instructions import CHECKS, validate_instruction

    known = [instruction for instruction in record.instructions if instruction.id in CHECKS]
    for instruction in known:
        validate_instruction(instruction, record.source)
    return len(known) == len(record.instructions)


def _summary(lengths: list[int], unit: str) -> Lengths | None:
    if not lengths:
        return None
    ordered = sorted(lengths)
    p95 = ordered[min(-(-len(ordered) * 95 // 100), len(ordered)) - 1]
    return Lengths(unit, ordered[0], statistics.median(ordered), p95, ordered[-1])
