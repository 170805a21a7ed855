"""Decoding that remembers which token wrote which character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def decode_with_ends(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[int]]:
    """Decode tokens and say how many characters stand after each.

    Args:
        tokenizer: a Hugging Face tokenizer; fast ones are decoded incrementally, others prefix by prefix.
        ids: response tokens, special ones included (they write nothing).

    Returns:
        The text without special tokens, and for each token the number of characters decoded up to and including it (non-decreasing;
        bytes of an unfinished character count when the character is complete; the last entry is the length of the text).
    """
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ends = _stream_ends(tokenizer, ids) if getattr(tokenizer, "is_fast", False) else _prefix_ends(tokenizer, ids)
    ends = [min(end, len(text)) for end in ends]
    if ends:
        ends[-1] = len(text)
    return text, ends


def _stream_ends(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)
    written, ends = 0, []
    for token in ids:
        try:
            written += len(stream.step(tokenizer.backend_tokenizer, int(token)) or "")
        except Exception:  # of tokenizers: with byte fallback, broken bytes rewrite what stood before them, and the stream gives up
            return _prefix_ends(tokenizer, ids)
        ends.append(written)
    return ends


def _prefix_ends(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    ends, longest = [], 0
    for stop in range(1, len(ids) + 1):
        prefix = tokenizer.decode(ids[:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        longest = max(longest, len(prefix.rstrip("\ufffd")))
        ends.append(longest)
    return ends
