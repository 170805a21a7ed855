"""Errors that a user can mend.

The command line prints them without a traceback and exits with code 2. A message says what was expected, what was found, where, and how
to mend it.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeVar

T = TypeVar("T")


#: Characters of a message.
LONGEST_MESSAGE = 2000
#: Of those, how many come from its end, which says how to mend it.
_LAST = 500


def in_bounds(text: str) -> str:
    """A message that can be read: a longer one loses its middle, which is a value of the user's."""
    if len(text) <= LONGEST_MESSAGE:
        return text
    first = LONGEST_MESSAGE - _LAST
    return f"{text[:first]} [{len(text) - LONGEST_MESSAGE} characters left out] {text[-_LAST:]}"


class AapaError(Exception):
    """Base of every error caused by the user's input. Its message is cut to ``LONGEST_MESSAGE`` characters, whatever it repeats."""

    def __init__(self, message: object = "") -> None:
        super().__init__(in_bounds(str(message)))


class DataError(AapaError):
    """A record, a response file or a dataset is not what it should be. The message names the file and the line."""


class ConfigError(AapaError):
    """Options that are illegal, contradict each other or do not divide."""


class MissingDependencyError(AapaError):
    """An optional package is not installed. The message names the extra that brings it."""


def users_cause(error: BaseException) -> BaseException:
    """The first of these errors that ``error`` was raised from, however deep; ``error`` itself when there is none."""
    return next((cause for cause in causes(error) if isinstance(cause, AapaError)), error)


def causes(error: BaseException, *, context: bool = False) -> Iterator[BaseException]:
    """Yield ``error`` and what it was raised from, each once, since a chain of exceptions can close in a circle.

    Args:
        error: what was raised.
        context: follow also what was being handled when an error of the chain was raised.
    """
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or (following.__context__ if context else None)


def choose(options: Mapping[str, T], name: str, option: str) -> T:
    """Look up a named option.

    Args:
        options: the legal names and what they stand for.
        name: the name asked for.
        option: what the name chooses, for the message.

    Raises:
        ConfigError: the name is not among them.
    """
    if name not in options:
        raise ConfigError(f"{option}: expected one of {', '.join(options)}; found {name!r}")
    return options[name]


@dataclass(frozen=True, slots=True)
class Limit:
    """What a number among the options must be.

    Args:
        low: the least; infinite for none.
        high: the greatest; infinite for none.
        above: ``low`` itself is out.
        below: ``high`` itself is out.
        whole: an integer.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False

    def holds(self, found: Any) -> bool:
        """Return whether a value is a finite number inside the limits; ``True`` and text are none."""
        if isinstance(found, bool) or not isinstance(found, Integral if self.whole else Real):
            return False
        value: Any = found
        if not abs(value) <= sys.float_info.max:  # NaN, infinities, integers that no float holds
            return False
        return (self.low < value if self.above else self.low <= value) and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        """In words, after "expected"."""
        kind = "a whole number" if self.whole else "a finite number"
        if self.high < math.inf:
            bounds = f"{'(' if self.above else '['}{self.low:g}, {self.high:g}{')' if self.below else ']'}"
            return f"{'a whole' if self.whole else 'a'} number in {bounds}"
        if self.low > -math.inf:
            return "a positive, finite number" if self.above and self.low == 0 else f"{kind}, at least {self.low:g}"
        return kind


COUNT = Limit(1, whole=True)
STEPS = Limit(0, whole=True)
WEIGHT = Limit(0)
POSITIVE = Limit(0, above=True)
SHARE = Limit(0, 1)


def check_numbers(values: Mapping[str, Any], limits: Mapping[str, Limit], where: str = "") -> None:
    """Check numbers among options, each against its limit.

    Args:
        values: options by name; None is an option left out, and of several numbers each is checked.
        limits: of the options to check, by name.
        where: stands before the name in the message, such as ``sampling.``.

    Raises:
        ConfigError: a number outside its limit, NaN or an infinity.

    >>> check_numbers({"beta": float("nan")}, {"beta": WEIGHT})
    Traceback (most recent call last):
    aapa_lightning.errors.ConfigError: beta: expected a finite number, at least 0, found nan
    """
    for name, limit in limits.items():
        value = values[name]
        for each in value if isinstance(value, list | tuple) else (value,):
            if each is not None and not limit.holds(each):
                raise ConfigError(f"{where}{name}: expected {limit}, found {each!r}")


def refuse_idle(owner: Callable[..., Any], values: Mapping[str, Any], names: Iterable[str], why: str, where: str = "") -> None:
    """Refuse options that were set and would do nothing.

    Args:
        owner: the class or function whose options they are; an option that has its default counts as not set.
        values: options by name.
        names: those that do nothing as things are.
        why: after "does nothing": ``without beta``.
        where: stands before the name in the message.

    Raises:
        ConfigError: names the first of them.
    """
    parameters = inspect.signature(owner).parameters
    for name in names:
        if values[name] != parameters[name].default:
            raise ConfigError(f"{where}{name}={values[name]!r} does nothing {why}; change that, or leave {name} out")


def in_one_line(error: BaseException) -> str:
    """Kind and text of another library's error, short enough for a message of ours."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def shown(value: object, limit: int = 80) -> str:
    """A value as a message shows it, whatever it is: at most ``limit`` characters and no control characters.

    >>> shown([1] * 100, 9)
    '[1, 1, 1,'
    """
    try:
        return repr(value[:limit] if isinstance(value, str) else value)[:limit]
    except (ValueError, RecursionError):  # a whole number of thousands of digits; lists in lists in lists
        return f"a value of type {type(value).__name__} that is too large to show"
