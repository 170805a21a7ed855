"""Rewards over the text alone: patterns and lengths."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from aapa_lightning.errors import ConfigError
from aapa_lightning.rewards.base import Reward
from aapa_lightning.thinking import ScoreThinking
from aapa_lightning.types import Record

Unit = Literal["words", "characters"]


def text_length(text: str, unit: Unit) -> int:
    """Length of a text in characters, or in words (stretches without white space)."""
    return len(text.split()) if unit == "words" else len(text)


def soft_overlong(length: float, limit: float, buffer: float) -> float:
    """Soft overlong punishment of DAPO (arXiv 2503.14476): 0 up to ``limit - buffer``, then linear to -1 at ``limit``, -1 beyond.

    Example:
        >>> [soft_overlong(length, limit=100, buffer=20) for length in (80, 85, 100, 400)]
        [0.0, -0.25, -1.0, -1.0]
    """
    return -min(max((length - (limit - buffer)) / buffer, 0.0), 1.0) + 0.0


class RegexReward(Reward):
    """1 for a response in which a pattern is found, else 0.

    Args:
        pattern: Python regular expression.
        full: the whole response must match, not a part of it.
        flags: letters of inline flags: ``i`` ignore case, ``m`` ``^$`` at lines, ``s`` dot matches line breaks, ``x`` verbose.
        score_thinking: judge the thinking before an answer too (``Reward``).
        name: logged name.

    Raises:
        ConfigError: the pattern is not a regular expression.
    """

    def __init__(
        self, pattern: str, *, full: bool = False, flags: str = "", score_thinking: ScoreThinking | None = None, name: str = "regex"
    ) -> None:
        self.name, self.score_thinking = name, score_thinking
        try:
            compiled = re.compile(f"(?{flags})" + pattern if flags else pattern)
        except re.error as error:
            raise ConfigError(f"reward {name!r}: {pattern!r} with flags {flags!r} is not a regular expression ({error})") from error
        self._find = compiled.fullmatch if full else compiled.search

    def __call__(self, responses: Sequence[str], records: Sequence[Record]) -> list[float]:
        """Score ``N`` responses."""
        return [float(self._find(response) is not None) for response in self.judged(responses)]


class LengthReward(Reward):
    """1 for a response whose length lies within bounds, else 0.

    Args:
        minimum: shortest length that counts.
        maximum: longest length that counts; None for no bound.
        unit: what is counted.
        score_thinking: judge the thinking before an answer too (``Reward``).
        name: logged name.

    Raises:
        ConfigError: no length lies within the bounds, or every length does.
    """

    def __init__(
        self,
        *,
        minimum: int = 0,
        maximum: int | None = None,
        unit: Unit = "words",
        score_thinking: ScoreThinking | None = None,
        name: str = "length",
    ) -> None:
        _check_unit(name, unit)
        if minimum < 0 or (maximum is not None and maximum < minimum) or (minimum == 0 and maximum is None):
            raise ConfigError(f"reward {name!r}: expected 0 <= minimum <= maximum and at least one bound, found {minimum} and {maximum}")
        self.name, self.score_thinking = name, score_thinking
        self.minimum = minimum
        self.maximum = float("inf") if maximum is None else maximum
        self.unit = unit

    def __call__(self, responses: Sequence[str], records: Sequence[Record]) -> list[float]:
        """Score ``N`` responses."""
        return [float(self.minimum <= text_length(response, self.unit) <= self.maximum) for response in self.judged(responses)]


class SoftOverlongReward(Reward):
    """DAPO's soft overlong punishment in [-1, 0] (``soft_overlong``), over words or characters.

    Args:
        limit: length at which the punishment is full.
        buffer: how far before the limit it begins.
        unit: what is counted.
        score_thinking: judge the thinking before an answer too (``Reward``).
        name: logged name.

    Raises:
        ConfigError: not 0 < buffer <= limit.
    """

    def __init__(
        self, limit: int, buffer: int, *, unit: Unit = "words", score_thinking: ScoreThinking | None = None, name: str = "overlong"
    ) -> None:
        _check_unit(name, unit)
        if not 0 < buffer <= limit:
            raise ConfigError(f"reward {name!r}: expected 0 < buffer <= limit, found buffer {buffer} and limit {limit}")
        self.name, self.score_thinking = name, score_thinking
        self.limit = limit
        self.buffer = buffer
        self.unit = unit

    def __call__(self, responses: Sequence[str], records: Sequence[Record]) -> list[float]:
        """Score ``N`` responses."""
        return [soft_overlong(text_length(response, self.unit), self.limit, self.buffer) for response in self.judged(responses)]


def _check_unit(name: str, unit: str) -> None:
    if unit not in ("words", "characters"):
        raise ConfigError(f"reward {name!r}: unit must be 'words' or 'characters', found {unit!r}")
