"""Fields of a row, checked: text, keys, chat turns, prompts, instructions. Every error names the row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

from aapa_lightning.errors import DataError
from aapa_lightning.types import Instruction, Message, Reply

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
    """Validate chat turns: ``role`` and ``content`` (text) each; other keys that are not null are kept for chat templates.

    Only a system turn, what a tool says and a turn that calls tools may be empty, and with ``may_end_empty`` the last turn.
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


def reply_of(turn: Message) -> str:
    """The text of an assistant's turn: its content, and its tool calls as JSON, one a line. A ``Reply`` where the turn has more fields."""
    if turn.keys() <= {"role", "content"}:
        return turn["content"]
    calls = [json.dumps(call.get("function", call), ensure_ascii=False, default=str) for call in turn.get("tool_calls", ())]
    return Reply("\n".join(filter(None, [turn["content"], *calls])), turn)


def turn_of(response: str) -> Message:
    """The assistant's turn of a response; ``reply_of`` reads it back."""
    return response.turn if isinstance(response, Reply) else Message(role="assistant", content=response)


def parse_template_columns(columns: dict[str, Any], source: str) -> None:
    """Validate, in place, the columns that chat templates read: ``tools`` and ``chat_template_kwargs``, as they are or as JSON text.

    A column ``tools`` that is no list of objects is a column like any other.

    Raises:
        DataError: JSON text that is malformed, or template options that are no object or that the encoder sets itself.
    """
    tools = columns.get("tools")
    if isinstance(tools, str) and tools.lstrip().startswith("["):
        tools = _parsed_json(tools, "tools", source)
    if isinstance(tools, Sequence) and not isinstance(tools, str) and all(isinstance(tool, Mapping) for tool in tools):
        columns["tools"] = without_nulls(tools)
    if "chat_template_kwargs" in columns:
        options = _parsed_json(columns["chat_template_kwargs"], "chat_template_kwargs", source)
        if not isinstance(options, Mapping):
            raise DataError(f"{source}: 'chat_template_kwargs' must be an object, found {type(options).__name__}")
        columns["chat_template_kwargs"] = without_nulls(options)


def without_nulls(value: Any) -> Any:
    """A nested value without the keys whose value is null, which Arrow puts where other rows have a value."""
    if isinstance(value, Mapping):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _turn(turn: Any, what: str, source: str, *, may_be_empty: bool) -> Message:
    if not isinstance(turn, Mapping) or "role" not in turn:
        raise DataError(f"{source}: '{what}' must be an object with 'role' and 'content', found {_shape(turn)}")
    role = turn["role"]
    if role not in ROLES:
        raise DataError(f"{source}: '{what}' has the role {role!r}; expected one of {', '.join(ROLES)}")
    others = without_nulls({name: value for name, value in turn.items() if name not in ("role", "content")})
    if _weight(others.get("weight", 1), what, source):
        others.pop("weight", None)
    if not others.get("tool_calls"):
        others.pop("tool_calls", None)
    else:
        others["tool_calls"] = [_tool_call(call, what, source) for call in _list(others["tool_calls"], what, source)]
    content = turn.get("content")
    if content is None and "tool_calls" in others:
        content = ""
    may_be_empty = may_be_empty or role in ("system", "tool") or "tool_calls" in others
    return cast(Message, {"role": role, "content": text(content, f"{what}.content", source, allow_empty=may_be_empty), **others})


def _weight(value: Any, what: str, source: str) -> bool:
    if value not in (0, 1):
        raise DataError(f"{source}: '{what}.weight' must be 0 (not learned) or 1, found {value!r:.40}")
    return bool(value)


def _tool_call(call: Any, what: str, source: str) -> dict[str, Any]:
    """A tool call; arguments that are JSON text become the object that chat templates expect."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(
            f"{source}: the tool calls in '{what}' must be objects with a 'function', its 'name' and 'arguments'; found {_shape(call)}"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            parsed = json.loads(arguments)
            function = {**function, "arguments": parsed if isinstance(parsed, dict) else arguments}
    return {**call, "function": function} if "function" in call else dict(function)


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
    arguments = [None] * len(listed) if kwargs is None else _list(_parsed_json(kwargs, "kwargs", source), names[1], source)
    if len(listed) != len(arguments):
        raise DataError(f"{source}: {len(listed)} ids in '{names[0]}' but {len(arguments)} entries in '{names[1]}'; expected one each")
    return _instructions(zip(listed, arguments, strict=True), source)


def _instructions(pairs: Iterable[tuple[Any, Any]], source: str) -> tuple[Instruction, ...]:
    return tuple(_instruction(i, id_, kwargs, source) for i, (id_, kwargs) in enumerate(pairs))


def _parsed_json(value: Any, name: str, source: str) -> Any:
    """A value that a dataset may keep as JSON text, read."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: '{name}' is text but not JSON: {error}") from error


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
