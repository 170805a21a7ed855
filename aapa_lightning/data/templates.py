"""Chat templates: what they are given, and what they make of it.

Everything that comes from a record is marked before a template sees it: control tokens that its texts spell stay text
(``control_tokens.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from aapa_lightning.data.control_tokens import marked_values, unmarked
from aapa_lightning.data.fields import turn_of
from aapa_lightning.data.prompt_format import RESERVED, PromptFormat
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Message, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The way out of a template that cannot do what is asked.
ANOTHER = "name another template with policy.chat_template"


def uses_template(tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat) -> bool:
    """Return whether prompts go through the tokenizer's chat template. Raises ConfigError when the format demands one that is not there."""
    has_one = bool(tokenizer.chat_template)
    if fmt.chat_template == "always" and not has_one:
        raise ConfigError("chat_template is 'always', but the tokenizer has no chat template; use 'auto', or a tokenizer that has one")
    used = has_one and fmt.chat_template != "never"
    if fmt.system_prompt is not None and not used:
        raise ConfigError("system_prompt needs a chat template, and none is used; write the text into the prompts, or use a template")
    return used


def chat_turns(prompt: str | Sequence[Message], system_prompt: str | None) -> list[Message]:
    """A prompt's turns, a text prompt as the user's, after a system turn where there is none."""
    turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
    if system_prompt is not None and turns[0]["role"] not in ("system", "developer"):
        turns.insert(0, Message(role="system", content=system_prompt))
    return turns


def turns_of(record: Record, fmt: PromptFormat) -> list[Message]:
    """The turns of a record's prompt."""
    return chat_turns(record.prompt, fmt.system_prompt)


def render(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], record: Record, fmt: PromptFormat, *, generation_prompt: bool
) -> str:
    """The rendering of some turns with a record's options, marked. Raises DataError when the template refuses them."""
    try:
        return apply_template(tokenizer, turns, template_options(tokenizer, record, fmt), generation_prompt=generation_prompt)
    except Exception as error:  # templates are code, and raise what they like
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(f"{record.source}: the chat template refuses the turns ({roles}): {unmarked(str(error))}") from error


def apply_template(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], options: Mapping[str, Any], *, generation_prompt: bool
) -> str:
    """The template's rendering of some turns, marked. Arguments of tool calls are given as objects, or as text where it refuses those.

    Args:
        tokenizer: has a chat template.
        turns: at least one.
        options: of the template, ``tools`` among them.
        generation_prompt: whether the assistant's turn is begun at the end.

    Raises:
        Exception: whatever a template that refuses the turns raises.
    """
    given = [for_template(tokenizer, turn) for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=generation_prompt, **options))
    except Exception:
        if not any("tool_calls" in turn for turn in turns):
            raise
        given = [_with_text_arguments(turn) for turn in given]
        return str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=generation_prompt, **options))


def template_source(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str:
    """The template that is used with some options: a tokenizer can have another one for tools."""
    return str(tokenizer.get_chat_template(tools=options.get("tools")))


def template_options(tokenizer: PreTrainedTokenizerBase, record: Record, fmt: PromptFormat) -> dict[str, Any]:
    """Options of the template: the format's, and over them the record's own."""
    own = record.extra.get("chat_template_kwargs") or {}
    if reserved := RESERVED & own.keys():
        raise DataError(
            f"{record.source}: chat_template_kwargs cannot set {sorted(reserved)}: the encoder does; give options of the template"
        )
    options = {**fmt.chat_template_kwargs, **marked_values(tokenizer, own)}
    tools = _tools(record)
    return options if tools is None else {**options, "tools": marked_values(tokenizer, tools)}


def template_fields(record: Record) -> list[str]:
    """Return what a record holds for chat templates beside roles and texts: other fields of its turns, tools, template options; sorted."""
    turns = [] if isinstance(record.prompt, str) else list(record.prompt)
    turns += [turn_of(response) for response in (*record.experts, record.chosen, record.rejected) if response is not None]
    weights = {"weight"} & {name for turn in turns for name in turn}
    return sorted({*_fields(turns, record), *weights})


def unread_fields(tokenizer: PreTrainedTokenizerBase, record: Record, fmt: PromptFormat) -> list[str]:
    """Fields of a record's turns, and columns meant for a chat template, that change nothing of what the template writes; sorted."""
    responses = [response for response in (*record.experts, record.chosen, record.rejected) if response is not None] or [""]
    found: dict[str, bool] = {}
    for response in responses:
        turns = [*turns_of(record, fmt), turn_of(response)]
        for name in _fields(turns, record):
            found[name] = found.get(name, False) or _is_read(tokenizer, name, turns, record, fmt)
    return sorted(name for name, read in found.items() if not read)


def require_tool_calls(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], record: Record, fmt: PromptFormat) -> None:
    """Raise DataError when the template writes nothing of the turns' tool calls."""
    if any("tool_calls" in turn for turn in turns) and not _is_read(tokenizer, "tool_calls", turns, record, fmt):
        raise DataError(
            f"{record.source}: the turns have tool calls, which the chat template does not write; write the call as text, {ANOTHER}, or "
            "leave the row out"
        )


def _is_read(tokenizer: PreTrainedTokenizerBase, name: str, turns: Sequence[Message], record: Record, fmt: PromptFormat) -> bool:
    """Return whether the rendering changes, or fails, without a field of the turns or a column of the record."""
    without = replace(record, extra={key: value for key, value in record.extra.items() if key != name})
    fewer = [cast(Message, {key: value for key, value in turn.items() if key != name}) for turn in turns]
    whole = render(tokenizer, turns, record, fmt, generation_prompt=False)
    try:
        return whole != render(tokenizer, fewer, without, fmt, generation_prompt=False)
    except DataError:
        return True


def _fields(turns: Sequence[Message], record: Record) -> list[str]:
    own = {name for turn in turns for name in turn} - {"role", "content", "weight"}
    columns = [name for name in ("tools", "chat_template_kwargs") if record.extra.get(name)]
    return sorted(own) + [name for name in columns if name != "tools" or _tools(record)]


def _tools(record: Record) -> list[Any] | None:
    tools = record.extra.get("tools")
    return tools if isinstance(tools, list) and tools and all(isinstance(tool, dict) for tool in tools) else None


def for_template(tokenizer: PreTrainedTokenizerBase, turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn as a template reads it: marked, without its weight, and without an empty content where it calls tools."""
    left_out = {"weight"} if turn["content"] or "tool_calls" not in turn else {"weight", "content"}
    given = {name: value for name, value in turn.items() if name not in left_out}
    return {name: value if name == "role" else marked_values(tokenizer, value) for name, value in given.items()}


def _with_text_arguments(turn: dict[str, Any]) -> dict[str, Any]:
    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        if isinstance(call.get("function"), dict):
            return {**call, "function": as_text(call["function"])}
        arguments = call.get("arguments")
        return call if arguments is None or isinstance(arguments, str) else {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}

    return {**turn, "tool_calls": [as_text(call) for call in turn["tool_calls"]]} if "tool_calls" in turn else turn
