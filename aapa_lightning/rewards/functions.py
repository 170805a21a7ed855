"""Rewards from functions: the user's own, and those written for TRL."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from aapa_lightning.errors import ConfigError, DataError, in_one_line
from aapa_lightning.rewards.base import Reward
from aapa_lightning.thinking import ScoreThinking
from aapa_lightning.types import Record

#: Arguments that TRL's trainer gives and that text alone does not have.
_TRAINER_ONLY = {"completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}


def import_function(target: str) -> Callable[..., Any]:
    """Import ``package.module:function``, ``package.module.function`` or ``path/to/file.py:function``. Raises ConfigError."""
    expected = "expected 'package.module:function' or 'path/to/file.py:function'"
    module_name, colon, name = target.rpartition(":")
    if not colon:
        module_name, _, name = target.rpartition(".")
    if not module_name or not name:
        raise ConfigError(f"{expected}, found {target!r}")
    try:
        module = _import_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
        function = getattr(module, name)
    except Exception as error:  # also what the file's own lines raise
        raise ConfigError(f"cannot import {target!r} ({in_one_line(error)}); {expected}, with the package on PYTHONPATH") from error
    if not callable(function):
        raise ConfigError(f"{target!r} is not a function but {type(function).__name__}")
    return function


def _import_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


class FunctionReward(Reward):
    """A user's function ``function(responses, records) -> N numbers``.

    Args:
        function: the function, or where to import it from: ``package.module:function`` or ``path/to/file.py:function``.
        may_abstain: None in place of a number means "cannot be scored": the response leaves its group's baseline (``task_advantages``).
            Otherwise None is an error.
        score_thinking: judge the thinking before an answer too (``Reward``).
        name: logged name; default the function's.

    Raises:
        ConfigError: the function cannot be imported.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        *,
        may_abstain: bool = False,
        score_thinking: ScoreThinking | None = None,
        name: str | None = None,
    ) -> None:
        self._function = import_function(function) if isinstance(function, str) else function
        self.name, self.score_thinking = name or _name(self._function), score_thinking
        if may_abstain:
            self.score_or_abstain = self.__call__

    def __call__(self, responses: Sequence[str], records: Sequence[Record]) -> Tensor | Sequence[float]:
        """Score ``N`` responses."""
        return self._function(list(map(str, self.judged(responses))), records)


class TRLReward(Reward):
    """A reward function written for TRL: ``function(prompts=..., completions=..., **columns) -> N numbers or None``.

    A chat prompt gives chat completions (one assistant turn), a text prompt gives text, as in TRL. ``columns`` are all columns of
    the dataset's row under its own names, and ``key``, ``experts``, ``chosen``, ``rejected``; a function without ``**kwargs`` gets those
    that it names.

    None means "not my task" or "cannot be scored". As in TRL it adds nothing to the weighted sum, and a completion for which *every* reward
    is None leaves its group's baseline and gets no advantage (``task_advantages``). NaN stops the run.

    Args:
        function: the function, or where to import it from (``FunctionReward``).
        none_value: a number that stands for None instead. Called by itself, without a ``RewardSet``, the reward gives 0 by default.
        score_thinking: a function written for TRL judges whole completions, as TRL gives them; false gives it the answers alone.
        name: logged name; default the function's.

    Raises:
        ConfigError: the function cannot be imported, is asynchronous, or demands arguments that only TRL's trainer has.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        *,
        none_value: float | None = None,
        score_thinking: ScoreThinking = True,
        name: str | None = None,
    ) -> None:
        self._function = import_function(function) if isinstance(function, str) else function
        self.name, self.score_thinking = name or _name(self._function), score_thinking
        self.none_value = none_value
        if inspect.iscoroutinefunction(self._function):
            raise ConfigError(f"reward {self.name!r} is asynchronous; wrap it in a function that waits for it")
        parameters = inspect.signature(self._function).parameters.values()
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self._required = {p.name for p in parameters if p.name in self._named and p.default is p.empty}
        if unmet := self._required & _TRAINER_ONLY:
            raise ConfigError(
                f"reward {self.name!r} needs {sorted(unmet)}, which only TRL's trainer has; rewards here see text and records"
            )

    def skip_reason(self, record: Record) -> str | None:
        """None; raises DataError when a column that the function demands is missing."""
        if missing := self._required - {"prompts", "completions"} - _columns(record).keys():
            raise DataError(
                f"{record.source}: reward {self.name!r} needs the columns {sorted(missing)}, found {sorted(record.row or record.extra)}"
            )
        return None

    def __call__(self, responses: Sequence[str], records: Sequence[Record]) -> list[float]:
        """Score ``N`` responses."""
        return [0.0 if value is None else value for value in self.score_or_abstain(responses, records)]

    def score_or_abstain(self, responses: Sequence[str], records: Sequence[Record]) -> list[float | None]:
        """Score ``N`` responses, None where the function gives None and ``none_value`` does not stand for it."""
        rows = [_columns(record) for record in records]
        arguments: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in {name for row in rows for name in row}}
        arguments["prompts"] = [record.prompt if isinstance(record.prompt, str) else _copy(record.prompt) for record in records]
        arguments["completions"] = [_completion(text, record) for text, record in zip(self.judged(responses), records, strict=True)]
        if not self._takes_all:
            arguments = {name: value for name, value in arguments.items() if name in self._named}
        return [self.none_value if value is None else float(value) for value in self._function(**arguments)]


def _columns(record: Record) -> dict[str, Any]:
    """Columns of a record: those of the schema, and all of its row under the dataset's names, but what TRL gives as other arguments."""
    schema = {"key": record.key, "experts": list(record.experts), "chosen": record.chosen, "rejected": record.rejected}
    row = {name: value for name, value in record.row.items() if name not in ("prompt", "completion", "completion_ids")}
    return {**record.extra, **schema, **row}


def _copy(turns: Sequence[Any]) -> list[dict[str, str]]:
    return [dict(turn) for turn in turns]


def _completion(response: str, record: Record) -> str | list[dict[str, str]]:
    return str(response) if isinstance(record.prompt, str) else [{"role": "assistant", "content": str(response)}]
