"""Records -> tokens: special tokens, length limits, and the mask of the tokens to learn.

Rules:

- SFT and RL see the same prompt: ``encode_demonstration(...).input_ids`` begins with ``encode_prompt(...)``, token by token.
- The response is what a policy generates after that prompt: the template's rendering of the assistant's turn after the generation prompt,
  ended by exactly one EOS, which is a response token. What a template writes after its first EOS (a line break, another EOS, the next
  generation prompt) is dropped.
- Text is text: a control token that a prompt or a response spells becomes ordinary tokens, and only a template writes control tokens.
- Masks come from construction (lengths and character offsets), never from token ids; the padding token may be the EOS token.
- BOS is written once: by the template, or by us where there is no template and the tokenizer wants one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aapa_lightning.data.chat import assistant_mask, end_of_turn_id, render_prompt, render_response
from aapa_lightning.data.control_tokens import Encoded, encode, spells_control_tokens
from aapa_lightning.data.fields import turn_of
from aapa_lightning.data.prompt_format import PromptFormat
from aapa_lightning.data.records import take
from aapa_lightning.data.templates import uses_template
from aapa_lightning.errors import DataError
from aapa_lightning.types import Demonstration, Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "OverlongError",
    "PromptFormat",
    "encode_demonstration",
    "encode_prompt",
    "end_of_turn_id",
    "expert_responses",
    "fit_lengths",
    "no_responses",
    "uses_template",
]

logger = logging.getLogger(__name__)


class OverlongError(DataError):
    """A prompt or a response longer than its limit."""


#: What a text is, in error messages, and the text.
NamedText = tuple[str, str]


def no_responses(record: Record) -> Sequence[NamedText]:
    """Of a record whose prompt alone is used."""
    return ()


def expert_responses(record: Record) -> Sequence[NamedText]:
    """Of a record whose experts are imitated or measured."""
    return [("expert response", expert) for expert in record.experts]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, record: Record, fmt: PromptFormat) -> list[int]:
    """Tokens of the prompt, generation prompt included, not padded.

    Raises:
        OverlongError: more than ``fmt.max_prompt_tokens`` tokens.
        DataError: the prompt does not fit the template, or is a chat and there is no template.
        ConfigError: the format demands a template that the tokenizer lacks.
    """
    return _encode_prompt(tokenizer, record, fmt)[2]


def encode_demonstration(
    tokenizer: PreTrainedTokenizerBase, record: Record, expert: str, fmt: PromptFormat, eos_token_id: int, name: str = "expert response"
) -> Demonstration:
    """Tokens of prompt and expert response, and the mask of those to learn.

    Args:
        tokenizer: a Hugging Face tokenizer.
        record: gives the prompt.
        expert: the response to imitate (or of a pair); a ``Reply`` gives the template its whole turn.
        fmt: template, limits, turns to learn.
        eos_token_id: ends the response; with a template, the token that ends its assistant turns (``end_of_turn_id``).
        name: what the response is, for error messages.

    Returns:
        ``input_ids`` = ``encode_prompt`` + response + EOS; the mask is true on the response and its EOS, and with ``assistant_turns="all"``
        on the prompt's assistant turns. Turns of ``weight`` 0 are not learned.

    Raises:
        OverlongError: the prompt or the response is over its limit.
        DataError: as ``encode_prompt``, or every turn has weight 0.
        ConfigError: the template renders a conversation that does not begin with its own generation prompt, or loses the response.
    """
    prompt, encoded, prompt_ids = _encode_prompt(tokenizer, record, fmt)
    response = render_response(tokenizer, record, expert, prompt, fmt, eos_token_id)
    response_ids = [*_continue(tokenizer, prompt, prompt_ids, response, fmt), eos_token_id]
    if len(response_ids) > fmt.max_response_tokens:
        raise _overlong(record, name, len(response_ids), "max_response_tokens", fmt.max_response_tokens)
    learned = [False] * len(prompt_ids)
    if fmt.assistant_turns == "all" and not isinstance(record.prompt, str):
        learned = assistant_mask(tokenizer, record, prompt, encoded, fmt, eos_token_id)
    learned += [turn_of(expert).get("weight", 1) != 0] * len(response_ids)
    if not any(learned):
        raise DataError(f"{record.source}: the {name} has weight 0, so nothing of the row is learned; leave it out, or give it weight 1")
    return Demonstration(prompt_ids + response_ids, learned, record)


def fit_lengths(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    fmt: PromptFormat,
    eos_token_id: int,
    responses: Callable[[Record], Sequence[NamedText]] = no_responses,
) -> Sequence[Record]:
    """Encode every record once, before training: raise at the first one over a limit, or leave those out (``fmt.overlong``).

    Args:
        tokenizer: a Hugging Face tokenizer.
        records: the dataset.
        fmt: limits and what to do.
        eos_token_id: as for ``encode_demonstration``.
        responses: the responses of a record that are encoded too, by name; it is over the limit when any of them is.

    Returns:
        The records that fit.

    Raises:
        DataError: a record does not encode, or none fits.
    """
    kept: list[int] = []
    spelled = 0
    for i, record in enumerate(records):
        texts = responses(record)
        spelled += any(spells_control_tokens(tokenizer, text) for _, text in texts)
        try:
            encode_prompt(tokenizer, record, fmt)
            for name, text in texts:
                encode_demonstration(tokenizer, record, text, fmt, eos_token_id, name)
        except OverlongError:
            if fmt.overlong == "error":
                raise
        else:
            kept.append(i)
    if spelled:
        logger.warning("%d of %d records have responses that spell control tokens, which are learnt as text", spelled, len(records))
    if len(kept) == len(records):
        return records
    if not kept:
        raise DataError(
            f"all {len(records)} records are longer than the limits (max_prompt_tokens {fmt.max_prompt_tokens}, max_response_tokens "
            f"{fmt.max_response_tokens}); raise them"
        )
    logger.warning("%d of %d records are over the length limits and were left out", len(records) - len(kept), len(records))
    return take(records, kept)


def _encode_prompt(tokenizer: PreTrainedTokenizerBase, record: Record, fmt: PromptFormat) -> tuple[str, Encoded, list[int]]:
    """Text of a prompt, its tokens with their offsets, and its ids, which begin with a BOS where no template writes it."""
    text = render_prompt(tokenizer, record, fmt)
    encoded = encode(tokenizer, text)
    ids = _with_bos(tokenizer, encoded.ids, fmt)
    if not ids:
        raise DataError(f"{record.source}: the prompt has no tokens")
    if len(ids) > fmt.max_prompt_tokens:
        raise _overlong(record, "prompt", len(ids), "max_prompt_tokens", fmt.max_prompt_tokens)
    return text, encoded, ids


def _with_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int], fmt: PromptFormat) -> list[int]:
    """Tokens after a BOS where no template writes it and the tokenizer wants one."""
    bos = tokenizer.bos_token_id
    wanted = not uses_template(tokenizer, fmt) and isinstance(bos, int) and tokenizer("")["input_ids"][:1] == [bos]
    return [bos, *ids] if wanted and ids[:1] != [bos] else ids


def _continue(tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_ids: list[int], response: str, fmt: PromptFormat) -> list[int]:
    """Tokens of the response: in context if the prompt keeps its tokens there (SentencePiece marks the start of a text), else alone."""
    whole = _with_bos(tokenizer, encode(tokenizer, prompt + response).ids, fmt)
    return whole[len(prompt_ids) :] if whole[: len(prompt_ids)] == prompt_ids else encode(tokenizer, response).ids


def _overlong(record: Record, what: str, found: int, option: str, limit: int) -> OverlongError:
    return OverlongError(
        f"{record.source}: the {what} has {found} tokens, the limit is {limit}; raise {option}, or set overlong to 'drop' to leave such "
        "records out"
    )
