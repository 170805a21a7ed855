"""The terminal: texts from outside escaped and cut in one place, and streams that may be closed, full or of another encoding.

Servers, data files, model names and exceptions of a user's code choose what a message repeats. An escape code among it would move the
cursor, rename the window or hide a line.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from aapa_lightning.errors import in_bounds

#: Control characters but line break and tab, what turns the direction of writing, and halves of a character.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class NoOutputError(Exception):
    """Standard output is full or gone."""


def printable(text: str) -> str:
    r"""The text with everything that a terminal would obey spelled out, such as ``\x1b``."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def say(text: object, *, error: bool = False, end: str = "\n") -> None:
    """Print a text of ours, with whatever it repeats of others.

    Args:
        text: what to print.
        error: to standard error.
        end: after the text.

    Raises:
        NoOutputError: standard output cannot be written.
    """
    stream = sys.stderr if error else sys.stdout
    with _writing(stream):
        stream.write(printable(str(text)) + end)
        stream.flush()


def flush() -> None:
    """Write out what was printed, to know that it arrived. Raises NoOutputError where it did not."""
    with _writing(sys.stdout):
        sys.stdout.flush()


@contextmanager
def _writing(stream: Any) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        silence(stream)
        raise NoOutputError(f"cannot write to standard output: {error.strerror or error}") from error


def fail(error: object) -> None:
    """Print the one message of a command that ends."""
    say(f"aapa: error: {in_bounds(str(error))}", error=True)


class _Tolerant:
    """A stream whose text nobody waits for: when it cannot be written any more, it falls silent and the program goes on."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream = stream
        self._name = name

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        try:
            return int(self._stream.write(text))
        except OSError as error:
            self._fall_silent(error)
            return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        try:
            self._stream.flush()
        except OSError as error:
            self._fall_silent(error)

    def _fall_silent(self, error: OSError) -> None:
        silence(self._stream)
        if self._stream is not getattr(sys.stderr, "_stream", sys.stderr):
            say(f"aapa: note: {self._name} cannot be written ({error.strerror or error}); going on without it", error=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def silence(stream: Any) -> None:
    """Let what a stream still holds, and everything that follows, go nowhere: the interpreter writes it out when it ends."""
    with suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def guarded(*, output_matters: bool) -> Iterator[None]:
    """Make the standard streams safe to print to, and warnings and log lines safe to read.

    Args:
        output_matters: standard output is what the command is for, so that failing to write it is an error.
    """
    _open_what_is_closed()
    before = sys.stdout, sys.stderr, warnings.formatwarning, logging.getLogRecordFactory()
    for stream in before[:2]:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = _Tolerant(sys.stderr, "standard error")
    if not output_matters:
        sys.stdout = _Tolerant(sys.stdout, "standard output")
    warnings.formatwarning = lambda *args, **kwargs: printable(before[2](*args, **kwargs))
    logging.setLogRecordFactory(lambda *args, **kwargs: _printable_record(before[3](*args, **kwargs)))
    try:
        yield
    finally:
        sys.stdout, sys.stderr, warnings.formatwarning = before[:3]
        logging.setLogRecordFactory(before[3])


def _printable_record(record: logging.LogRecord) -> logging.LogRecord:
    if record.name.startswith(("aapa_lightning", "lightning")):
        record.msg, record.args = printable(record.getMessage()), None
    return record


def _open_what_is_closed() -> None:
    """Give every standard stream that the shell closed (``>&-``) its number back: the next file would get it, and what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
