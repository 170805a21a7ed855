"""Code of the user's own that a run calls: rewards, discriminators, schedules, engines, optimisers. Its errors name it and its line."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from aapa_lightning.errors import AapaError, ConfigError, DataError
from aapa_lightning.types import Record

_PACKAGE = Path(__file__).parent


@contextmanager
def users_code(what: str, where: Callable[[], str] | None = None, *, owner: object = None) -> Iterator[None]:
    """Turn an exception of a user's code into an error that says which code raised it.

    Args:
        what: the code, ``reward 'length'``.
        where: which record it fails on, ``data.jsonl:3``; called after it has failed.
        owner: whose code it is. What a class of this package raises stays as it is: it is a fault of ours, and its traceback is needed.

    Raises:
        DataError: it fails on records.
        ConfigError: it fails, and there are no records.
    """
    try:
        yield
    except (AapaError, MemoryError, torch.OutOfMemoryError):  # these say what they are
        raise
    except Exception as error:
        if type(owner).__module__.startswith(f"{_PACKAGE.name}."):
            raise
        record = f" (at {where()})" if where else ""
        line = _line(error)
        kind = DataError if where else ConfigError
        raise kind(f"{what} raised {type(error).__name__}: {error}{record}{f', in {line}' if line else ''}") from error


def _line(error: BaseException) -> str:
    """``file.py, line 3``: the innermost line outside this package and the libraries; empty where there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not Path(f.filename).is_relative_to(_PACKAGE) and "site-packages" not in f.filename]
    theirs = [frame for frame in theirs if not frame.filename.startswith("<") and "/lib/python" not in frame.filename]
    return f"{theirs[-1].filename}, line {theirs[-1].lineno}" if theirs else ""


def label(record: Record) -> str:
    """A record, as messages name it."""
    return record.source if record.key is None else f"{record.source} (key {record.key})"


def culprit(alone: Callable[[int], object], responses: Sequence[str], labels: Sequence[str]) -> str:
    """Which response a user's code fails on, found by giving it one at a time.

    Args:
        alone: calls it with the response at an index.
        responses: ``N`` texts.
        labels: their records' names, ``N``.
    """
    for i, response in enumerate(responses):
        try:
            alone(i)
        except Exception:
            return f"{labels[i]}, response {response[:80]!r}"
    return f"one of {len(labels)} records, none of which fails alone" if labels else "an empty batch"
