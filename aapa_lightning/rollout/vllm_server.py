"""Rollouts from a vLLM server over HTTP, which is given the policy's weights through a folder."""

from __future__ import annotations

import json
import shutil
import threading
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from aapa_lightning.errors import COUNT, AapaError, ConfigError, DataError, check_numbers, in_one_line, refuse_idle
from aapa_lightning.remote import Refused, Remote
from aapa_lightning.rollout.base import RolloutEngine, RolloutRequest, SamplingParams
from aapa_lightning.rollout.collate import Response, collate
from aapa_lightning.rollout.vllm_requests import completion_body, read_completion, sampling_fields
from aapa_lightning.rollout.vllm_weights import Dtype, NamedWeights, is_first_rank, named_weights, share_from_first, write_weights
from aapa_lightning.types import Rollouts

T = TypeVar("T")
_START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs"


@dataclass(frozen=True)
class VLLMServer(Remote):
    """The endpoints of ``vllm serve`` that a rollout engine needs; see ``Remote``."""

    option: ClassVar[str] = "engine"
    check: ClassVar[str] = f"start it with {_START}"
    shorten: ClassVar[str] = "lower sampling.max_new_tokens or the number of samples"

    def read(self, path: str, body: Any, task: str, find: Callable[[Any], T], method: str = "POST") -> T:
        """Ask, and find a value in the answer.

        Raises:
            ConfigError: see ``Remote.ask``.
            DataError: an answer of another form.
        """
        content = self.ask(path, body, task, method=method)
        try:
            return find(json.loads(content))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise DataError(f"{self.named()}: expected the answer of {path}, found {content[:200]!r} ({in_one_line(error)})") from error

    def served(self) -> tuple[str, int | None]:
        """Name and context length of the model."""
        return self.read("/v1/models", None, "name its model", lambda found: (str(found["data"][0]["id"]), _length(found)), "GET")

    def logprobs_mode(self) -> str:
        """Of ``--logprobs-mode``."""
        path = "/server_info?config_format=json"
        return self.read(path, None, "show its settings", lambda found: str(found["vllm_config"]["model_config"]["logprobs_mode"]), "GET")

    def version(self) -> str:
        """The label of the weights that it samples from."""
        return self.read("/weight_info", None, "name the version of its weights", lambda found: str(found["weight_version"]), "GET")

    def load(self, folder: str, version: str) -> None:
        """Load a folder's weights and forget what was computed with others. After a failure the server stays paused.

        Raises:
            ConfigError: it refuses, goes on failing, or serves another version afterwards.
        """
        self.ask("/pause?mode=wait", None, "pause")
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        self.ask("/collective_rpc", body, f"load the weights in {folder} (does it see that folder?)")
        if b"false" in self.ask("/reset_prefix_cache", None, "forget its prefix cache"):
            raise ConfigError(f"{self.named()} could not reset its prefix cache: responses would still rest on the old weights; restart it")
        self.ask("/update_weight_version", {"new_version": version}, "take a version's name")
        self.ask("/resume", None, "resume")
        if (found := self.version()) != version:
            raise ConfigError(f"{self.named()} serves weights of version {found!r} after loading {version!r}; is it another run's, too?")


def _length(found: Any) -> int | None:
    length = found["data"][0].get("max_model_len")
    return length if length is None else int(length)


class VLLMServerEngine(RolloutEngine):
    """Generates on a vLLM server (0.27 or newer), which ``sync`` gives the policy's weights to.

    Rank 0 writes them into a folder that the server sees as well, and has it load them; every rank then sends its own requests. Each
    request is seeded by (seed, window, slot), so a server draws the same again as far as its batching allows; the row-keyed noise of the
    embedded engines does not reach it, so it draws other responses than they do.

    Args:
        model: the policy.
        tokenizer: its tokenizer.
        eos_ids: every id that ends a response.
        url: ``http://host:port``.
        folder: where weights are written until they are loaded, the model's size at a time; None for a server that holds the policy's
            weights already, which suits evaluation and refuses training.
        folder_on_server: the same folder as the server sees it, where that differs.
        dtype: of the written weights; the server's own.
        served_model: the name that it serves, when not the first.
        concurrency: requests at a time, of each rank.
        connect_timeout: seconds.
        read_timeout: seconds until a request is answered in full, which is when its longest response has ended.
        retries: tries after the first.
        backoff: seconds before the second try.
        api_key_env: environment variable that holds the bearer token.
        weights: yields the checkpoint's names and whole tensors; by default ``vllm_weights.named_weights``.

    Raises:
        ConfigError: an option is illegal.
    """

    own_weights = True

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        eos_ids: Sequence[int],
        *,
        url: str,
        folder: str | None = None,
        folder_on_server: str | None = None,
        dtype: Dtype = "bfloat16",
        served_model: str | None = None,
        concurrency: int = 64,
        connect_timeout: float = 5.0,
        read_timeout: float = 1800.0,
        retries: int = 5,
        backoff: float = 0.5,
        api_key_env: str | None = None,
        weights: NamedWeights = named_weights,
    ) -> None:
        self.server = VLLMServer(
            url,
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
            retries=retries,
            backoff=backoff,
            api_key_env=api_key_env,
        )
        check_numbers(locals(), {"concurrency": COUNT}, "engine.")
        if folder is None:
            refuse_idle(VLLMServerEngine, locals(), ("folder_on_server",), "without a folder", "engine.")
        self.model, self.tokenizer, self.eos_ids = model, tokenizer, tuple(eos_ids)
        self.folder = None if folder is None else Path(folder).absolute()
        self.folder_on_server = folder_on_server
        self.dtype: Dtype = dtype
        self.served_model = served_model
        self.concurrency = concurrency
        self._weights = weights
        self._step: int | None = None
        self._version: str | None = None
        self._context: int | None = None
        self._greeted = False
        self._stop = threading.Event()

    def check_training(self) -> None:
        """Raise ConfigError without a folder: the server would go on with the weights that training starts from."""
        if self.folder is None:
            raise ConfigError(
                f"engine.folder: expected a folder to give {self.server.named()} the weights of every step, found none; name one that both "
                "see. Without one it can only validate and predict"
            )

    def sync(self, step: int) -> None:
        """Give the server the weights of optimiser step ``step``; see ``RolloutEngine.sync``.

        Raises:
            ConfigError: on all ranks, when the server cannot take them on.
        """
        if step == self._step:
            return
        self._greet()
        if self.folder is None and self._step is not None:
            raise ConfigError(
                f"engine.folder: expected a folder to give {self.server.named()} the weights of step {step}, found none, so it would go on "
                f"with those of step {self._step}"
            )
        if self.folder is not None:
            version = share_from_first(f"{uuid.uuid4().hex[:8]}-step-{step}")
            self._step = self._version = None  # after a failure the server holds nobody's weights
            problem = self._push(self.folder / version, version)
            if problem := share_from_first(problem) or problem:
                raise ConfigError(problem)
            self._version = version
        self._step = step

    def _push(self, folder: Path, version: str) -> str | None:
        """What went wrong, if anything: raised only once all ranks know, since the others wait for this one."""
        weights = self._named()
        load: Callable[[], object] = partial(self._load, weights, folder, version)
        # ranks gather sharded weights together, also those that one of them has no use for
        rest: Callable[[], object] = partial(deque, weights, maxlen=0)
        problems = []
        for part in (load, rest) if is_first_rank() else (rest,):
            try:
                part()
            except AapaError as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"engine.folder: cannot write {folder}: {in_one_line(error)}")
        return problems[0] if problems else None

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._weights(self.model)

    def _load(self, weights: Iterator[tuple[str, Tensor]], folder: Path, version: str) -> None:
        try:
            write_weights(weights, folder, self.dtype)
            self.server.load(f"{self.folder_on_server or folder.parent}/{folder.name}", version)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _greet(self) -> None:
        """Look at a server once before it is used."""
        if self._greeted:
            return
        name, self._context = self.server.served()
        self.served_model = self.served_model or name
        try:
            mode = self.server.logprobs_mode()
        except Refused:
            if self.folder is not None:
                raise
            warnings.warn(
                f"{self.server.named()} does not show its settings (VLLM_SERVER_DEV_MODE=1); without --logprobs-mode processed_logprobs "
                "its log-probs are those at temperature 1",
                stacklevel=3,
            )
        else:
            if mode != "processed_logprobs":
                raise ConfigError(
                    f"{self.server.named()} gives log-probs before the temperature (--logprobs-mode {mode}), and those of what was sampled "
                    f"are needed; start it with {_START}"
                )
        self._greeted = True

    def generate(self, requests: Sequence[RolloutRequest], params: SamplingParams, *, seed: int, window: int) -> Rollouts:
        """Draw responses; see ``RolloutEngine.generate``.

        Raises:
            ConfigError: the server is dead, refuses, holds other weights than were pushed, or has too short a context.
            DataError: an answer that is not what was asked for.
        """
        if self.folder is not None and self._version is None:
            raise RuntimeError("sync was not called: the server holds weights that are not the policy's")
        self._greet()
        self._check_context(requests, params)
        self._check_version()
        stop = self._stop = threading.Event()
        with ThreadPoolExecutor(self.concurrency) as pool:
            jobs = [pool.submit(self._draw, request, params, seed, window, stop) for request in requests]
            try:
                drawn = [response for job in jobs for response in job.result()]
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self._check_version()
        return collate([request for request in requests for _ in range(request.samples)], drawn, self.tokenizer, self.model.device)

    def _draw(self, request: RolloutRequest, params: SamplingParams, seed: int, window: int, stop: threading.Event) -> list[Response]:
        if stop.is_set():
            raise ConfigError(f"{self.server.named()} is not asked any more: the run ends")
        fields = sampling_fields(request, params, self.eos_ids, seed, window)
        body = completion_body(str(self.served_model), request, fields)
        content = self.server.ask("/v1/completions", body, f"respond to {request.record.source}", stop)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        return read_completion(content, request, params, self.eos_ids, vocabulary, self._version)

    def _check_context(self, requests: Sequence[RolloutRequest], params: SamplingParams) -> None:
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        if self._context is not None and longest + params.max_new_tokens > self._context:
            raise ConfigError(
                f"{self.server.named()} holds {self._context} tokens, but a prompt of {longest} and sampling.max_new_tokens of "
                f"{params.max_new_tokens} need {longest + params.max_new_tokens}; raise its --max-model-len"
            )

    def _check_version(self) -> None:
        if self._version is not None and (found := self.server.version()) != self._version:
            raise ConfigError(
                f"{self.server.named()} holds weights of version {found!r}, expected {self._version!r}: it was restarted, or someone else "
                "loads weights into it; resume from the last checkpoint, which gives them anew"
            )

    def forget(self) -> None:
        """See ``RolloutEngine.forget``; without a folder the server keeps the weights that it has."""
        if self.folder is not None:
            self._step = None

    def close(self) -> None:
        """Forget what the server holds, and send it no request that has not been sent; it goes on with the others."""
        self._stop.set()
        self._step = self._version = None
        self._greeted = False
