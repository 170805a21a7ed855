"""Rollouts from vLLM in the training process, on the same GPU."""

from __future__ import annotations

import copy
import gc
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from aapa_lightning.errors import COUNT, ConfigError, DataError, Limit, MissingDependencyError, check_numbers, in_one_line
from aapa_lightning.rollout.base import RolloutEngine, RolloutRequest, SamplingParams
from aapa_lightning.rollout.collate import Response, collate
from aapa_lightning.rollout.vllm_requests import check_response, sampling_fields
from aapa_lightning.rollout.vllm_weights import Dtype, NamedWeights, Taken, named_weights
from aapa_lightning.sharding import is_sharded
from aapa_lightning.types import Rollouts


class VLLMEngine(RolloutEngine):
    """Generates with vLLM's ``LLM`` on each rank's own GPU (tensor parallel 1), whose weights ``sync`` replaces by the policy's.

    Experimental: its calls are tested in order against vLLM's interface, not on a GPU. Responses are seeded by (seed, window, slot,
    sample); the row-keyed noise of the embedded engines does not reach them, so they are others than theirs.

    Args:
        model: the policy.
        tokenizer: its tokenizer.
        eos_ids: every id that ends a response.
        gpu_memory_utilization: share of the GPU's memory that vLLM may hold while it generates, its copy of the weights included.
        max_model_len: tokens of prompt and response; None takes the model's own limit, which the cache must have room for.
        sleep_level: what vLLM gives back while the policy trains: 0 nothing, 1 its cache, and its weights go to the CPU, 2 cache and
            weights, which are then given anew at every call of ``generate``.
        dtype: of vLLM's copy of the weights.
        enforce_eager: no CUDA graphs: slower, starts sooner, takes less memory.
        options: more arguments of ``vllm.LLM``.
        weights: yields the checkpoint's names and whole tensors; by default ``vllm_weights.named_weights``.

    Raises:
        MissingDependencyError: vLLM is not installed.
        ConfigError: an option is illegal.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        eos_ids: Sequence[int],
        *,
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
        sleep_level: Literal[0, 1, 2] = 1,
        dtype: Dtype = "bfloat16",
        enforce_eager: bool = False,
        options: dict[str, Any] | None = None,
        weights: NamedWeights = named_weights,
    ) -> None:
        check_numbers(locals(), {"gpu_memory_utilization": Limit(0, 1, above=True, below=True), "max_model_len": COUNT}, "engine.")
        if sleep_level not in (0, 1, 2):
            raise ConfigError(f"engine.sleep_level: expected 0, 1 or 2, found {sleep_level!r}")
        self._vllm = _vllm()
        self.model, self.tokenizer, self.eos_ids = model, tokenizer, tuple(eos_ids)
        self.sleep_level = sleep_level
        self.own_weights = sleep_level != 2  # those of level 2 come anew whenever it generates
        self.dtype: Dtype = dtype
        self._weights = weights
        self._arguments = {
            "dtype": dtype,
            "load_format": "dummy",  # the weights come by sync
            "tensor_parallel_size": 1,
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_model_len": max_model_len,
            "enforce_eager": enforce_eager,
            "enable_sleep_mode": sleep_level > 0,
            "logprobs_mode": "processed_logprobs",  # at the sampling temperature
            "generation_config": "vllm",  # the model's own defaults would change the distribution
            "distributed_executor_backend": "external_launcher",  # in this process
            **(options or {}),
        }
        self._llm: Any = None
        self._drawing = threading.Lock()  # a draw in the background is never cut short
        self._asleep: set[str] = set()
        self._holds: int | None = None  # the step whose weights vLLM holds
        self._step: int | None = None

    def sync(self, step: int) -> None:
        """Give vLLM the weights of optimiser step ``step``; see ``RolloutEngine.sync``. All ranks call it together."""
        if self.sleep_level == 2 and is_sharded(self.model):
            raise ConfigError(
                "engine.sleep_level: expected 0 or 1 for a policy in shards, found 2: weights would be gathered when one rank generates, "
                "and the others would not be there"
            )
        self._step = step
        if self._holds != step:
            self._push()

    def _push(self) -> None:
        if self._llm is None:
            self._llm = self._start()
            self._sleep()
        self._wake("weights")
        kind = getattr(torch, self.dtype)
        weights = Taken((name, value.to(kind) if value.is_floating_point() else value) for name, value in self._weights(self.model))
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        weights.check("vLLM")
        self._llm.reset_prefix_cache()
        self._holds = self._step

    def _start(self) -> Any:
        with tempfile.TemporaryDirectory(prefix="aapa-vllm-") as folder, _launched_alone(self.model.device):
            config = copy.deepcopy(self.model.config)
            # a policy made from a configuration names no class; FSDP2 puts its name before the model's
            config.architectures = config.architectures or [type(self.model).__name__.removeprefix("FSDP")]
            config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            try:
                return self._vllm.LLM(model=folder, **self._arguments)
            except (ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"engine: vLLM did not start ({in_one_line(error)}); see gpu_memory_utilization, max_model_len and options"
                ) from error

    def _wake(self, *tags: str) -> None:
        if wanted := [tag for tag in tags if tag in self._asleep]:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what training has freed is vLLM's to take
            self._llm.wake_up(tags=wanted)
            self._asleep.difference_update(wanted)

    def _sleep(self) -> None:
        if self.sleep_level:
            self._llm.sleep(level=self.sleep_level)
            self._asleep = {"weights", "kv_cache"}
        if self.sleep_level == 2:
            self._holds = None

    def generate(self, requests: Sequence[RolloutRequest], params: SamplingParams, *, seed: int, window: int) -> Rollouts:
        """Draw responses; see ``RolloutEngine.generate``.

        Raises:
            DataError: vLLM's answer is not what was asked for.
        """
        if self._step is None:
            raise RuntimeError("sync was not called: vLLM holds no weights")
        fields = [sampling_fields(request, params, self.eos_ids, seed, window) for request in requests]
        sampling = [self._vllm.SamplingParams(**values, detokenize=bool(params.stop)) for values in fields]
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        with self._drawing:
            if self._holds is None:
                self._push()
            self._wake("weights", "kv_cache")
            outputs = self._llm.generate(prompts, sampling, use_tqdm=False) if requests else []
            self._sleep()
        if len(outputs) != len(requests):
            raise DataError(f"vLLM: expected outputs for {len(requests)} prompts, found {len(outputs)}")
        drawn = [response for request, output in zip(requests, outputs, strict=True) for response in self._read(output, request, params)]
        return collate([request for request in requests for _ in range(request.samples)], drawn, self.tokenizer, self.model.device)

    def _read(self, output: Any, request: RolloutRequest, params: SamplingParams) -> list[Response]:
        where = f"vLLM's output for the prompt of {request.record.source}"
        greedy = params.temperature == 0
        asked = 1 if greedy else request.samples
        rows = sorted(output.outputs, key=lambda row: row.index)
        if list(output.prompt_token_ids) != list(request.prompt_ids) or [row.index for row in rows] != list(range(asked)):
            raise DataError(f"{where}: expected samples 0 to {asked - 1} of that prompt, found {[row.index for row in rows]}")
        vocabulary = self.model.get_input_embeddings().num_embeddings
        responses = []
        for row in rows:
            ids, steps = [int(token) for token in row.token_ids], row.logprobs or []
            logprobs = [step[token].logprob for token, step in zip(ids, steps, strict=False) if token in step]
            responses.append(check_response(ids, logprobs, row.finish_reason, params, self.eos_ids, vocabulary, where))
        return responses * request.samples if greedy else responses

    def forget(self) -> None:
        """See ``RolloutEngine.forget``."""
        self._holds = None

    def close(self) -> None:
        """End vLLM and free its memory; the next ``sync`` starts it again."""
        with self._drawing:
            llm, self._llm = self._llm, None
        self._holds = self._step = None
        self._asleep = set()
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise MissingDependencyError("engine: expected the package vllm, found none; pip install 'aapa-lightning[vllm]'") from error
    return vllm


@contextmanager
def _launched_alone(device: torch.device) -> Iterator[None]:
    """What vLLM reads from a launcher's environment while it starts; put back afterwards, since Lightning reads some of it as well."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    values = {
        "RANK": str(torch.distributed.get_rank() if distributed else 0),
        "WORLD_SIZE": str(torch.distributed.get_world_size() if distributed else 1),
        "LOCAL_RANK": str(device.index or 0),  # the GPU that it takes
    }
    before = {name: os.environ.get(name) for name in (*values, "MASTER_ADDR", "MASTER_PORT")}
    os.environ.update(values)
    if not distributed:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(_free_port())
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
