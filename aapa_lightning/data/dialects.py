"""One row of a dataset -> ``Record``: the schema, and the shapes in which other libraries write the same thing.

=================  ========================================================================================================================
dialect            columns
=================  ========================================================================================================================
native             ``prompt`` (text or chat turns), ``expert`` (text or list of texts), ``instructions``, ``chosen``, ``rejected``, ``key``
IFEval             ``prompt``, ``instruction_id_list``, ``kwargs``, ``key``
chat               ``messages``: a last assistant turn is the expert, the turns before it are the prompt
TRL completion     ``prompt``, ``completion`` (text or chat turns): the completion is the expert
TRL preference     ``prompt`` (may be left out), ``chosen``, ``rejected`` (text or chat turns)
=================  ========================================================================================================================

Absent and null mean the same. Every column that is none of these goes to ``Record.extra``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from aapa_lightning.errors import DataError
from aapa_lightning.types import Instruction, Message, Record

ROLES = ("system", "developer", "user", "assistant", "tool")

Turns = tuple[Message, ...]


def prompt_hash(prompt: str | Sequence[Message]) -> str:
    """SHA-256 (hex) of the prompt as canonical JSON. A chat of one user turn hashes as its text: both are the same prompt."""
    canonical: str | list[dict[str, str]]
    if isinstance(prompt, str):
        canonical = prompt
    elif len(prompt) == 1 and prompt[0]["role"] == "user":
        canonical = prompt[0]["content"]
    else:
        canonical = [{"content": turn["content"], "role": turn["role"]} for turn in prompt]
    return hashlib.sha256(json.dumps(canonical).encode()).hexdigest()


def parse_record(row: Mapping[str, Any], source: str, columns: Mapping[str, str] | None = None) -> Record:
    """Validate one row in any dialect.

    Where a row has both ``prompt`` and ``messages`` and no expert of its own, the conversation is read from ``messages``.

    Args:
        row: the columns.
        source: ``file:line`` or ``dataset:row``, named in every error.
        columns: where a field has another name in this dataset: field to column, ``{"expert": "response"}``.

    Raises:
        DataError: a field is missing, empty or of the wrong type, or a column of ``columns`` is missing.
    """
    fields = {name: value for name, value in _renamed(row, columns or {}, source).items() if value is not None}
    prompt, experts = _conversation(fields, source)
    prompt, chosen, rejected = _pair(fields, prompt, source)
    if prompt is None:
        raise DataError(
            f"{source}: no prompt; expected a column 'prompt' (text or chat turns) or 'messages', found columns {sorted(map(str, row))}"
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
    )


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str], source: str) -> dict[str, Any]:
    if missing := [column for column in columns.values() if column not in row]:
        raise DataError(f"{source}: columns names {missing[0]!r}, found only {sorted(map(str, row))}")
    taken = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in taken}
    return kept | {field: row[column] for field, column in columns.items()}


def text(value: Any, what: str, source: str, *, allow_empty: bool = False) -> str:
    """The value if it is usable text. Raises DataError that names ``source``."""
    if not isinstance(value, str):
        raise DataError(f"{source}: '{what}' must be text, found {type(value).__name__}")
    if not allow_empty and not value.strip():
        raise DataError(f"{source}: '{what}' is empty; remove the row or fill it in")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{source}: '{what}' holds half a surrogate pair at character {error.start}, which is not valid Unicode") from error
    return value


def scalar_key(value: Any, source: str) -> str | None:
    """A key as text; None stays None. Raises DataError unless it is text or a whole number."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{source}: 'key' must be text or a whole number, found {type(value).__name__}")
    return str(value)


def parse_turns(value: Any, what: str, source: str) -> Turns:
    """Validate chat turns: ``role`` and ``content`` (text) each; other keys are dropped, tool calls refused."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise DataError(f"{source}: '{what}' must be a list of chat turns {{role, content}}, not empty; found {type(value).__name__}")
    return tuple(_turn(turn, f"{what}[{i}]", source) for i, turn in enumerate(value))


def parse_prompt(value: Any, source: str) -> str | Turns:
    """Validate a prompt: text, or chat turns that do not end with the assistant's."""
    if isinstance(value, str):
        return text(value, "prompt", source)
    turns = parse_turns(value, "prompt", source)
    if turns[-1]["role"] == "assistant":
        raise DataError(
            f"{source}: 'prompt' ends with an assistant turn; put the response in 'expert', or write the whole conversation as 'messages'"
        )
    return turns


def _turn(turn: Any, what: str, source: str) -> Message:
    if not isinstance(turn, Mapping) or "role" not in turn:
        raise DataError(f"{source}: '{what}' must be an object with 'role' and 'content', found {_shape(turn)}")
    if turn["role"] not in ROLES:
        raise DataError(f"{source}: '{what}' has the role {turn['role']!r}; expected one of {', '.join(ROLES)}")
    if turn.get("tool_calls"):
        raise DataError(f"{source}: '{what}' has tool calls; only text turns are supported, write the call as text or leave the row out")
    return Message(role=turn["role"], content=text(turn.get("content"), f"{what}.content", source, allow_empty=turn["role"] == "system"))


def _shape(value: Any) -> str:
    return f"an object with {sorted(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__


def _conversation(columns: dict[str, Any], source: str) -> tuple[str | Turns | None, tuple[str, ...]]:
    """Take prompt and experts out of ``columns``."""
    if {"expert", "experts"} <= columns.keys():
        raise DataError(f"{source}: both 'expert' and 'experts'; keep one")
    given = columns.pop("expert", columns.pop("experts", None))
    if given is None and "completion" not in columns and "messages" in columns:
        columns.pop("prompt", None)
        turns = parse_turns(columns.pop("messages"), "messages", source)
        return _last_turn(turns, source) if turns[-1]["role"] == "assistant" else (turns, ())
    prompt = parse_prompt(columns.pop("prompt"), source) if "prompt" in columns else None
    if given is not None:
        return prompt, _experts(given, source)
    completion = columns.pop("completion", None)
    if completion is None or prompt is None:
        return prompt, ()
    if isinstance(completion, str):
        return prompt, (text(completion, "completion", source),)
    turns = parse_turns(completion, "completion", source)
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{source}: 'completion' must end with an assistant turn, found the role {turns[-1]['role']!r}")
    if len(turns) == 1:
        return prompt, (turns[0]["content"],)
    return _last_turn(_as_turns(prompt) + turns, source)


def _as_turns(prompt: str | Turns) -> Turns:
    return (Message(role="user", content=prompt),) if isinstance(prompt, str) else prompt


def _last_turn(turns: Turns, source: str) -> tuple[Turns, tuple[str, ...]]:
    if len(turns) < 2:
        raise DataError(f"{source}: the conversation has an assistant turn and no prompt before it")
    return turns[:-1], (turns[-1]["content"],)


def _experts(value: Any, source: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (text(value, "expert", source),)
    if not isinstance(value, Sequence):
        raise DataError(f"{source}: 'expert' must be text or a list of texts, found {type(value).__name__}")
    return tuple(text(expert, f"expert[{i}]", source) for i, expert in enumerate(value))


def _pair(columns: dict[str, Any], prompt: str | Turns | None, source: str) -> tuple[str | Turns | None, str | None, str | None]:
    """Take ``chosen`` and ``rejected`` out of ``columns``, and the prompt from what they share where there is none."""
    sides = {name: columns.pop(name) for name in ("chosen", "rejected") if name in columns}
    if not sides:
        return prompt, None, None
    if len(sides) == 1:
        raise DataError(f"{source}: '{next(iter(sides))}' without its counterpart; a pair needs both 'chosen' and 'rejected'")
    chosen, rejected = sides["chosen"], sides["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(f"{source}: 'chosen' and 'rejected' must both be text or both be chat turns")
    if isinstance(chosen, str):
        return _text_pair(prompt, chosen, rejected, source)
    return _chat_pair(prompt, parse_turns(chosen, "chosen", source), parse_turns(rejected, "rejected", source), source)


def _text_pair(prompt: str | Turns | None, chosen: str, rejected: str, source: str) -> tuple[str | Turns, str, str]:
    if prompt is None:
        # TRL's rule: what both share is the prompt; a space before the first difference belongs to the responses.
        same = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
        shared = "".join(character for character, _ in same).removesuffix(" ")
        prompt = text(shared, "prompt (the beginning that 'chosen' and 'rejected' share)", source)
        chosen, rejected = chosen[len(shared) :], rejected[len(shared) :]
    return prompt, text(chosen, "chosen", source), text(rejected, "rejected", source)


def _chat_pair(prompt: str | Turns | None, chosen: Turns, rejected: Turns, source: str) -> tuple[str | Turns, str, str]:
    before = chosen[:-1]
    if before != rejected[:-1]:
        raise DataError(f"{source}: 'chosen' and 'rejected' differ before their last turn; only the last assistant turn may differ")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1]["role"] != "assistant":
            raise DataError(f"{source}: '{name}' must end with an assistant turn, found the role {turns[-1]['role']!r}")
    if prompt is None:
        if not before:
            raise DataError(f"{source}: no prompt; add 'prompt', or let 'chosen' and 'rejected' begin with the same turns")
        prompt = before
    elif before and before != _as_turns(prompt):
        raise DataError(f"{source}: the turns before the response in 'chosen' are not those of 'prompt'; drop them or make them equal")
    return prompt, chosen[-1]["content"], rejected[-1]["content"]


def _instructions(columns: dict[str, Any], source: str) -> tuple[Instruction, ...]:
    """Take instructions out of ``columns``, in either shape."""
    if "instructions" in columns:
        rows = _list(columns.pop("instructions"), "instructions", source)
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping) or "id" not in row:
                raise DataError(f"{source}: 'instructions[{i}]' must be an object with 'id' and 'kwargs', found {_shape(row)}")
        pairs = [(row["id"], row.get("kwargs")) for row in rows]
    elif "instruction_id_list" in columns:
        ids = _list(columns.pop("instruction_id_list"), "instruction_id_list", source)
        kwargs = _list(_parsed_json(columns.pop("kwargs", [None] * len(ids)), source), "kwargs", source)
        if len(ids) != len(kwargs):
            raise DataError(f"{source}: {len(ids)} ids in 'instruction_id_list' but {len(kwargs)} entries in 'kwargs'; expected one each")
        pairs = list(zip(ids, kwargs, strict=True))
    else:
        return ()
    return tuple(_instruction(i, id_, kwargs, source) for i, (id_, kwargs) in enumerate(pairs))


def _parsed_json(kwargs: Any, source: str) -> Any:
    """Arguments that a dataset keeps as JSON text, read."""
    if not isinstance(kwargs, str):
        return kwargs
    try:
        return json.loads(kwargs)
    except ValueError as error:
        raise DataError(f"{source}: 'kwargs' is text but not JSON: {error}") from error


def _instruction(i: int, id_: Any, kwargs: Any, source: str) -> Instruction:
    name = text(id_, f"instruction {i}: id", source)
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise DataError(f"{source}: arguments of instruction {name!r} must be an object, found {type(kwargs).__name__}")
    # Arrow fills the arguments that an instruction does not have with nulls.
    return Instruction(name, {key: value for key, value in (kwargs or {}).items() if value is not None})


def _list(value: Any, what: str, source: str) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(f"{source}: '{what}' must be a list, found {type(value).__name__}")
    return value
