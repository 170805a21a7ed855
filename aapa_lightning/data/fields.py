"""Fields of a row, checked: text, keys, chat turns, prompts, instructions. Every error names the row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aapa_lightning.errors import DataError
from aapa_lightning.types import Instruction, Message

ROLES = ("system", "developer", "user", "assistant", "tool")

Turns = tuple[Message, ...]


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


def parse_turns(value: Any, what: str, source: str, *, may_end_empty: bool = False) -> Turns:
    """Validate chat turns: ``role`` and ``content`` (text) each; other keys are dropped, tool calls refused.

    Only a system turn may be empty, and with ``may_end_empty`` the last turn.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise DataError(f"{source}: '{what}' must be a list of chat turns {{role, content}}, not empty; found {type(value).__name__}")
    last = len(value) - 1
    return tuple(_turn(turn, f"{what}[{i}]", source, may_be_empty=may_end_empty and i == last) for i, turn in enumerate(value))


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


def _turn(turn: Any, what: str, source: str, *, may_be_empty: bool) -> Message:
    if not isinstance(turn, Mapping) or "role" not in turn:
        raise DataError(f"{source}: '{what}' must be an object with 'role' and 'content', found {_shape(turn)}")
    if turn["role"] not in ROLES:
        raise DataError(f"{source}: '{what}' has the role {turn['role']!r}; expected one of {', '.join(ROLES)}")
    if turn.get("tool_calls"):
        raise DataError(f"{source}: '{what}' has tool calls; only text turns are supported, write the call as text or leave the row out")
    content = text(turn.get("content"), f"{what}.content", source, allow_empty=may_be_empty or turn["role"] == "system")
    return Message(role=turn["role"], content=content)


def _shape(value: Any) -> str:
    return f"an object with {sorted(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__


def parse_instructions(columns: dict[str, Any], source: str) -> tuple[Instruction, ...]:
    """Take instructions out of ``columns``, in either shape."""
    if "instructions" in columns:
        rows = _list(columns.pop("instructions"), "instructions", source)
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping) or "id" not in row:
                raise DataError(f"{source}: 'instructions[{i}]' must be an object with 'id' and 'kwargs', found {_shape(row)}")
        pairs = [(row["id"], row.get("kwargs")) for row in rows]
    elif "instruction_id_list" in columns:
        given = columns.pop("instruction_id_list"), columns.pop("kwargs", None)
        return paired_instructions(*given, ("instruction_id_list", "kwargs"), source)
    else:
        return ()
    return _instructions(pairs, source)


def paired_instructions(ids: Any, kwargs: Any, names: tuple[str, str], source: str) -> tuple[Instruction, ...]:
    """Instructions from a list of identifiers and one of arguments (None for no arguments anywhere).

    Args:
        ids: identifiers.
        kwargs: an object or null each; the list may be JSON text.
        names: what both are called in the row, for errors.
        source: ``file:line``.

    Raises:
        DataError: not lists, or not equally long.
    """
    listed = _list(ids, names[0], source)
    arguments = [None] * len(listed) if kwargs is None else _list(_parsed_json(kwargs, source), names[1], source)
    if len(listed) != len(arguments):
        raise DataError(f"{source}: {len(listed)} ids in '{names[0]}' but {len(arguments)} entries in '{names[1]}'; expected one each")
    return _instructions(zip(listed, arguments, strict=True), source)


def _instructions(pairs: Iterable[tuple[Any, Any]], source: str) -> tuple[Instruction, ...]:
    return tuple(_instruction(i, id_, kwargs, source) for i, (id_, kwargs) in enumerate(pairs))


def _parsed_json(kwargs: Any, source: str) -> Any:
    """Arguments that a dataset keeps as JSON text, read."""
    if not isinstance(kwargs, str):
        return kwargs
    try:
        return json.loads(kwargs)
    except (ValueError, RecursionError) as error:
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
