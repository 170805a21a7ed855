"""Constraints that a dataset for reinforcement learning keeps in a column ``ground_truth`` -> instructions under IFEval's names.

``allenai/RLVR-IFeval`` names a function of its verifier with all its arguments, ``allenai/IF_multi_constraints_upto5`` lists of
identifiers and arguments. No constraint is dropped: one that IFEval has no equivalent of keeps its own name, which
``InstructionReward`` refuses, or leaves out where it is told to.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aapa_lightning.data.counts import LARGEST, is_count
from aapa_lightning.data.fields import paired_instructions
from aapa_lightning.errors import DataError, shown
from aapa_lightning.types import Instruction

#: Longest ``ground_truth`` text that is read, in characters; a prompt to be repeated stands in it.
LIMIT = 1_000_000

_KEY = re.compile(r"""["'](?:func_name|instruction_id)["']\s*:""")

#: Functions whose constraint is one instruction of IFEval: identifier, and the arguments that IFEval calls otherwise.
_SAME: dict[str, tuple[str, dict[str, str]]] = {
    "verify_keywords": ("keywords:existence", {"keyword_list": "keywords"}),
    "validate_forbidden_words": ("keywords:forbidden_words", {}),
    "validate_response_language": ("language:response_language", {}),
    "validate_paragraphs": ("length_constraints:nth_paragraph_first_word", {"N": "num_paragraphs", "i": "nth_paragraph"}),
    "verify_postscript": ("detectable_content:postscript", {}),
    "validate_placeholders": ("detectable_content:number_placeholders", {"N": "num_placeholders"}),
    "verify_bullet_points": ("detectable_format:number_bullet_lists", {"N": "num_bullets"}),
    "validate_title": ("detectable_format:title", {}),
    "validate_highlighted_sections": ("detectable_format:number_highlighted_sections", {"N": "num_highlights"}),
    "validate_sections": ("detectable_format:multiple_sections", {"N": "num_sections", "section_splitter": "section_spliter"}),
    "validate_json_format": ("detectable_format:json_format", {}),
    "validate_repeat_prompt": ("combination:repeat_prompt", {"original_prompt": "prompt_to_repeat"}),
    "validate_two_responses": ("combination:two_responses", {}),
    "validate_uppercase": ("change_case:english_capital", {}),
    "validate_lowercase": ("change_case:english_lowercase", {}),
    "validate_end": ("startend:end_checker", {}),
    "validate_quotation": ("startend:quotation", {}),
    "validate_no_commas": ("punctuation:no_comma", {}),
}


def _tenth(count: int) -> int:
    return max(round(count * 0.1), 1)  # as the verifier rounds; counts are small


@dataclass(frozen=True, slots=True)
class _Counted:
    """A constraint on a count: ``quantifier`` and ``N``, or exactly ``N`` where ``around`` is None."""

    id: str
    count: str
    relation: str
    around: Callable[[int], int] | None = None
    names: tuple[tuple[str, str], ...] = ()


#: Functions that count. IFEval knows "at least" and "less than": "at most" is "less than" one more; "around" and "exactly" are two bounds.
_COUNTED: dict[str, _Counted] = {
    "verify_keyword_frequency": _Counted("keywords:frequency", "frequency", "relation", names=(("word", "keyword"),)),
    "verify_letter_frequency": _Counted("keywords:letter_frequency", "let_frequency", "let_relation"),
    "validate_word_constraint": _Counted("length_constraints:number_words", "num_words", "relation", _tenth),
    "verify_sentence_constraint": _Counted("length_constraints:number_sentences", "num_sentences", "relation", lambda count: 1),
    "validate_frequency_capital_words": _Counted("change_case:capital_word_frequency", "capital_frequency", "capital_relation", _tenth),
}

#: Identifiers of the multi-constraint data that are an instruction of IFEval under another name.
_ALIASES = {"letters:letter_counting2": "keywords:letter_frequency"}


def ground_truth_instructions(value: Any, source: str) -> tuple[Instruction, ...] | None:
    """Instructions in a ``ground_truth``; None where it holds something else, such as the answer to a sum.

    Args:
        value: the column: text (JSON or a Python literal), or what such text says.
        source: ``file:line``, named in every error.

    Raises:
        DataError: constraints that are malformed.
    """
    if isinstance(value, str):
        if not _looks_like_constraints(value):
            return None
        value = _read(value, source)
    specs = [value] if isinstance(value, Mapping) else value
    if not isinstance(specs, Sequence) or isinstance(specs, str | bytes) or not any(map(_is_spec, specs)):
        return None
    for i, spec in enumerate(specs):
        if not _is_spec(spec):
            raise DataError(f"{source}: 'ground_truth[{i}]' must be an object with 'func_name' or 'instruction_id', found {shown(spec)}")
    return tuple(instruction for spec in specs for instruction in _constraints(spec, source))


def _is_spec(spec: Any) -> bool:
    return isinstance(spec, Mapping) and bool({"func_name", "instruction_id"} & spec.keys())


def _looks_like_constraints(value: str) -> bool:
    return value.lstrip()[:1] in ("{", "[") and _KEY.search(value) is not None


def _read(value: str, source: str) -> Any:
    if len(value) > LIMIT:
        raise DataError(f"{source}: 'ground_truth' has {len(value)} characters; expected at most {LIMIT}")
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise DataError(
            f"{source}: 'ground_truth' is neither JSON nor a Python literal ({type(error).__name__}); expected an object with "
            f"'func_name', or a list of objects with 'instruction_id' and 'kwargs', found {shown(value)}"
        ) from error


def _constraints(spec: Mapping[str, Any], source: str) -> Iterable[Instruction]:
    if "instruction_id" in spec:
        found = paired_instructions(spec["instruction_id"], spec.get("kwargs"), ("ground_truth: instruction_id", "kwargs"), source)
        return [Instruction(_ALIASES.get(instruction.id, instruction.id), instruction.kwargs) for instruction in found]
    name = spec["func_name"]
    if not isinstance(name, str) or not name:
        raise DataError(f"{source}: 'ground_truth': 'func_name' must be the name of a function, found {shown(name)}")
    arguments = {argument: value for argument, value in spec.items() if argument != "func_name" and value is not None}
    if name in _SAME:
        id_, names = _SAME[name]
        return [Instruction(id_, {names.get(argument, argument): value for argument, value in arguments.items()})]
    if name in _COUNTED and (counted := _counted(_COUNTED[name], arguments, f"{source}: 'ground_truth': {name}")):
        return counted
    return [Instruction(name, arguments)]


def _counted(form: _Counted, arguments: Mapping[str, Any], what: str) -> list[Instruction]:
    """One or two bounds on a count; none where the quantifier has no equivalent."""
    count: Any = arguments.get("N")
    if not is_count(count):
        raise DataError(f"{what} needs 'N', a whole number, 0 or more; found {shown(count)} (at most {LARGEST})")
    names = dict(form.names)
    rest = {names.get(argument, argument): value for argument, value in arguments.items() if argument not in ("N", "quantifier")}
    bounds = _bounds(arguments.get("quantifier"), count, form.around)
    return [Instruction(form.id, {**rest, form.count: limit, form.relation: relation}) for relation, limit in bounds]


def _bounds(quantifier: Any, count: int, around: Callable[[int], int] | None) -> list[tuple[str, int]]:
    if around is None:
        return [("at least", count), ("less than", count + 1)] if quantifier is None else []
    if quantifier == "around":
        return [("at least", max(count - around(count), 0)), ("less than", count + around(count) + 1)]
    bound = {"at least": ("at least", count), "less than": ("less than", count), "at most": ("less than", count + 1)}.get(str(quantifier))
    return [bound] if bound else []
