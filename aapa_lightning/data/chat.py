"""Prompts and responses as text: rendered by a chat template, a response cut out, the assistant's turns found.

What is rendered is marked: control tokens that the record's texts spell stay text (``control_tokens.py``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from aapa_lightning.data.control_tokens import Encoded, before_token, encode, marked, positions, unmarked
from aapa_lightning.data.fields import turn_of
from aapa_lightning.data.prompt_format import PromptFormat
from aapa_lightning.data.templates import (
    ANOTHER,
    for_template,
    render,
    require_tool_calls,
    template_options,
    template_source,
    turns_of,
    uses_template,
)
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Message, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BLANK = re.compile(r"\s+")


def render_prompt(tokenizer: PreTrainedTokenizerBase, record: Record, fmt: PromptFormat) -> str:
    """The prompt's text, generation prompt included, marked. Raises DataError when the prompt does not fit the template."""
    if uses_template(tokenizer, fmt):
        turns = turns_of(record, fmt)
        require_tool_calls(tokenizer, turns, record, fmt)
        return render(tokenizer, turns, record, fmt, generation_prompt=True)
    if isinstance(record.prompt, str):
        return marked(tokenizer, record.prompt)
    raise DataError(
        f"{record.source}: the prompt is a chat, but no chat template is used; give text prompts or a tokenizer with a template"
    )


def render_response(
    tokenizer: PreTrainedTokenizerBase, record: Record, expert: str, prompt: str, fmt: PromptFormat, eos_token_id: int
) -> str:
    """Return what follows the rendered ``prompt``, up to and without the first EOS that the template writes there, marked.

    Raises:
        ConfigError: the whole conversation does not begin with the prompt's text, or lacks the response's.
        DataError: the template refuses the response, or does not write its tool calls.
    """
    if not uses_template(tokenizer, fmt):
        return marked(tokenizer, expert)
    turn = turn_of(expert)
    turns = [*turns_of(record, fmt), turn]
    if "tool_calls" in turn:
        require_tool_calls(tokenizer, turns, record, fmt)
    whole = render(tokenizer, turns, record, fmt, generation_prompt=False)
    _require_text(turn["content"], "", whole, record)
    if not whole.startswith(prompt):
        raise ConfigError(
            f"{record.source}: the chat template renders the conversation differently from the prompt with its generation prompt "
            f"({_difference(whole, prompt)}), so a response cannot be cut out; try other chat_template_kwargs (such as enable_thinking), "
            f"or {ANOTHER}"
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
        turns = [*turns_of(probe, fmt), turn_of(answer)]
        _, _, after = render(tokenizer, turns, probe, fmt, generation_prompt=False).rpartition(answer)
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
    turns = turns_of(record, fmt)
    mask = [False] * len(encoded.ids)
    learned = [turn.get("weight", 1) != 0 for turn in turns if turn["role"] == "assistant"]
    if not any(learned):
        return mask
    if not tokenizer.is_fast:
        raise ConfigError("assistant_turns='all' needs character offsets, which a slow tokenizer lacks; use a fast one, or 'last'")
    if _GENERATION_BLOCK.search(template_source(tokenizer, template_options(tokenizer, record, fmt))):
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
                f"{_text_of(tokenizer, [eos_token_id])!r}, which stops the policy; this one does not: {ANOTHER}, or set "
                "assistant_turns to 'last'"
            )
        for i in range(inside[0], last + 1):
            mask[i] = True
    return mask


def _text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids)))


def _require_text(text: str, before: str, after: str, record: Record) -> None:
    """Raise ConfigError unless ``after`` holds a text once more than ``before``, white space aside."""
    wanted = _BLANK.sub("", text)
    counts = [_BLANK.sub("", unmarked(rendered)).count(wanted) for rendered in (before, after)] if wanted else [0, 1]
    if counts[1] <= counts[0]:
        raise ConfigError(
            f"{record.source}: the chat template does not write the response as it is ({text.strip()!r:.60}): it drops the assistant's "
            f"turn or a part of it, or ends the turn before it; the data is not at fault: {ANOTHER}"
        )


def _generation_spans(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], record: Record, prompt: str, fmt: PromptFormat, learned: list[bool]
) -> list[tuple[int, int]]:
    """Character spans of the template's ``{% generation %}`` blocks in the prompt's text."""
    from transformers.utils.chat_template_utils import render_jinja_template

    options = template_options(tokenizer, record, fmt)
    rendered: Any = render_jinja_template(
        conversations=[[for_template(tokenizer, turn) for turn in turns]],
        chat_template=template_source(tokenizer, options),
        return_assistant_tokens_mask=True,
        add_generation_prompt=True,
        **{**tokenizer.special_tokens_map, **options},
    )
    (text,), (blocks,) = rendered
    spans = [(start, end) for start, end in blocks]
    if text != prompt or (not all(learned) and len(spans) != len(learned)):
        raise ConfigError(
            f"{record.source}: the {len(spans)} {{% generation %}} blocks of the chat template are not its {len(learned)} assistant turns, "
            f"so a turn of weight 0 cannot be told apart; {ANOTHER}, or leave the weights out"
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
        before = render(tokenizer, turns[:i], record, fmt, generation_prompt=True)
        whole = render(tokenizer, turns[: i + 1], record, fmt, generation_prompt=False)
        kept, ended = before_token(whole[len(before) :], eos)
        through = before + kept + (eos if ended else "")
        if not (prompt.startswith(through) and whole.startswith(before)):
            broken = through if prompt.startswith(before) else before
            raise ConfigError(
                f"{record.source}: assistant_turns='all' needs a chat template that renders the beginning of a conversation the same with "
                f"and without what follows; this one does not ({_difference(prompt, broken)}); use a template with {{% generation %}} "
                f"blocks ({ANOTHER}), or assistant_turns='last'"
            )
        spans.append((len(before), len(through)))
    return spans


def _difference(whole: str, beginning: str) -> str:
    whole, beginning = unmarked(whole), unmarked(beginning)
    at = next((i for i, (a, b) in enumerate(zip(whole, beginning, strict=False)) if a != b), min(len(whole), len(beginning)))
    return f"{whole[at : at + 24]!r} instead of {beginning[at : at + 24]!r}"
