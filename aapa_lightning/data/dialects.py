"""One row of a dataset -> ``Record``: the schema, and the shapes in which other libraries write the same thing.

=================  ========================================================================================================================
dialect            columns
=================  ========================================================================================================================
native             ``prompt`` (text or chat turns), ``expert`` (text or a list), ``instructions``, ``chosen``, ``rejected``, ``key``
IFEval             ``prompt``, ``instruction_id_list``, ``kwargs``, ``key``
chat               ``messages``: a last assistant turn is the expert, the turns before it are the prompt
TRL completion     ``prompt``, ``completion`` (text or chat turns): the completion is the expert
TRL preference     ``prompt`` (may be left out), ``chosen``, ``rejected`` (text or chat turns); one of the two may stand alone
labelled (KTO)     a completion or a chat with ``label`` true or false (1, 0, "True", "False"): the response is ``chosen`` or
                   ``rejected``, not an expert
RLVR               ``ground_truth`` beside a prompt: the constraints become instructions (``ground_truth.py``)
=================  ========================================================================================================================

Fields of chat turns other than role and content stay with the turn, for chat templates; so do the columns ``tools`` and
``chat_template_kwargs``, in ``Record.extra``. Absent and null mean the same, in a row and in the objects inside it. A rejected response
may be empty (a policy can answer nothing), and so may a turn that calls tools; all other text may not. Every column that is none of these
goes to ``Record.extra``, and so do ``ground_truth`` and a ``label`` that is not true or false.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise, takewhile
from typing import Any

from aapa_lightning.data.fields import (
    Turns,
    parse_instructions,
    parse_prompt,
    parse_template_columns,
    parse_turns,
    reply_of,
    scalar_key,
    text,
    without_nulls,
)
from aapa_lightning.data.ground_truth import ground_truth_instructions
from aapa_lightning.errors import DataError, shown
from aapa_lightning.types import Instruction, Message, Record


def prompt_hash(prompt: str | Sequence[Message]) -> str:
    """SHA-256 (hex) of the prompt as canonical JSON. A chat of one user turn hashes as its text: both are the same prompt."""
    canonical: str | list[dict[str, Any]]
    if isinstance(prompt, str):
        canonical = prompt
    elif len(prompt) == 1 and prompt[0]["role"] == "user" and prompt[0].keys() <= {"role", "content", "weight"}:
        canonical = prompt[0]["content"]
    else:
        canonical = [{name: value for name, value in sorted(turn.items()) if name != "weight"} for turn in prompt]
    return hashlib.sha256(json.dumps(canonical, default=str).encode()).hexdigest()


def prompt_text(prompt: str | Sequence[Message]) -> str:
    """The prompt as plain text, the turns of a chat one after another."""
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


def parse_record(row: Mapping[str, Any], source: str, columns: Mapping[str, str] | None = None) -> Record:
    """Validate one row in any dialect.

    Where a row has both ``prompt`` and ``messages`` and no expert of its own, the conversation is read from ``messages``.

    Args:
        row: the columns.
        source: ``file:line`` or ``dataset:row``, named in every error.
        columns: where a field has another name in this dataset: field to column, ``{"expert": "response"}``; absent means null.

    Raises:
        DataError: a field is missing, empty or of the wrong type.
    """
    fields = _without_nulls(_renamed(row, columns or {}), source)
    label = _label(fields)
    parse_template_columns(fields, source)
    prompt, experts = _conversation(fields, source, may_be_empty=label is False)
    if label is None:
        prompt, chosen, rejected = _pair(fields, prompt, source)
    else:
        if not experts and prompt is not None:
            raise DataError(f"{source}: 'label' without a response; let 'messages' end with an assistant turn, or remove the label")
        labelled, experts = next(iter(experts), None), ()
        chosen, rejected = (labelled, None) if label else (None, labelled)
    if prompt is None:
        refuse_missing_columns(columns, list(row), source)
        raise DataError(
            f"{source}: no prompt; expected a column 'prompt' (text or chat turns) or 'messages', found columns "
            f"{shown(sorted(map(str, row)), 400)}"
        )
    return Record(
        prompt=prompt,
        experts=experts,
        instructions=_instructions(fields, source),
        chosen=chosen,
        rejected=rejected,
        key=scalar_key(fields.pop("key", None), source),
        extra=fields,
        source=source,
        row=row,
    )


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    taken = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in taken}
    return kept | {field: row.get(column) for field, column in columns.items()}


def refuse_missing_columns(columns: Mapping[str, str] | None, found: Sequence[str], source: str) -> None:
    """Raise DataError for a name in ``columns`` that is not among the columns found."""
    if missing := [name for name in (columns or {}).values() if name not in found]:
        raise DataError(f"{source}: columns names {missing[0]!r}, found only {shown(sorted(map(str, found)), 400)}")


def _without_nulls(row: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The row without what is null, at any depth: Arrow fills an object's missing fields with nulls, JSON leaves them out."""
    try:
        return dict(without_nulls(row))
    except RecursionError as error:
        raise DataError(f"{source}: nested too deeply") from error


def _instructions(columns: dict[str, Any], source: str) -> tuple[Instruction, ...]:
    """Take instructions out of ``columns``; a ``ground_truth`` stays, for rewards that read it."""
    constraints = ground_truth_instructions(columns.get("ground_truth"), source)
    given = next((name for name in ("instructions", "instruction_id_list") if name in columns), None)
    if constraints is None:
        return parse_instructions(columns, source)
    if given is not None:
        raise DataError(f"{source}: constraints both in '{given}' and in 'ground_truth'; keep one")
    return constraints


def _label(columns: dict[str, Any]) -> bool | None:
    """Take a label of the row's response out of ``columns``; None where it labels no response, or is not true or false."""
    other = {"expert", "experts", "chosen", "rejected"} & columns.keys()
    if other or not {"completion", "messages"} & columns.keys() or (label := parse_label(columns.get("label"))) is None:
        return None
    del columns["label"]
    return label


def parse_label(value: Any) -> bool | None:
    """True or false, also written as 1, 0, or text; None for everything else."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def _conversation(columns: dict[str, Any], source: str, *, may_be_empty: bool) -> tuple[str | Turns | None, tuple[str, ...]]:
    """Take prompt and experts out of ``columns``; ``may_be_empty`` speaks of the response."""
    if {"expert", "experts"} <= columns.keys():
        raise DataError(f"{source}: both 'expert' and 'experts'; keep one")
    given = columns.pop("expert", columns.pop("experts", None))
    if given is None and "completion" not in columns and "messages" in columns:
        columns.pop("prompt", None)
        turns = parse_turns(columns.pop("messages"), "messages", source, may_end_empty=may_be_empty)
        return _last_turn(turns, source) if turns[-1]["role"] == "assistant" else (turns, ())
    prompt = parse_prompt(columns.pop("prompt"), source) if "prompt" in columns else None
    if given is not None:
        return prompt, _experts(given, source)
    completion = columns.pop("completion", None)
    if completion is None or prompt is None:
        return prompt, ()
    if isinstance(completion, str):
        return prompt, (text(completion, "completion", source, allow_empty=may_be_empty),)
    turns = _responding(completion, "completion", source, may_be_empty=may_be_empty)
    if len(turns) == 1:
        return prompt, (reply_of(turns[0]),)
    return _last_turn(_as_turns(prompt) + turns, source)


def _as_turns(prompt: str | Turns) -> Turns:
    return (Message(role="user", content=prompt),) if isinstance(prompt, str) else prompt


def _last_turn(turns: Turns, source: str) -> tuple[Turns, tuple[str, ...]]:
    if len(turns) < 2:
        raise DataError(f"{source}: the conversation has an assistant turn and no prompt before it")
    return turns[:-1], (reply_of(turns[-1]),)


def _experts(value: Any, source: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (text(value, "expert", source),)
    if not isinstance(value, Sequence):
        raise DataError(f"{source}: 'expert' must be text or a list of texts, found {type(value).__name__}")
    return tuple(_expert(expert, f"expert[{i}]", source) for i, expert in enumerate(value))


def _expert(value: Any, what: str, source: str) -> str:
    """An expert response: text, or the assistant's turn."""
    if not isinstance(value, Mapping):
        return text(value, what, source)
    return reply_of(_responding([value], what, source, may_be_empty=False)[0])


def _responding(value: Any, name: str, source: str, *, may_be_empty: bool) -> Turns:
    """Chat turns that end with the assistant's."""
    turns = parse_turns(value, name, source, may_end_empty=may_be_empty)
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{source}: '{name}' must end with an assistant turn, found the role {turns[-1]['role']!r}")
    return turns


def _pair(columns: dict[str, Any], prompt: str | Turns | None, source: str) -> tuple[str | Turns | None, str | None, str | None]:
    """Take ``chosen`` and ``rejected`` out of ``columns``, and the prompt from what they share where there is none."""
    sides: dict[str, Any] = {name: columns.pop(name) for name in ("chosen", "rejected") if name in columns}
    if len({isinstance(value, str) for value in sides.values()}) == 2:
        raise DataError(f"{source}: 'chosen' and 'rejected' must both be text or both be chat turns")
    if any(isinstance(value, str) for value in sides.values()):
        prompt, texts = _texts(prompt, sides, source)
    else:
        turns = {name: _responding(value, name, source, may_be_empty=name == "rejected") for name, value in sides.items()}
        prompt, texts = _last_turns(prompt, turns, source)
    return prompt, texts.get("chosen"), texts.get("rejected")


def _texts(prompt: str | Turns | None, sides: dict[str, str], source: str) -> tuple[str | Turns | None, dict[str, str]]:
    if prompt is None and len(sides) == 2:
        # TRL's rule: what both share is the prompt; a space before the first difference belongs to the responses.
        same = takewhile(lambda pair: pair[0] == pair[1], zip(*sides.values(), strict=False))
        shared = "".join(character for character, _ in same).removesuffix(" ")
        prompt = text(shared, "prompt (the beginning that 'chosen' and 'rejected' share)", source)
        sides = {name: value[len(shared) :] for name, value in sides.items()}
    return prompt, {name: text(value, name, source, allow_empty=name == "rejected") for name, value in sides.items()}


def _last_turns(prompt: str | Turns | None, sides: dict[str, Turns], source: str) -> tuple[str | Turns | None, dict[str, str]]:
    if any(turns[:-1] != other[:-1] for turns, other in pairwise(sides.values())):
        raise DataError(f"{source}: 'chosen' and 'rejected' differ before their last turn; only the last assistant turn may differ")
    for name, turns in sides.items():
        before = turns[:-1]
        if prompt is None:
            if not before:
                raise DataError(f"{source}: no prompt; add 'prompt', or let '{name}' begin with the turns of the prompt")
            prompt = before
        elif before and before != _as_turns(prompt):
            raise DataError(f"{source}: the turns before the response in '{name}' are not those of 'prompt'; drop them or make them equal")
    return prompt, {name: reply_of(turns[-1]) for name, turns in sides.items()}
