"""Requests to vLLM and what may come back, without a connection. Nothing of an answer is believed before it was looked at."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.rollout.base import RolloutRequest, SamplingParams
from aapa_lightning.rollout.collate import Response
from aapa_lightning.seeds import derive_seed

#: vLLM samples at this temperature when it is asked for a lower one that is not 0.
_LOWEST_TEMPERATURE = 0.01
#: Room for rounding above a log-prob of 0.
_ROUNDING = 1e-3


def first_seed(seed: int, window: int, slot: int) -> int:
    """The seed of a request's first response; vLLM adds the number of the sample. In [0, 2**62)."""
    return derive_seed("vllm", seed, window, slot) >> 1


def sampling_fields(request: RolloutRequest, params: SamplingParams, eos_ids: Sequence[int], seed: int, window: int) -> dict[str, Any]:
    """The arguments of vLLM's ``SamplingParams`` for one request, which are also fields of a completion request.

    Everything that a server or a model's generation config could fill in by itself is said. Greedy responses are asked for once.

    Raises:
        ConfigError: a temperature that vLLM replaces by another.
    """
    if 0 < params.temperature < _LOWEST_TEMPERATURE:
        raise ConfigError(
            f"sampling.temperature: expected 0 or at least {_LOWEST_TEMPERATURE}, found {params.temperature}; vLLM samples at "
            f"{_LOWEST_TEMPERATURE} below it, and the trainer's log-probs would be those of another temperature"
        )
    return {
        "n": 1 if params.temperature == 0 else request.samples,
        "seed": first_seed(seed, window, request.slot),
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": list(params.stop),
        "stop_token_ids": list(eos_ids),
        "ignore_eos": True,  # the ids above are all that end a response
        "skip_special_tokens": False,  # stop strings see them, as in the embedded engine
        "logprobs": 0,  # those of the sampled tokens alone
    }


def completion_body(model: str, request: RolloutRequest, fields: dict[str, Any]) -> dict[str, Any]:
    """The body of a request to ``/v1/completions``."""
    return {
        "model": model,
        "prompt": list(request.prompt_ids),
        **fields,
        "stream": False,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "return_weight_versions": True,  # of vLLM 0.33; older servers ignore it
    }


def read_completion(
    content: bytes,
    request: RolloutRequest,
    params: SamplingParams,
    eos_ids: Sequence[int],
    vocabulary: int,
    version: str | None = None,
) -> list[Response]:
    """The responses in an answer of ``/v1/completions``, in order of samples.

    Args:
        content: the answer.
        request: what was asked.
        params: how.
        eos_ids: every id that ends a response.
        vocabulary: number of token ids.
        version: of the weights that must have drawn them, where the server says.

    Raises:
        DataError: anything that is missing, malformed, of another prompt or of other weights.
        ConfigError: responses cut at the server's context length.
    """
    where = f"vLLM's answer for the prompt of {request.record.source}"
    asked = 1 if params.temperature == 0 else request.samples
    try:
        choices = {choice["index"]: choice for choice in json.loads(content)["choices"]}
        if len(choices) != asked or set(choices) != set(range(asked)):
            raise ValueError(f"expected choices 0 to {asked - 1}, found {sorted(choices)}")
        rows = [_row(choices[i], request, version) for i in range(asked)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{where}: {type(error).__name__}: {error}; found {content[:200]!r}") from error
    checked = [check_response(*row, params, eos_ids, vocabulary, where) for row in rows]
    return checked * request.samples if params.temperature == 0 else checked


def _row(choice: dict[str, Any], request: RolloutRequest, version: str | None) -> tuple[list[int], list[float], str]:
    ids, logprobs, prompt = choice["token_ids"], choice["logprobs"], choice["prompt_token_ids"]
    if prompt != list(request.prompt_ids):
        raise ValueError("the response is to another prompt (prompt_token_ids)")
    if logprobs is None or ids is None:
        raise ValueError(f"expected token_ids and logprobs, found {type(ids).__name__} and {type(logprobs).__name__}")
    if [f"token_id:{token}" for token in ids] != logprobs["tokens"]:
        raise ValueError("logprobs.tokens are not those of token_ids")
    versions = {span["version"] for span in choice.get("weight_versions") or ()}
    if version is not None and versions - {version}:
        raise ValueError(
            f"drawn by weights of version {sorted(versions)}, expected {version!r}: someone else loads weights into this server"
        )
    return ids, logprobs["token_logprobs"], choice["finish_reason"]


def check_response(
    ids: Sequence[int],
    logprobs: Sequence[float],
    finish_reason: Any,
    params: SamplingParams,
    eos_ids: Sequence[int],
    vocabulary: int,
    where: str,
) -> Response:
    """A response whose tokens, log-probs and end agree with each other.

    Raises:
        DataError: they do not; ``where`` begins the message.
        ConfigError: the context length cut it.
    """
    if not 1 <= len(ids) <= params.max_new_tokens or not all(type(token) is int and 0 <= token < vocabulary for token in ids):
        raise DataError(f"{where}: expected 1 to {params.max_new_tokens} token ids in [0, {vocabulary}), found {str(list(ids))[:200]}")
    if len(logprobs) != len(ids) or not all(_is_logprob(value) for value in logprobs):
        raise DataError(f"{where}: expected a finite log-prob for each of {len(ids)} tokens, found {str(list(logprobs))[:200]}")
    if finish_reason not in ("stop", "length"):
        raise DataError(f"{where}: expected a response that ended or was cut (stop, length), found finish_reason {finish_reason!r}")
    ends = [i for i, token in enumerate(ids) if token in eos_ids]
    last = len(ids) - 1
    if ends not in ([], [last]) or (finish_reason == "stop" and ends != [last] and not params.stop):
        raise DataError(f"{where}: expected an end at its first end-of-sequence token, found one at {ends} of {len(ids)} tokens")
    if finish_reason == "length" and (ends or len(ids) < params.max_new_tokens):
        raise ConfigError(
            f"{where}: cut after {len(ids)} of {params.max_new_tokens} tokens; let vLLM's --max-model-len hold prompt and response"
        )
    return Response(ids, logprobs, finish_reason == "length")


def _is_logprob(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value) and value <= _ROUNDING
