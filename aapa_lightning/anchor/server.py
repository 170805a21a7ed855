"""Scores from a server: the pooling and classify endpoints of vLLM and SGLang. Every text gets a score, or an error says which does not."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from aapa_lightning.errors import COUNT, DataError, check_numbers, choose
from aapa_lightning.remote import Remote

#: Scores become float32.
_LARGEST_SCORE = 3.4028234e38


def _in_order(answer: Any, count: int) -> list[Any]:
    """Rows of ``{"data": [...]}``, put in order by their ``index``."""
    rows = answer["data"]
    table = {row.get("index", i): row for i, row in enumerate(rows)}
    if len(rows) == count and table.keys() != set(range(count)):
        raise ValueError(f"indices {sorted(table)}")
    return [table[i] for i in range(len(rows))] if len(rows) == count else rows


def _pooled(answer: Any, count: int) -> list[Any]:
    """Of ``/pooling``: vLLM gives a row of one value for every token, the last of which counts; LMDeploy one bare value."""
    values = [row["data"] for row in _in_order(answer, count)]
    return [value[-1] if isinstance(value, list) and value and isinstance(value[-1], list) else value for value in values]


@dataclass(frozen=True)
class _Api:
    """An endpoint: its path, the request's field of texts, what else a request says, and how the answer's values are found."""

    path: str
    texts: str
    body: dict[str, Any]
    values: Callable[[Any, int], list[Any]]


#: vLLM squashes scores (sigmoid or softmax) unless it is told not to.
_RAW = {"use_activation": False}
_APIS = {
    "vllm_pooling": _Api("/pooling", "input", _RAW, _pooled),
    "vllm_classify": _Api("/classify", "input", _RAW, lambda answer, count: [row["probs"] for row in _in_order(answer, count)]),
    "sglang_classify": _Api("/classify", "text", {}, lambda answer, _: [row["embedding"] for row in answer]),
}


@dataclass(frozen=True)
class ScoreServer(Remote):
    """Where a reward model is served, and how patiently it is asked; see ``Remote``.

    Args:
        url: ``http://host:port``.
        api: ``vllm_pooling`` (also LMDeploy), ``vllm_classify`` or ``sglang_classify``.
        model: the served model's name, when it is not the name of the weights.
        batch_size: texts in one request.
        concurrency: requests at a time.
        body: more fields of a request, such as ``{use_activation: null}``.
        connect_timeout: seconds.
        read_timeout: seconds until a request is answered in full.
        retries: tries after the first.
        backoff: seconds before the second try.
        api_key_env: environment variable that holds the bearer token.

    Raises:
        ConfigError: an option is illegal.
    """

    check: ClassVar[str] = "check url, api and model"
    # a value for each of 16384 tokens of 32 texts takes some 15 MiB; a model that sends its hidden states takes gigabytes
    shorten: ClassVar[str] = "lower batch_size, or serve the model as a reward model: it may be sending its hidden states"

    api: Literal["vllm_pooling", "vllm_classify", "sglang_classify"] = "vllm_pooling"
    model: str | None = None
    batch_size: int = 32
    concurrency: int = 4
    body: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choose(_APIS, self.api, "server.api")
        super().__post_init__()
        check_numbers(
            {"batch_size": self.batch_size, "concurrency": self.concurrency}, {"batch_size": COUNT, "concurrency": COUNT}, "server."
        )

    def scores(self, texts: Sequence[str], where: Sequence[str], model: str) -> list[float]:
        """Score ``N`` texts, in their order.

        Args:
            texts: what the model reads.
            where: ``N`` names for error messages, ``file:line``.
            model: name of the model unless the server has another for it.

        Returns:
            ``N`` finite numbers.

        Raises:
            ConfigError: the server cannot be reached, goes on failing, or refuses a request.
            DataError: an answer is malformed, too short or not finite; names the record.
        """
        stop = threading.Event()
        starts = range(0, len(texts), self.batch_size)
        with ThreadPoolExecutor(self.concurrency) as pool:
            jobs = [
                pool.submit(self._batch, texts[i : i + self.batch_size], where[i : i + self.batch_size], self.model or model, stop)
                for i in starts
            ]
            try:
                found = [score for job in jobs for score in job.result()]
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if len(set(texts)) > 1 and all(score == 1.0 for score in found):
            raise DataError(
                f"{where[0]}: {self.named()} gave exactly 1.0 for all of {len(set(texts))} different texts: a softmax over one value; "
                "start it without that activation (vLLM: use_activation false in the request, or in --pooler-config)"
            )
        return found

    def _batch(self, texts: Sequence[str], where: Sequence[str], model: str, stop: threading.Event) -> list[float]:
        api = _APIS[self.api]
        request = {"model": model, api.texts: list(texts), **api.body, **self.body}
        records = where[0] if len(where) == 1 else f"{where[0]} and {len(where) - 1} more"
        content = self.ask(api.path, request, f"score {records}", stop)
        try:
            values = api.values(json.loads(content, parse_int=float), len(texts))  # an endless integer is infinite
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise DataError(
                f"{records}: expected the answer of {self.api} from {self.named()}, found {content[:200]!r} "
                f"({type(error).__name__}: {error}); is it another api?"
            ) from error
        if len(values) != len(texts):
            raise DataError(f"{records}: expected {len(texts)} scores from {self.named()}, found {len(values)}")
        return [self._score(value, name) for value, name in zip(values, where, strict=True)]

    def _score(self, value: Any, where: str) -> float:
        number = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= _LARGEST_SCORE:
            raise DataError(
                f"{where}: expected one finite score from {self.named()}, found {str(value)[:80]}; "
                "is the model served as a reward model with one output?"
            )
        return float(number)

    def named(self) -> str:
        """The server and its endpoint."""
        return f"the server {self.url} ({self.api})"
