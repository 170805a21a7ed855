"""Chat templates: rendering prompts and responses, and finding the assistant's turns in what was rendered.

What is rendered is marked: control tokens that the record's texts spell stay text (``control_tokens.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from aapa_lightning.data.control_tokens import Encoded, before_token, encode, marked, marked_values, positions, unmarked
from aapa_lightning.data.fields import turn_of
from aapa_lightning.data.prompt_format import RESERVED, PromptFormat
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Message, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = Mapping[str, Any]

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BLANK = re.compile(r"\s+")
_ANOTHER = "name another template with policy.chat_template"


def uses_template(tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat) -> bool:
    """Whether prompts go through the tokenizer's chat template. Raises ConfigError when the format demands one that is not there."""
    has_one = bool(tokenizer.chat_template)
    if fmt.chat_template == "always" and not has_one:
        raise ConfigError("chat_template is 'always', but the tokenizer has no chat template; use 'auto', or a tokenizer that has one")
    used = has_one and fmt.chat_template != "never"
    if fmt.system_prompt is not None and not used:
        raise ConfigError("system_prompt needs a chat template, and none is used; write the text into the prompts, or use a template")
    return used


def render_prompt(tokenizer: PreTrainedTokenizerBase, record: Record, fmt: PromptFormat) -> str:
    """The prompt's text, generation prompt included, marked. Raises DataError when the prompt does not fit the template."""
    if uses_template(tokenizer, fmt):
        turns = _turns(record, fmt)
        _require_tool_calls(tokenizer, turns, record, fmt)
        return _render(tokenizer, turns, record, fmt, generation_prompt=True)
    if isinstance(record.prompt, str):
        return marked(tokenizer, record.prompt)
    raise DataError(
        f"{record.source}: the prompt is a chat, but no chat template is used; give text prompts or a tokenizer with a template"
    )


def render_response(
    tokenizer: PreTrainedTokenizerBase, record: Record, expert: str, prompt: str, fmt: PromptFormat, eos_token_id: int
) -> str:
    """What follows the rendered ``prompt``, up to and without the first EOS that the template writes there, marked.

    Raises:
        ConfigError: the whole conversation does not begin with the prompt's text, or lacks the response's.
        DataError: the template refuses the response, or does not write its tool calls.
    """
    if not uses_template(tokenizer, fmt):
        return marked(tokenizer, expert)
    turn = turn_of(expert)
    turns = [*_turns(record, fmt), turn]
    if "tool_calls" in turn:
        _require_tool_calls(tokenizer, turns, record, fmt)
    whole = _render(tokenizer, turns, record, fmt, generation_prompt=False)
    _require_text(turn["content"], "", whole, record)
    if not whole.startswith(prompt):
        raise ConfigError(
            f"{record.source}: the chat template renders the conversation differently from the prompt with its generation prompt "
            f"({_difference(whole, prompt)}), so a response cannot be cut out; try other chat_template_kwargs (such as enable_thinking), "
            f"or {_ANOTHER}"
        )
    rest = whole[len(prompt) :]
    response, ended = before_token(rest, cast(str, tokenizer.convert_ids_to_tokens(eos_token_id)))
    if not ended:  # a template that ends a turn without this EOS: its own trailing space goes, the expert's stays
        response = rest.rstrip()
        given = marked(tokenizer, turn["content"])
        response += given[len(given.rstrip()) :] if response.endswith(given.rstrip()) else ""
    _require_text(turn["content"], prompt, prompt + response, record)
    return response


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat, eos_token_ids: Sequence[int]) -> int:
    """Which EOS of a set ends a response: the first that the template writes after one, else the tokenizer's, else the first.

    Llama's template ends a turn with ``<|eot_id|>`` while the tokenizer's EOS can be another token, and Phi-3's writes its turn's end and
    then the tokenizer's EOS; both are in the set.

    Raises:
        ConfigError: the set is empty.
    """
    if not eos_token_ids:
        raise ConfigError("no end-of-sequence token: give the model's generation config or the tokenizer an EOS")
    if uses_template(tokenizer, fmt):
        probe, answer = Record(prompt="a", source="a probe of the chat template"), "zq"
        turns = [*_turns(probe, fmt), turn_of(answer)]
        _, _, after = _render(tokenizer, turns, probe, fmt, generation_prompt=False).rpartition(answer)
        for token in encode(tokenizer, after).ids:
            if token in eos_token_ids:
                return token
    eos = tokenizer.eos_token_id
    return eos if isinstance(eos, int) and eos in eos_token_ids else eos_token_ids[0]


def assistant_mask(
    tokenizer: PreTrainedTokenizerBase, record: Record, prompt: str, encoded: Encoded, fmt: PromptFormat, eos_token_id: int
) -> list[bool]:
    """Mask of the assistant turns inside a rendered prompt, with the EOS that ends each; those of weight 0 are left out.

    From the template's ``{% generation %}`` blocks where it has them, else from renderings of the conversation's beginnings.

    Args:
        tokenizer: a fast tokenizer.
        record: gives the turns.
        prompt: as rendered.
        encoded: its tokens, without a BOS of ours.
        fmt: as it was rendered with.
        eos_token_id: ends a turn.

    Raises:
        ConfigError: the template has no such blocks and renders a beginning differently once more turns follow, or it ends a turn
            without the EOS.
    """
    turns = _turns(record, fmt)
    mask = [False] * len(encoded.ids)
    learned = [turn.get("weight", 1) != 0 for turn in turns if turn["role"] == "assistant"]
    if not any(learned):
        return mask
    if not tokenizer.is_fast:
        raise ConfigError("assistant_turns='all' needs character offsets, which a slow tokenizer lacks; use a fast one, or 'last'")
    if _GENERATION_BLOCK.search(_template_of(tokenizer, _options(tokenizer, record, fmt))):
        spans = _generation_spans(tokenizer, turns, record, prompt, fmt, learned)
    else:
        spans = _assistant_spans(tokenizer, turns, record, prompt, fmt, eos_token_id)
    borders = positions(tokenizer, prompt, [place for span in spans for place in span])
    for start, end in zip(borders[::2], borders[1::2], strict=True):
        inside = [i for i, (a, b) in enumerate(encoded.offsets) if a < b and a < end and b > start]
        if not inside:
            continue
        last = next((i for i in range(inside[0], len(mask)) if encoded.ids[i] == eos_token_id), None)
        between = [] if last is None else encoded.ids[inside[-1] + 1 : last]
        if last is None or _text_of(tokenizer, between).strip():
            raise ConfigError(
                f"{record.source}: assistant_turns='all' needs a chat template that ends every assistant turn with "
                f"{_text_of(tokenizer, [eos_token_id])!r}, which stops the policy; this one does not: {_ANOTHER}, or set "
                "assistant_turns to 'last'"
            )
        for i in range(inside[0], last + 1):
            mask[i] = True
    return mask


def unread_fields(tokenizer: PreTrainedTokenizerBase, record: Record, fmt: PromptFormat) -> list[str]:
    """Fields of a record's turns, and columns meant for a chat template, that change nothing of what the template writes; sorted."""
    responses = [response for response in (*record.experts, record.chosen, record.rejected) if response is not None] or [""]
    found: dict[str, bool] = {}
    for response in responses:
        turns = [*_turns(record, fmt), turn_of(response)]
        for name in _template_fields(turns, record):
            found[name] = found.get(name, False) or _is_read(tokenizer, name, turns, record, fmt)
    return sorted(name for name, read in found.items() if not read)


def template_fields(record: Record) -> list[str]:
    """What a record holds for chat templates beside roles and texts: other fields of its turns, tools, template options; sorted."""
    turns = [] if isinstance(record.prompt, str) else list(record.prompt)
    turns += [turn_of(response) for response in (*record.experts, record.chosen, record.rejected) if response is not None]
    weights = {"weight"} & {name for turn in turns for name in turn}
    return sorted({*_template_fields(turns, record), *weights})


def chat_turns(prompt: str | Sequence[Message], system_prompt: str | None) -> list[Message]:
    """A prompt's turns, a text prompt as the user's, after a system turn where there is none."""
    turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
    if system_prompt is not None and turns[0]["role"] not in ("system", "developer"):
        turns.insert(0, Message(role="system", content=system_prompt))
    return turns


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
        TemplateError, TypeError, ValueError: the template refuses the turns.
    """
    from jinja2 import TemplateError

    given = [_for_template(tokenizer, turn) for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=generation_prompt, **options))
    except (TemplateError, TypeError):
        if not any("tool_calls" in turn for turn in turns):
            raise
        given = [_with_text_arguments(turn) for turn in given]
        return str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=generation_prompt, **options))


def _turns(record: Record, fmt: PromptFormat) -> list[Message]:
    return chat_turns(record.prompt, fmt.system_prompt)


def _tools(record: Record) -> list[Any] | None:
    tools = record.extra.get("tools")
    return tools if isinstance(tools, list) and tools and all(isinstance(tool, dict) for tool in tools) else None


def _options(tokenizer: PreTrainedTokenizerBase, record: Record, fmt: PromptFormat) -> dict[str, Any]:
    """Options of the template: the format's, and over them the record's own."""
    own = record.extra.get("chat_template_kwargs") or {}
    if reserved := RESERVED & own.keys():
        raise DataError(
            f"{record.source}: chat_template_kwargs cannot set {sorted(reserved)}: the encoder does; give options of the template"
        )
    options = {**fmt.chat_template_kwargs, **marked_values(tokenizer, own)}
    tools = _tools(record)
    return options if tools is None else {**options, "tools": marked_values(tokenizer, tools)}


def _template_of(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str:
    return str(tokenizer.get_chat_template(tools=options.get("tools")))


def _text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids)))


def _for_template(tokenizer: PreTrainedTokenizerBase, turn: Turn) -> dict[str, Any]:
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


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], record: Record, fmt: PromptFormat, *, generation_prompt: bool
) -> str:
    from jinja2 import TemplateError

    try:
        return apply_template(tokenizer, turns, _options(tokenizer, record, fmt), generation_prompt=generation_prompt)
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(f"{record.source}: the chat template refuses the turns ({roles}): {unmarked(str(error))}") from error


def _template_fields(turns: Sequence[Message], record: Record) -> list[str]:
    own = {name for turn in turns for name in turn} - {"role", "content", "weight"}
    columns = [name for name in ("tools", "chat_template_kwargs") if record.extra.get(name)]
    return sorted(own) + [name for name in columns if name != "tools" or _tools(record)]


def _is_read(tokenizer: PreTrainedTokenizerBase, name: str, turns: Sequence[Message], record: Record, fmt: PromptFormat) -> bool:
    """Whether the rendering changes, or fails, without a field of the turns or a column of the record."""
    without = replace(record, extra={key: value for key, value in record.extra.items() if key != name})
    fewer = [cast(Message, {key: value for key, value in turn.items() if key != name}) for turn in turns]
    whole = _render(tokenizer, turns, record, fmt, generation_prompt=False)
    try:
        return whole != _render(tokenizer, fewer, without, fmt, generation_prompt=False)
    except DataError:
        return True


def _require_tool_calls(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], record: Record, fmt: PromptFormat) -> None:
    if any("tool_calls" in turn for turn in turns) and not _is_read(tokenizer, "tool_calls", turns, record, fmt):
        raise DataError(
            f"{record.source}: the turns have tool calls, which the chat template does not write; write the call as text, {_ANOTHER}, or "
            "leave the row out"
        )


def _require_text(text: str, before: str, after: str, record: Record) -> None:
    """Raise ConfigError unless ``after`` holds a text once more than ``before``, white space aside."""
    wanted = _BLANK.sub("", text)
    counts = [_BLANK.sub("", unmarked(rendered)).count(wanted) for rendered in (before, after)] if wanted else [0, 1]
    if counts[1] <= counts[0]:
        raise ConfigError(
            f"{record.source}: the chat template does not write the response as it is ({text.strip()!r:.60}): it drops the assistant's "
            f"turn or a part of it, or ends the turn before it; the data is not at fault: {_ANOTHER}"
        )


def _generation_spans(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], record: Record, prompt: str, fmt: PromptFormat, learned: list[bool]
) -> list[tuple[int, int]]:
    """Character spans of the template's ``{% generation %}`` blocks in the prompt's text."""
    from transformers.utils.chat_template_utils import render_jinja_template

    options = _options(tokenizer, record, fmt)
    rendered: Any = render_jinja_template(
        conversations=[[_for_template(tokenizer, turn) for turn in turns]],
        chat_template=_template_of(tokenizer, options),
        return_assistant_tokens_mask=True,
        add_generation_prompt=True,
        **{**tokenizer.special_tokens_map, **options},
    )
    (text,), (blocks,) = rendered
    spans = [(start, end) for start, end in blocks]
    if text != prompt or (not all(learned) and len(spans) != len(learned)):
        raise ConfigError(
            f"{record.source}: the {len(spans)} {{% generation %}} blocks of the chat template are not its {len(learned)} assistant turns, "
            f"so a turn of weight 0 cannot be told apart; {_ANOTHER}, or leave the weights out"
        )
    return [span for i, span in enumerate(spans) if all(learned) or learned[i]]


def _assistant_spans(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], record: Record, prompt: str, fmt: PromptFormat, eos_token_id: int
) -> list[tuple[int, int]]:
    """Character spans of the assistant turns in the prompt's text, each up to its EOS."""
    eos = cast(str, tokenizer.convert_ids_to_tokens(eos_token_id))
    spans = []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant" or turn.get("weight", 1) == 0:
            continue
        before = _render(tokenizer, turns[:i], record, fmt, generation_prompt=True)
        whole = _render(tokenizer, turns[: i + 1], record, fmt, generation_prompt=False)
        kept, ended = before_token(whole[len(before) :], eos)
        through = before + kept + (eos if ended else "")
        if not (prompt.startswith(through) and whole.startswith(before)):
            broken = through if prompt.startswith(before) else before
            raise ConfigError(
                f"{record.source}: assistant_turns='all' needs a chat template that renders the beginning of a conversation the same with "
                f"and without what follows; this one does not ({_difference(prompt, broken)}); use a template with {{% generation %}} "
                f"blocks ({_ANOTHER}), or assistant_turns='last'"
            )
        spans.append((len(before), len(through)))
    return spans


def _difference(whole: str, beginning: str) -> str:
    whole, beginning = unmarked(whole), unmarked(beginning)
    at = next((i for i, (a, b) in enumerate(zip(whole, beginning, strict=False)) if a != b), min(len(whole), len(beginning)))
    return f"{whole[at : at + 24]!r} instead of {beginning[at : at + 24]!r}"
