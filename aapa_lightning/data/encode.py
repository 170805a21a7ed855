"""Records -> tokens: chat templates, special tokens, length limits, and the mask of the tokens to learn.

Rules:

- SFT and RL see the same prompt: ``encode_demonstration(...).input_ids`` begins with ``encode_prompt(...)``, token by token.
- The response is what a policy generates after that prompt: the template's rendering of the assistant's turn after the generation prompt,
  ended by exactly one EOS, which is a response token. What a template writes after its EOS (a line break) is dropped.
- Masks come from construction (lengths and character offsets), never from token ids; the padding token may be the EOS token.
- BOS is written once: by the template, or by us where there is no template and the tokenizer wants one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from aapa_lightning.data.records import take
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Demonstration, Message, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TemplateUse = Literal["auto", "always", "never"]
Overlong = Literal["error", "drop"]
AssistantTurns = Literal["last", "all"]

#: Arguments of ``apply_chat_template`` that the encoder sets itself.
_RESERVED = {"conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_assistant_tokens_mask"}


class OverlongError(DataError):
    """A prompt or a response longer than its limit."""


@dataclass(frozen=True)
class PromptFormat:
    """How records become tokens.

    Args:
        chat_template: ``auto`` uses the tokenizer's chat template where it has one (a text prompt becomes one user turn), ``always`` demands
            one, ``never`` encodes text prompts as they are.
        chat_template_kwargs: options of the template, such as ``{"enable_thinking": false}`` for Qwen3.
        system_prompt: system turn put before prompts that have none of their own; needs a chat template.
        max_prompt_tokens: limit on the prompt, generation prompt included.
        max_response_tokens: limit on an expert response, EOS included.
        overlong: what ``fit_lengths`` does with records over a limit: ``error`` stops, ``drop`` leaves them out and says how many.
        assistant_turns: the assistant turns that a demonstration teaches: the ``last`` one, or ``all`` of the conversation.
    """

    chat_template: TemplateUse = "auto"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system_prompt: str | None = None
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 1024
    overlong: Overlong = "error"
    assistant_turns: AssistantTurns = "last"

    def __post_init__(self) -> None:
        for name, value, options in (
            ("chat_template", self.chat_template, get_args(TemplateUse)),
            ("overlong", self.overlong, get_args(Overlong)),
            ("assistant_turns", self.assistant_turns, get_args(AssistantTurns)),
        ):
            if value not in options:
                raise ConfigError(f"{name} must be one of {', '.join(options)}, found {value!r}")
        for name in ("max_prompt_tokens", "max_response_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if reserved := _RESERVED & self.chat_template_kwargs.keys():
            raise ConfigError(f"chat_template_kwargs cannot set {sorted(reserved)}: the encoder does; give options of the template only")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, record: Record, fmt: PromptFormat) -> list[int]:
    """Tokens of the prompt, generation prompt included, not padded.

    Raises:
        OverlongError: more than ``fmt.max_prompt_tokens`` tokens.
        DataError: the prompt does not fit the template, or is a chat and there is no template.
        ConfigError: the format demands a template that the tokenizer lacks.
    """
    ids = _prompt_ids(tokenizer, _prompt_text(tokenizer, record, fmt), record, fmt)
    if not ids:
        raise DataError(f"{record.source}: the prompt has no tokens")
    if len(ids) > fmt.max_prompt_tokens:
        raise _overlong(record, "prompt", len(ids), "max_prompt_tokens", fmt.max_prompt_tokens)
    return ids


def encode_demonstration(
    tokenizer: PreTrainedTokenizerBase, record: Record, expert: str, fmt: PromptFormat, eos_token_id: int
) -> Demonstration:
    """Tokens of prompt and expert response, and the mask of those to learn.

    Args:
        tokenizer: a Hugging Face tokenizer.
        record: gives the prompt.
        expert: the response to imitate.
        fmt: template, limits, turns to learn.
        eos_token_id: ends the response; with a template, the token that ends its assistant turns (``end_of_turn_id``).

    Returns:
        ``input_ids`` = ``encode_prompt`` + response + EOS; the mask is true on the response and its EOS, and with ``assistant_turns="all"``
        on the prompt's assistant turns.

    Raises:
        OverlongError: the prompt or the response is over its limit.
        DataError: as ``encode_prompt``, or the EOS occurs inside the response's text.
        ConfigError: the template renders a conversation that does not begin with its own generation prompt.
    """
    prompt_ids = encode_prompt(tokenizer, record, fmt)
    prompt_text = _prompt_text(tokenizer, record, fmt)
    response_text = _response_text(tokenizer, record, expert, prompt_text, fmt, eos_token_id)
    response_ids = [*_continuation_ids(tokenizer, prompt_text, prompt_ids, response_text), eos_token_id]
    if eos_token_id in response_ids[:-1]:
        raise DataError(
            f"{record.source}: the expert response holds the end-of-sequence token {tokenizer.decode([eos_token_id])!r} as text; remove it"
        )
    if len(response_ids) > fmt.max_response_tokens:
        raise _overlong(record, "expert response", len(response_ids), "max_response_tokens", fmt.max_response_tokens)
    learned = [False] * len(prompt_ids)
    if fmt.assistant_turns == "all" and not isinstance(record.prompt, str):
        learned = _assistant_mask(tokenizer, record, prompt_text, prompt_ids, fmt, eos_token_id)
    return Demonstration(prompt_ids + response_ids, learned + [True] * len(response_ids), record)


def fit_lengths(
    tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], fmt: PromptFormat, eos_token_id: int, *, demonstrations: bool
) -> Sequence[Record]:
    """Encode every record once, before training: raise at the first one over a limit, or leave those out (``fmt.overlong``).

    Args:
        tokenizer: a Hugging Face tokenizer.
        records: the dataset.
        fmt: limits and what to do.
        eos_token_id: as for ``encode_demonstration``.
        demonstrations: also encode the experts; a record is over the limit when any of its experts is.

    Returns:
        The records that fit.

    Raises:
        DataError: a record does not encode, or none fits.
    """
    kept: list[int] = []
    for i, record in enumerate(records):
        try:
            encode_prompt(tokenizer, record, fmt)
            for expert in record.experts if demonstrations else ():
                encode_demonstration(tokenizer, record, expert, fmt, eos_token_id)
        except OverlongError:
            if fmt.overlong == "error":
                raise
        else:
            kept.append(i)
    if len(kept) == len(records):
        return records
    if not kept:
        raise DataError(
            f"all {len(records)} records are longer than the limits (max_prompt_tokens {fmt.max_prompt_tokens}, max_response_tokens "
            f"{fmt.max_response_tokens}); raise them"
        )
    logger.warning("%d of %d records are over the length limits and were left out", len(records) - len(kept), len(records))
    return take(records, kept)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat, eos_token_ids: Sequence[int]) -> int:
    """Which EOS of a set ends a response: the one that the template writes after an assistant turn, else the tokenizer's, else the first.

    Llama's template ends a turn with ``<|eot_id|>`` while the tokenizer's EOS is another token; both are in the set.

    Raises:
        ConfigError: the set is empty.
    """
    if not eos_token_ids:
        raise ConfigError("no end-of-sequence token: give the model's generation config or the tokenizer an EOS")
    if uses_template(tokenizer, fmt):
        turns: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, **fmt.chat_template_kwargs)
        for token in reversed(_tokens(tokenizer, text)):
            if token in eos_token_ids:
                return token
    if tokenizer.eos_token_id in eos_token_ids:
        return int(tokenizer.eos_token_id)
    return eos_token_ids[0]


def uses_template(tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat) -> bool:
    """Whether prompts go through the tokenizer's chat template. Raises ConfigError when the format demands one that is not there."""
    has_one = bool(getattr(tokenizer, "chat_template", None))
    if fmt.chat_template == "always" and not has_one:
        raise ConfigError("chat_template is 'always', but the tokenizer has no chat template; use 'auto', or a tokenizer that has one")
    used = has_one and fmt.chat_template != "never"
    if fmt.system_prompt is not None and not used:
        raise ConfigError("system_prompt needs a chat template, and none is used; write the text into the prompts, or use a template")
    return used


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])


def _turns(record: Record, fmt: PromptFormat) -> list[Message]:
    turns: list[Message] = [{"role": "user", "content": record.prompt}] if isinstance(record.prompt, str) else list(record.prompt)
    if fmt.system_prompt is not None and turns[0]["role"] not in ("system", "developer"):
        turns.insert(0, {"role": "system", "content": fmt.system_prompt})
    return turns


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], record: Record, fmt: PromptFormat, *, generation_prompt: bool
) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=generation_prompt, **fmt.chat_template_kwargs
        )
    except (TemplateError, TypeError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(f"{record.source}: the chat template refuses the turns ({roles}): {error}") from error


def _prompt_text(tokenizer: PreTrainedTokenizerBase, record: Record, fmt: PromptFormat) -> str:
    if uses_template(tokenizer, fmt):
        return _render(tokenizer, _turns(record, fmt), record, fmt, generation_prompt=True)
    if isinstance(record.prompt, str):
        return record.prompt
    raise DataError(
        f"{record.source}: the prompt is a chat, but no chat template is used; give text prompts or a tokenizer with a template"
    )


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, record: Record, fmt: PromptFormat) -> list[int]:
    ids = _tokens(tokenizer, text)
    bos = tokenizer.bos_token_id
    if not uses_template(tokenizer, fmt) and bos is not None and tokenizer("")["input_ids"][:1] == [bos] and ids[:1] != [bos]:
        ids.insert(0, bos)
    return ids


def _response_text(
    tokenizer: PreTrainedTokenizerBase, record: Record, expert: str, prompt_text: str, fmt: PromptFormat, eos_token_id: int
) -> str:
    """What follows the prompt's text, up to and without the EOS that ends it."""
    if not uses_template(tokenizer, fmt):
        return expert
    whole = _render(tokenizer, [*_turns(record, fmt), {"role": "assistant", "content": expert}], record, fmt, generation_prompt=False)
    if not whole.startswith(prompt_text):
        raise ConfigError(
            f"{record.source}: the chat template renders the conversation differently from the prompt with its generation prompt "
            f"({_difference(whole, prompt_text)}), so a response cannot be cut out; try other chat_template_kwargs (such as enable_thinking) "
            "or a tokenizer with another template"
        )
    rest = whole[len(prompt_text) :]
    eos = tokenizer.convert_ids_to_tokens(eos_token_id)
    before, found, after = rest.rpartition(eos)
    if found and not after.strip():
        return before
    kept = rest.rstrip()
    # A template without an EOS: its own trailing space goes, the expert's stays.
    return kept + expert[len(expert.rstrip()) :] if kept.endswith(expert.rstrip()) else kept


def _difference(whole: str, prefix: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(whole, prefix, strict=False)) if a != b), min(len(whole), len(prefix)))
    return f"{whole[at : at + 24]!r} instead of {prefix[at : at + 24]!r}"


def _continuation_ids(tokenizer: PreTrainedTokenizerBase, prompt_text: str, prompt_ids: list[int], response_text: str) -> list[int]:
    """Tokens of the response. In context where the prompt's tokens stay the same (SentencePiece marks the start of a text), else alone."""
    ids = _tokens(tokenizer, prompt_text + response_text)
    offset = len(prompt_ids) - len(_tokens(tokenizer, prompt_text))
    whole = prompt_ids[:offset] + ids
    return whole[len(prompt_ids) :] if whole[: len(prompt_ids)] == prompt_ids else _tokens(tokenizer, response_text)


def _assistant_mask(
    tokenizer: PreTrainedTokenizerBase, record: Record, prompt_text: str, prompt_ids: list[int], fmt: PromptFormat, eos_token_id: int
) -> list[bool]:
    """Mask of the assistant turns inside a prompt: the template's ``{% generation %}`` blocks, else the text between prefix renderings."""
    turns = _turns(record, fmt)
    if not any(turn["role"] == "assistant" for turn in turns):
        return [False] * len(prompt_ids)
    if not tokenizer.is_fast:
        raise ConfigError("assistant_turns='all' needs character offsets, which a slow tokenizer lacks; use a fast one or 'last'")
    if "generation %}" in tokenizer.get_chat_template().replace("-%}", " %}"):
        encoded = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True, return_assistant_tokens_mask=True, **fmt.chat_template_kwargs
        )
        return [bool(flag) for flag in encoded["assistant_masks"]]
    encoded = tokenizer(prompt_text, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True)
    mask = [False] * len(prompt_ids)
    for start, end in _assistant_spans(tokenizer, record, turns, prompt_text, fmt):
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if start <= a and b <= end and a < b]
        ends = [i for i in inside if prompt_ids[i] == eos_token_id]
        for i in inside:
            mask[i] = not ends or i <= ends[-1]
    return mask


def _assistant_spans(
    tokenizer: PreTrainedTokenizerBase, record: Record, turns: Sequence[Message], prompt_text: str, fmt: PromptFormat
) -> list[tuple[int, int]]:
    """Character spans of the assistant turns in the prompt's text, from renderings of its beginnings."""
    spans = []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, turns[:i], record, fmt, generation_prompt=True)
        through = _render(tokenizer, turns[: i + 1], record, fmt, generation_prompt=False)
        if not (prompt_text.startswith(through) and through.startswith(before)):
            broken = before if not prompt_text.startswith(before) else through
            raise ConfigError(
                f"{record.source}: assistant_turns='all' needs a chat template that renders a conversation's beginning the same with and "
                f"without what follows; this one does not ({_difference(prompt_text, broken)}); use a template with {{% generation %}} "
                "blocks, or assistant_turns='last'"
            )
        spans.append((len(before), len(through)))
    return spans


def _overlong(record: Record, what: str, found: int, option: str, limit: int) -> OverlongError:
    return OverlongError(
        f"{record.source}: the {what} has {found} tokens, the limit is {limit}; raise {option}, or set overlong to 'drop' to leave such "
        "records out"
    )
