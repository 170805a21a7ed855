"""Control tokens, such as an end of turn: what a chat template writes becomes the token, what a text merely spells stays text.

``marked`` puts a mark into every control token that a text spells, after its first character. Marks pass through chat templates and
string operations, and ``encode`` then tells the template's tokens from the text's. Text that spells none is left alone and tokenised as
ever.
"""

from __future__ import annotations

import logging
import re
import secrets
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from aapa_lightning.data.literal_tokenizer import with_other_names

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: No text can hold it by intention. Upper case, JSON and HTML leave it as it is. It never reaches a token.
_MARK = f"~{secrets.randbelow(10**30):030d}~"
#: The first character of a control token that a text spells, and its mark.
_LITERAL = f"(.)(?:{_MARK})+"
_BROKEN = re.compile(rf"{_LITERAL}(?=\S)", re.DOTALL)


@dataclass(slots=True)
class Encoded:
    """Tokens of a text.

    Args:
        ids: token ids.
        offsets: characters ``(start, end)`` of each token, in the text without marks where it holds no token of a template.
        types: token types.
    """

    ids: list[int]
    offsets: list[tuple[int, int]] = field(default_factory=list)
    types: list[int] = field(default_factory=list)


def marked(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text with a mark after the first character of every control token that it spells, or that it begins at its end."""
    known = _known(tokenizer)
    if known.spelled is None:
        return text
    out = known.spelled.sub(lambda match: match[0] + _MARK, text)
    if out == text and known.folds(tokenizer, text):
        first = len(text) - len(text.lstrip()) + 1
        out = text[:first] + _MARK + text[first:]
    return out


def marked_values(tokenizer: PreTrainedTokenizerBase, value: Any) -> Any:
    """``marked``, applied to every text inside lists and mappings; to keys that spell a control token too."""
    if isinstance(value, str):
        return marked(tokenizer, value)
    if isinstance(value, Mapping):
        keys = {key: marked(tokenizer, key) if spells_control_tokens(tokenizer, key) else key for key in value}
        return {keys[key]: marked_values(tokenizer, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [marked_values(tokenizer, item) for item in value]
    return value


def unmarked(text: str) -> str:
    """The text without its marks."""
    return text.replace(_MARK, "")


def spells_control_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Return whether a text spells a control token."""
    known = _known(tokenizer)
    return bool(known.names) and (any(name in text for name in known.names) or known.folds(tokenizer, text))


def broken_up(text: str) -> str:
    """A marked text for a tokenizer that cannot be told: a space after the first character parts every control token that it spells."""
    return unmarked(_BROKEN.sub(r"\1 ", text))


def before_token(text: str, name: str) -> tuple[str, bool]:
    """What stands in a rendering of marked texts before the first token ``name`` that the template writes; and whether there is one."""
    for match in re.finditer(f"{_LITERAL}|{re.escape(name)}", text, re.DOTALL):
        if match[1] is None:
            return text[: match.start()], True
    return text, False


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False) -> Encoded:
    """Tokenise one marked text; see ``encode_batch``."""
    return encode_batch(tokenizer, [text], add_special_tokens=add_special_tokens)[0]


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool, max_length: int | None = None
) -> list[Encoded]:
    """Tokenise marked texts: control tokens with a mark as text, the others as themselves.

    A tokenizer that cannot be asked for the tokens of such text (a slow one, or one in custom code) gets it ``broken_up``, with a warning.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: as ``marked`` made them, or a template's renderings of marked texts.
        add_special_tokens: what the tokenizer itself adds.
        max_length: cut to so many tokens on the tokenizer's side; None cuts nothing.
    """
    if not texts:
        return []
    literal = _literal_tokenizer(tokenizer) if any(_MARK in text for text in texts) else None
    plain = [text if _MARK not in text else "" if literal else _broken_up_with_warning(tokenizer, text) for text in texts]
    found: Any = tokenizer(
        plain,
        add_special_tokens=add_special_tokens,
        truncation=max_length is not None,
        max_length=max_length,
        padding=False,
        verbose=False,
        return_offsets_mapping=bool(tokenizer.is_fast),
    )
    columns = [found.get(name, [[] for _ in plain]) for name in ("input_ids", "offset_mapping", "token_type_ids")]
    rows = [Encoded(*map(list, row)) for row in zip(*columns, strict=True)]
    if literal is None:
        return rows
    cut = None if max_length is None else (max_length, tokenizer.truncation_side)
    return [
        _literally(literal, _renamed(_known(tokenizer), text)[0], add_special_tokens, cut) if _MARK in text else row
        for row, text in zip(rows, texts, strict=True)
    ]


def _literally(literal: Tokenizer, renamed: str, add_special_tokens: bool, cut: tuple[int, str] | None) -> Encoded:
    if cut is not None:
        literal.enable_truncation(cut[0], direction=cut[1])
    found = literal.encode(renamed, add_special_tokens=add_special_tokens)
    if cut is not None:
        literal.no_truncation()
    return Encoded(list(found.ids), list(found.offsets), list(found.type_ids))


def positions(tokenizer: PreTrainedTokenizerBase, text: str, places: Sequence[int]) -> list[int]:
    """Where places of a marked text lie for the ``offsets`` of its tokens."""
    if _MARK not in text:
        return list(places)
    _, shifts = _renamed(_known(tokenizer), text)
    ends = [end for end, _ in shifts]
    return [place + (shifts[i - 1][1] if (i := bisect_right(ends, place)) else 0) for place in places]


@dataclass(slots=True)
class _Known:
    """A tokenizer's control tokens.

    Args:
        key: of the state of the tokenizer that they were read from.
        names: as they are spelled.
        spelled: the first character of each that a text spells, also of two that overlap, or begins at its end; None where there are none.
        written: a character and its mark, or a control token.
        folded: as the tokenizer's normaliser writes them, where it matches them in normalised text.
        literal: tokenizer that knows them by other names; None until it is needed, False where there is none.
    """

    key: tuple[Any, ...]
    names: tuple[str, ...]
    spelled: re.Pattern[str] | None
    written: re.Pattern[str] | None
    folded: tuple[str, ...]
    literal: Any = None

    def folds(self, tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
        """Return whether the tokenizer's normaliser makes a control token of other characters, such as full-width ones."""
        if not self.folded:
            return False
        normalised = _backend(tokenizer).normalizer.normalize_str(text)
        return any(name in normalised for name in self.folded)


_TABLE: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()


def _known(tokenizer: PreTrainedTokenizerBase) -> _Known:
    """The control tokens of a tokenizer, read anew when it has changed."""
    # reading them costs more than most texts take to be tokenised
    key = (len(tokenizer), tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    known = _TABLE.get(tokenizer)
    if known is None or known.key != key:
        known = _TABLE[tokenizer] = _read(tokenizer, key)
    return known


def _read(tokenizer: PreTrainedTokenizerBase, key: tuple[Any, ...]) -> _Known:
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    around = _around_turns(tokenizer, [name for name, token in added.items() if not token.special])
    names = sorted(
        (name for name, token in added.items() if name.strip() and (token.special or name in around)), key=lambda name: (-len(name), name)
    )
    any_name = "|".join(map(re.escape, names))
    begun = sorted({name[:i] for name in names for i in range(1, len(name))}, key=lambda part: (-len(part), part))
    at_end = rf"|(?:{'|'.join(map(re.escape, begun))})\s*\Z" if begun else ""
    firsts = "".join(re.escape(name) for name in sorted({name[0] for name in names}))
    backend = _backend(tokenizer)
    normalizer = getattr(backend, "normalizer", None)
    folded = tuple(normalizer.normalize_str(name) for name in names if added[name].normalized) if normalizer is not None else ()
    return _Known(
        key,
        tuple(names),
        # most texts hold no first character of any, which is soon seen
        re.compile(rf"(?=[{firsts}])(?=(?:{any_name}){at_end}).", re.DOTALL) if names else None,
        re.compile(f"{_LITERAL}|{any_name}", re.DOTALL) if names else None,
        folded,
    )


def _around_turns(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> set[str]:
    """Of some tokens, those that the chat template writes around a user's turn, or that begin the assistant's.

    Some tokenizers do not call their turn markers special. A token such as ``<think>``, which opens no turn, stays what it is.
    """
    if not (tokenizer.chat_template and names):
        return set()
    turns = [{"role": "user", "content": "0"}]
    try:
        turn, whole = (str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opened)) for opened in (False, True))
    except Exception:  # of the template's own: one that refuses such a turn is met again, with the record's name, when it is used
        return set()
    opening = whole[len(turn) :].lstrip() if whole.startswith(turn) else ""
    return {name for name in names if name in turn or (name.strip() and opening.startswith(name))}


def _renamed(known: _Known, text: str) -> tuple[str, list[tuple[int, int]]]:
    """A marked text with its tokens under their other names and without marks; and after which places it is longer by how much."""
    out: list[str] = []
    shifts: list[tuple[int, int]] = []
    at = shift = 0
    for match in known.written.finditer(text) if known.written is not None else ():
        piece = match[1] or _MARK + match[0]
        out += [text[at : match.start()], piece]
        at = match.end()
        shift += len(piece) - len(match[0])
        shifts.append((at, shift))
    return "".join([*out, unmarked(text[at:])]), shifts


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    return getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None


def _literal_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    known = _known(tokenizer)
    if known.literal is None:
        known.literal = with_other_names(_backend(tokenizer), set(known.names), _MARK) or False
    return cast("Tokenizer", known.literal) if known.literal else None


def _broken_up_with_warning(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    logger.warning(
        "%s cannot take the spelling of a control token as text, so a space is put into it; a fast tokenizer can", type(tokenizer).__name__
    )
    return broken_up(text)
