"""Errors that a user can mend.

The command line prints them without a traceback and exits with code 2. A message says what was expected, what was found, where, and how
to mend it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class AapaError(Exception):
    """Base of every error caused by the user's input."""


class DataError(AapaError):
    """A record, a response file or a dataset is not what it should be. The message names the file and the line."""


class ConfigError(AapaError):
    """Options that are illegal, contradict each other or do not divide."""


class MissingDependencyError(AapaError):
    """An optional package is not installed. The message names the extra that brings it."""


def users_cause(error: BaseException) -> BaseException:
    """The first of these errors that ``error`` was raised from, however deep; ``error`` itself when there is none."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, AapaError):
        cause = cause.__cause__
    return cause or error


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
