"""Chat templates: rendering prompts and responses, and finding the assistant's turns in what was rendered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from aapa_lightning.data.prompt_format import PromptFormat
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, str]

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def uses_template(tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat) -> bool:
    """Whether prompts go through the tokenizer's chat template. Raises ConfigError when the format demands one that is not there."""
    has_one = bool(tokenizer.chat_template)
    if fmt.chat_template == "always" and not has_one:
        raise ConfigError("chat_template is 'always', but the tokenizer has no chat template; use 'auto', or a tokenizer that has one")
    used = has_one and fmt.chat_template != "never"
    if fmt.system_prompt is not None and not used:
        raise ConfigError("system_prompt needs a chat template, and none is used; write the text into the prompts, or use a template")
    return used


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text as it stands: nothing added, nothing cut."""
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])


def render_prompt(tokenizer: PreTrainedTokenizerBase, record: Record, fmt: PromptFormat) -> str:
    """The prompt's text, generation prompt included. Raises DataError when the prompt does not fit the template."""
    if uses_template(tokenizer, fmt):
        return _render(tokenizer, _turns(record, fmt), record, fmt, generation_prompt=True)
    if isinstance(record.prompt, str):
        return record.prompt
    raise DataError(
        f"{record.source}: the prompt is a chat, but no chat template is used; give text prompts or a tokenizer with a template"
    )


def render_response(
    tokenizer: PreTrainedTokenizerBase, record: Record, expert: str, prompt: str, fmt: PromptFormat, eos_token_id: int
) -> str:
    """What follows the rendered ``prompt``, up to and without the EOS that ends it.

    Raises:
        ConfigError: the whole conversation does not begin with the prompt's text.
    """
    if not uses_template(tokenizer, fmt):
        return expert
    whole = _render(tokenizer, [*_turns(record, fmt), {"role": "assistant", "content": expert}], record, fmt, generation_prompt=False)
    if not whole.startswith(prompt):
        raise ConfigError(
            f"{record.source}: the chat template renders the conversation differently from the prompt with its generation prompt "
            f"({_difference(whole, prompt)}), so a response cannot be cut out; try other chat_template_kwargs (such as enable_thinking), "
            "or a tokenizer with another template"
        )
    rest = whole[len(prompt) :]
    before, found, after = rest.rpartition(cast(str, tokenizer.convert_ids_to_tokens(eos_token_id)))
    if found and not after.strip():
        return before
    # A template that ends a turn without this EOS: its own trailing space goes, the expert's stays.
    kept = rest.rstrip()
    return kept + expert[len(expert.rstrip()) :] if kept.endswith(expert.rstrip()) else kept


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat, eos_token_ids: Sequence[int]) -> int:
    """Which EOS of a set ends a response: the one that the template writes after an assistant turn, else the tokenizer's, else the first.

    Llama's template ends a turn with ``<|eot_id|>`` while the tokenizer's EOS can be another token; both are in the set.

    Raises:
        ConfigError: the set is empty.
    """
    if not eos_token_ids:
        raise ConfigError("no end-of-sequence token: give the model's generation config or the tokenizer an EOS")
    if uses_template(tokenizer, fmt):
        probe = Record(prompt="a", source="a probe of the chat template")
        turns = [*_turns(probe, fmt), {"role": "assistant", "content": "b"}]
        for token in reversed(tokens_of(tokenizer, _render(tokenizer, turns, probe, fmt, generation_prompt=False))):
            if token in eos_token_ids:
                return token
    eos = tokenizer.eos_token_id
    return eos if isinstance(eos, int) and eos in eos_token_ids else eos_token_ids[0]


def assistant_mask(
    tokenizer: PreTrainedTokenizerBase, record: Record, prompt: str, prompt_ids: list[int], fmt: PromptFormat, eos_token_id: int
) -> list[bool]:
    """Mask of the assistant turns inside a rendered prompt, with the EOS that ends each.

    From the template's ``{% generation %}`` blocks where it has them, else from renderings of the conversation's beginnings.

    Raises:
        ConfigError: the template has no such blocks and renders a beginning differently once more turns follow.
    """
    turns = _turns(record, fmt)
    mask = [False] * len(prompt_ids)
    if not any(turn["role"] == "assistant" for turn in turns):
        return mask
    if not tokenizer.is_fast:
        raise ConfigError("assistant_turns='all' needs character offsets, which a slow tokenizer lacks; use a fast one, or 'last'")
    if _GENERATION_BLOCK.search(tokenizer.get_chat_template()):
        encoded = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True, return_assistant_tokens_mask=True, **fmt.chat_template_kwargs
        )
        return [bool(flag) for flag in cast(dict[str, list[int]], encoded)["assistant_masks"]]
    offsets = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    for start, end in _assistant_spans(tokenizer, record, turns, prompt, fmt):
        inside = [i for i, (a, b) in enumerate(offsets) if start <= a < b <= end]
        ends = [i for i in inside if prompt_ids[i] == eos_token_id]
        for i in inside:
            mask[i] = not ends or i <= ends[-1]
    return mask


def _turns(record: Record, fmt: PromptFormat) -> list[Turn]:
    if isinstance(record.prompt, str):
        turns = [{"role": "user", "content": record.prompt}]
    else:
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in record.prompt]
    if fmt.system_prompt is not None and turns[0]["role"] not in ("system", "developer"):
        turns.insert(0, {"role": "system", "content": fmt.system_prompt})
    return turns


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], record: Record, fmt: PromptFormat, *, generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt, **fmt.chat_template_kwargs)
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(f"{record.source}: the chat template refuses the turns ({roles}): {error}") from error
    return cast(str, text)


def _assistant_spans(
    tokenizer: PreTrainedTokenizerBase, record: Record, turns: list[Turn], prompt: str, fmt: PromptFormat
) -> list[tuple[int, int]]:
    """Character spans of the assistant turns in the prompt's text."""
    spans = []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, turns[:i], record, fmt, generation_prompt=True)
        through = _render(tokenizer, turns[: i + 1], record, fmt, generation_prompt=False)
        if not (prompt.startswith(through) and through.startswith(before)):
            broken = through if prompt.startswith(before) else before
            raise ConfigError(
                f"{record.source}: assistant_turns='all' needs a chat template that renders the beginning of a conversation the same with "
                f"and without what follows; this one does not ({_difference(prompt, broken)}); use a template with {{% generation %}} "
                "blocks, or assistant_turns='last'"
            )
        spans.append((len(before), len(through)))
    return spans


def _difference(whole: str, beginning: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(whole, beginning, strict=False)) if a != b), min(len(whole), len(beginning)))
    return f"{whole[at : at + 24]!r} instead of {beginning[at : at + 24]!r}"
