"""What of a response is judged: its answer, without the thinking before it. One rule for rewards, judges, evaluation, guard and anchor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from aapa_lightning.errors import ConfigError

#: Tokens of a prompt's end that are looked at for an opening tag.
PROMPT_END_TOKENS = 16


class Judged(str):
    """The part of a response that is judged: ``Thinking`` cuts nothing more off it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Thinking:
    """How thinking is told from the answer.

    Thinking stands at the beginning of a response: between the tags, or up to the closing tag where the prompt ends with the opening one.
    Several thoughts in a row are all thinking, and so is one inside another. Thinking without an end is not an answer: the answer is empty.

    Args:
        score: judge the thinking too, like any text.
        opens: the tag before a thought.
        closes: the tag after it.

    Raises:
        ConfigError: tags that are empty or the same.

    >>> Thinking().answer("<think>hm</think>Yes."), Thinking().answer("hm</think>Yes.", "<think>")
    ('Yes.', 'Yes.')
    """

    score: bool = False
    opens: str = "<think>"
    closes: str = "</think>"

    def __post_init__(self) -> None:
        if not self.opens.strip() or not self.closes.strip() or self.opens == self.closes:
            raise ConfigError(f"score_thinking: expected two different tags, not empty, found {self.opens!r} and {self.closes!r}")

    def opening(self, prompt_end: str) -> str:
        """The opening tag where a prompt ends with it, white space apart, else nothing."""
        return self.opens if prompt_end.rstrip().endswith(self.opens.strip()) else ""

    def start(self, text: str, prompt_end: str = "") -> int:
        """Characters of thinking at the beginning of a response: 0 without any, all of it when the thinking never ends.

        Args:
            text: the response.
            prompt_end: the end of its prompt. Where it is not known, a closing tag without an opening one ends thinking too.
        """
        at, inside = 0, bool(self.opening(prompt_end)) or self._closes_only(text)
        while True:
            body = at + len(text[at:]) - len(text[at:].lstrip())
            if text.startswith(self.opens, body):
                body += len(self.opens)
            elif not inside:
                return at
            end = self._end(text, body)
            if end is None:
                return len(text)
            at, inside = end, False

    def _closes_only(self, text: str) -> bool:
        close = text.find(self.closes)
        return close >= 0 and self.opens not in text[:close]

    def _end(self, text: str, begin: int) -> int | None:
        """Where a thought ends: at the closing tag that balances its opening one, else at the last closing tag."""
        depth, last = 1, None
        for tag in re.finditer(f"{re.escape(self.opens)}|{re.escape(self.closes)}", text[begin:]):
            if tag.group() == self.opens:
                depth += 1
                continue
            depth, last = depth - 1, begin + tag.end()
            if depth == 0:
                break
        return last

    def answer(self, text: str, prompt_end: str = "") -> Judged:
        """Return what is judged of a response: its answer, or all of it with ``score``."""
        if isinstance(text, Judged):
            return text
        return Judged(text if self.score else text[self.start(text, prompt_end) :])

    def answers(self, texts: Sequence[str], prompt_ends: Sequence[str] = ()) -> list[Judged]:
        """``answer`` of each; ``prompt_ends`` has one for each text, or none."""
        return [self.answer(text, end) for text, end in zip(texts, prompt_ends or [""] * len(texts), strict=True)]

    def setting(self) -> bool | dict[str, Any]:
        """The rule as JSON: true or false with the usual tags."""
        return self.score if self == Thinking(self.score) else asdict(self)


#: The option ``score_thinking``: true or false, or ``Thinking`` with tags of one's own.
ScoreThinking = bool | Thinking


def as_thinking(score_thinking: ScoreThinking) -> Thinking:
    """The rule that an option ``score_thinking`` stands for."""
    return score_thinking if isinstance(score_thinking, Thinking) else Thinking(score=bool(score_thinking))


def prompt_end(tokenizer: Any, prompt_ids: Sequence[int]) -> str:
    """The text of a prompt's last tokens, as a response is decoded: without special tokens."""
    return str(tokenizer.decode(list(prompt_ids)[-PROMPT_END_TOKENS:], skip_special_tokens=True, clean_up_tokenization_spaces=False))
