"""Verifiable instructions: one function per IFEval identifier, in a plain table.

Identifiers, arguments and verdicts are those of IFEval's checker (Zhou et al. 2023, arXiv 2311.07911), strict and loose; an empty response
follows nothing. Where this table knowingly differs:

- ``length_constraints:number_sentences`` counts terminators before white space (``checks.count_sentences``); IFEval uses NLTK's Punkt.
- ``change_case:capital_word_frequency`` splits words by NLTK's rules for punctuation and English contractions, written as one pattern.
- ``language:response_language`` and the English of ``change_case:english_*`` ask ``langdetect`` as IFEval does, but with a fixed seed;
  a text without a language, such as digits alone, is in none, where IFEval calls it followed.
- Keywords are plain text; IFEval reads them as regular expressions.
- Every argument must be there; IFEval draws a missing one at random, and likewise a ``letter`` that is not one, such as ``#``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aapa_lightning.data import counts
from aapa_lightning.errors import DataError, shown
from aapa_lightning.rewards import checks
from aapa_lightning.rewards.language import languages
from aapa_lightning.types import Instruction

RELATIONS = ("at least", "less than")


@dataclass(frozen=True, slots=True)
class Argument:
    """What an argument must be: a description for the error, and the test."""

    expected: str
    holds: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


COUNT = Argument(counts.COUNT, counts.is_count)
RELATION = Argument(f"one of {', '.join(RELATIONS)}", lambda value: value in RELATIONS)
TEXT = Argument("text", _is_text)
TEXTS = Argument("a list of texts", lambda value: isinstance(value, list | tuple) and bool(value) and all(map(_is_text, value)))
LETTER = Argument("one character", lambda value: _is_text(value) and len(value) == 1)
LANGUAGE = Argument(f"an ISO 639-1 code, one of {', '.join(languages())}", lambda value: value in languages())


@dataclass(frozen=True, slots=True)
class Check:
    """A verifiable instruction: ``holds(response, **kwargs)`` and what its arguments must be."""

    holds: Callable[..., bool]
    arguments: Mapping[str, Argument]


#: Every instruction that can be verified: identifier -> check.
CHECKS: dict[str, Check] = {
    "keywords:existence": Check(checks.keywords_existence, {"keywords": TEXTS}),
    "keywords:frequency": Check(checks.keywords_frequency, {"keyword": TEXT, "frequency": COUNT, "relation": RELATION}),
    "keywords:forbidden_words": Check(checks.forbidden_words, {"forbidden_words": TEXTS}),
    "keywords:letter_frequency": Check(checks.letter_frequency, {"letter": LETTER, "let_frequency": COUNT, "let_relation": RELATION}),
    "length_constraints:number_words": Check(checks.number_words, {"num_words": COUNT, "relation": RELATION}),
    "length_constraints:number_sentences": Check(checks.number_sentences, {"num_sentences": COUNT, "relation": RELATION}),
    "length_constraints:number_paragraphs": Check(checks.number_paragraphs, {"num_paragraphs": COUNT}),
    "length_constraints:nth_paragraph_first_word": Check(
        checks.nth_paragraph_first_word, {"num_paragraphs": COUNT, "nth_paragraph": COUNT, "first_word": TEXT}
    ),
    "detectable_content:number_placeholders": Check(checks.number_placeholders, {"num_placeholders": COUNT}),
    "detectable_content:postscript": Check(checks.postscript, {"postscript_marker": TEXT}),
    "detectable_format:number_bullet_lists": Check(checks.number_bullet_lists, {"num_bullets": COUNT}),
    "detectable_format:constrained_response": Check(checks.constrained_response, {}),
    "detectable_format:number_highlighted_sections": Check(checks.number_highlighted_sections, {"num_highlights": COUNT}),
    "detectable_format:multiple_sections": Check(checks.multiple_sections, {"section_spliter": TEXT, "num_sections": COUNT}),
    "detectable_format:json_format": Check(checks.json_format, {}),
    "detectable_format:title": Check(checks.title, {}),
    "combination:repeat_prompt": Check(checks.repeat_prompt, {"prompt_to_repeat": TEXT}),
    "combination:two_responses": Check(checks.two_responses, {}),
    "startend:end_checker": Check(checks.end_checker, {"end_phrase": TEXT}),
    "startend:quotation": Check(checks.quotation, {}),
    "change_case:english_capital": Check(checks.english_capital, {}),
    "change_case:english_lowercase": Check(checks.english_lowercase, {}),
    "change_case:capital_word_frequency": Check(checks.capital_word_frequency, {"capital_frequency": COUNT, "capital_relation": RELATION}),
    "language:response_language": Check(checks.response_language, {"language": LANGUAGE}),
    "punctuation:no_comma": Check(checks.no_comma, {}),
}


def validate_instruction(instruction: Instruction, source: str) -> None:
    """Raise DataError when the identifier is unknown, or an argument is missing, unknown or malformed."""
    check = CHECKS.get(instruction.id)
    if check is None:
        raise DataError(f"{source}: unknown instruction {shown(instruction.id)}; expected one of {', '.join(sorted(CHECKS))}")
    if unknown := instruction.kwargs.keys() - check.arguments.keys():
        found = sorted(name if isinstance(name, str) else shown(name) for name in unknown)
        raise DataError(f"{source}: {instruction.id!r} takes {sorted(check.arguments)}, found {shown(found, 200)}")
    for name, argument in check.arguments.items():
        if name not in instruction.kwargs:
            raise DataError(
                f"{source}: {instruction.id!r} needs the argument {name!r} ({argument.expected}); found "
                f"{shown(dict(instruction.kwargs), 200)}"
            )
        if not argument.holds(value := instruction.kwargs[name]):
            raise DataError(f"{source}: {instruction.id!r}: {name!r} must be {argument.expected}, found {shown(value)}")


def follows(instruction: Instruction, response: str) -> bool:
    """Whether a response follows a validated instruction (IFEval's strict verdict)."""
    return bool(response.strip()) and CHECKS[instruction.id].holds(response, **instruction.kwargs)


def follows_loosely(instruction: Instruction, response: str) -> bool:
    """Whether a response, or one of its ``loosened`` forms, follows a validated instruction (IFEval's loose verdict)."""
    return any(follows(instruction, text) for text in loosened(response))


def loosened(response: str) -> Iterator[str]:
    """The response; without its first line, its last line, both; and these four without asterisks. Each different text once."""
    headless, body = response.partition("\n")[2].strip(), response.rpartition("\n")[0].strip()
    inner = response.partition("\n")[2].rpartition("\n")[0].strip()
    texts = (response, headless, body, inner)
    seen: set[str] = set()
    for text in (*texts, *(text.replace("*", "") for text in texts)):
        if text not in seen:
            seen.add(text)
            yield text
