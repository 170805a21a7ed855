"""The text that a reward model reads: prompt, reference and candidate as one string, cut to a number of tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from aapa_lightning.data.control_tokens import encode, marked
from aapa_lightning.data.records import prompt_text
from aapa_lightning.types import Message

Text = str | Sequence[Message]
Wrapper = Literal["sft", "pretrain"]

#: Between the trajectory of the reference and that of the candidate.
SEPARATOR = "<|reward|>"
#: The last token of POLAR's input, where its value head is read.
REWARD_TOKEN = "[UNUSED_TOKEN_130]"  # noqa: S105 - a token of the vocabulary, not a secret

#: One final reward token, one separator and two newlines.
_OVERHEAD = 4
_FIELD = re.compile(r"\{(prompt|reference|response)\}")
_SURROGATE = re.compile("[\ud800-\udfff]")


def polar_text(
    prompt: Text,
    reference: Text,
    candidate: Text,
    tokenizer: Any,
    *,
    max_tokens: int = 16384,
    max_response_tokens: int = 4096,
    wrapper: Wrapper = "sft",
) -> str:
    r"""POLAR's input (arXiv 2507.05197): ``prompt \n reference <|reward|> prompt \n candidate [UNUSED_TOKEN_130]``, without the spaces.

    Reference and candidate lose their ends beyond ``max_response_tokens``. The prompt appears twice and loses its beginning beyond half of
    what is left. Every part goes through the tokenizer and back, cut or not, and special tokens are lost on the way. A part that writes one
    of the two marks loses it, so that a policy can neither forge a reference nor choose where the score is read.

    Args:
        prompt: text, or chat turns: their contents are joined by newlines and their roles dropped.
        reference: likewise.
        candidate: likewise; when it is empty the newline before it stays.
        tokenizer: POLAR's own, whatever tokens the policy uses.
        max_tokens: limit of the whole, 4 of which are kept for marks and newlines.
        max_response_tokens: limit of reference and of candidate; with the special tokens that the tokenizer adds.
        wrapper: ``sft`` puts a newline between prompt and response, ``pretrain`` nothing.

    Returns:
        The text, marked (``aapa_lightning.data.control_tokens``): ``encode`` or ``broken_up`` reads it.
    """
    prompt_ids, reference_ids, candidate_ids = (_encode(tokenizer, part) for part in (prompt, reference, candidate))
    reference_ids, candidate_ids = reference_ids[:max_response_tokens], candidate_ids[:max_response_tokens]
    room = max(0, (max_tokens - _OVERHEAD - len(reference_ids) - len(candidate_ids)) // 2)
    prompt_ids = prompt_ids[max(0, len(prompt_ids) - room) :]
    before, expert, response = (
        marked(tokenizer, _without_marks(tokenizer.decode(ids, skip_special_tokens=True)))
        for ids in (prompt_ids, reference_ids, candidate_ids)
    )
    if wrapper == "sft":
        before += "\n"
    return f"{before}{expert}{SEPARATOR}{before}{response}{REWARD_TOKEN}"


def template_text(
    template: str,
    prompt: Text,
    reference: Text,
    candidate: Text,
    tokenizer: Any,
    *,
    max_tokens: int,
    max_response_tokens: int,
) -> str:
    """A template with ``{prompt}``, ``{reference}`` and ``{response}`` filled in; parts that are too long are cut as by ``polar_text``.

    A part that fits is left exactly as it is. The text is marked: what its parts spell is text, what the template writes may be a token.
    """
    used = len(tokenizer(_FIELD.sub("", template), truncation=False, verbose=False)["input_ids"])
    values = {}
    for name, part in (("reference", reference), ("response", candidate)):
        values[name], length = _kept(tokenizer, part, slice(0, max_response_tokens), max_response_tokens)
        used += length * template.count(f"{{{name}}}")
    room = max(0, (max_tokens - used) // max(1, template.count("{prompt}")))
    values["prompt"], _ = _kept(tokenizer, prompt, slice(-room, None) if room else slice(0, 0), room)
    # one pass: text that happens to hold "{response}" is not filled in again
    return _FIELD.sub(lambda match: values[match[1]], template)


def _plain(part: Text) -> str:
    # half a pair of UTF-16 is not text: tokenizers refuse it, and so do servers
    return _SURROGATE.sub("\ufffd", prompt_text(part))


def _encode(tokenizer: Any, part: Text) -> list[int]:
    return list(tokenizer(_plain(part), add_special_tokens=True, truncation=False, verbose=False)["input_ids"])


def _kept(tokenizer: Any, part: Text, kept: slice, limit: int) -> tuple[str, int]:
    """The part, or what a cut leaves of it, marked, and its length in tokens."""
    text = marked(tokenizer, _plain(part))
    ids = encode(tokenizer, text).ids
    return (text, len(ids)) if len(ids) <= limit else (marked(tokenizer, tokenizer.decode(ids[kept])), limit)


def _without_marks(text: str) -> str:
    while (cleaned := text.replace(SEPARATOR, "").replace(REWARD_TOKEN, "")) != text:
        text = cleaned
    return text
