"""Log-probs from inside a model's own forward: for the time of a call the LM head answers with log-probs instead of logits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aapa_lightning.errors import MissingDependencyError, choose
from aapa_lightning.logprobs.chunked import Cap, chunked_logprobs, product_dtype
from aapa_lightning.logprobs.tokens import token_logprobs

#: ``auto`` streams vocabularies from this size on: below it, logits cost little memory and one product is faster than tiles.
LARGE_VOCABULARY = 16_384
#: Logits that a head of an unknown kind (adapters, quantised) makes at once: 128 MiB in float32.
_LOGITS_AT_ONCE = 2**25
#: What the head answers beside scores, to see what its model makes of it.
_PROBE = (-30.0, -8.0, -0.25, 0.25, 1.0, 8.0, 30.0)
#: What a model does to its head's output, once seen, or why its head cannot be used.
_SEEN: WeakKeyDictionary[nn.Module, Cap | str] = WeakKeyDictionary()
BACKENDS = {"auto": "auto", "full": "full", "chunked": "chunked", "liger": "liger"}


def set_logprob_backend(model: nn.Module, backend: str) -> None:
    """Choose how log-probs of a model are computed from now on; copies of it keep the choice.

    Args:
        model: a causal language model, wrapped or not.
        backend: ``auto``, ``full``, ``chunked`` or ``liger``, see ``aapa_lightning.logprobs.response_logprobs``.

    Raises:
        ConfigError: no such backend.
        MissingDependencyError: ``liger`` without the package.
    """
    inner: Any = causal_model(model)
    inner.aapa_logprob_backend = check_backend(backend)


def check_backend(name: str) -> str:
    """The name, where it can be used.

    Raises:
        ConfigError: no such backend.
        MissingDependencyError: ``liger`` without the package.
    """
    choose(BACKENDS, name, "logprob_backend")
    if name == "liger":
        _liger()
    return name


def _liger() -> Any:
    try:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction
    except ImportError as error:
        raise MissingDependencyError(
            "logprob_backend=liger: expected the package liger-kernel, 0.8.2 or newer, found none or an older one; "
            "pip install 'liger-kernel>=0.8.2', or use chunked, which needs nothing"
        ) from error
    return LigerFusedLinearScaledCrossEntropyFunction


def causal_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside Fabric's, DDP's, torch.compile's and peft's wrappers."""
    *_, inner = _wrappers(model)
    base: Any = getattr(inner, "get_base_model", None)
    return inner if base is None else base()


def _wrappers(model: nn.Module) -> Iterator[nn.Module]:
    yield model
    for name in ("_forward_module", "module", "_orig_mod"):
        if hasattr(model, name):
            model = getattr(model, name)
            yield model


def compiled(model: nn.Module) -> bool:
    """Whether torch.compile has compiled the model or a wrapper of it."""
    return any(getattr(part, "_orig_mod", getattr(part, "_compiled_call_impl", None)) is not None for part in _wrappers(model))


def streaming_backend(model: nn.Module, backend: str | None) -> str | None:
    """``chunked`` or ``liger`` where a model's log-probs come from its head, None where they come from its logits.

    Raises:
        ConfigError: no such backend.
        MissingDependencyError: ``liger`` without the package.
    """
    inner = causal_model(model)
    chosen: Any = getattr(inner, "aapa_logprob_backend", "auto") if backend is None else backend
    name = check_backend(chosen)
    if name == "full" or isinstance(_SEEN.get(inner), str):
        return None
    size = vocabulary(inner)
    if name == "auto" and size < LARGE_VOCABULARY:
        return None
    listed = getattr(text_config(inner), "vocab_size", size)
    # A model that cuts entries off its head's output would do so after the log-probs, too late.
    problem = None if size == listed else f"its head has {size} entries, its config says {listed}"
    if not size:
        problem = "it shows no LM head (get_output_embeddings) or no vocabulary size"
    if compiled(model):
        problem = "torch.compile has compiled it with its head"
    if problem:
        refuse(inner, problem)
        return None
    return "chunked" if name == "auto" else name


def vocabulary(inner: Any) -> int:
    """Entries of a model's head; 0 when it has no head, or does not tell."""
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    size = getattr(head, "out_features", None) or getattr(text_config(inner), "vocab_size", None)
    return size if isinstance(head, nn.Module) and isinstance(size, int) else 0


def text_config(inner: Any) -> Any:
    """The config of a model's language part, or None."""
    config: Any = getattr(inner, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def seen(model: nn.Module) -> bool:
    """Whether a model has been called before, and what it does to its logits is known."""
    return causal_model(model) in _SEEN


def refuse(inner: nn.Module, reason: str) -> None:
    """Remember, and say once, why a model's log-probs come from full logits."""
    _SEEN[inner] = reason
    name = type(inner).__name__
    warnings.warn(f"log-probs of {name} are computed from full logits, which need more memory: {reason}", stacklevel=2)


@contextmanager
def head_answers(head: Any, answer: Callable[[Any, Tensor], Tensor]) -> Iterator[None]:
    """For a while, a head's forward is ``answer(forward, hidden)``; the hooks around it stay."""
    own, original = head.__dict__.get("forward"), head.forward
    head.forward = lambda hidden: answer(original, hidden)
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


@dataclass(slots=True)
class HeadScorer:
    """What stands in for a model's head during one call.

    Args:
        inner: the causal language model.
        backend: ``chunked`` or ``liger``.
        ids: int64 ``[N, K]``, the last tokens of each row.
        wanted: bool ``[N, K]``, those to score.
        temperature: positive, or 0 for 1.
        entropy: also score entropies.
        entropy_grad: they carry a gradient.
    """

    inner: Any
    backend: str
    ids: Tensor
    wanted: Tensor
    temperature: float
    entropy: bool
    entropy_grad: bool
    scores: Tensor | None = None
    problem: str | None = None
    cap: Cap = field(init=False)
    _rows: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # Before the model runs: counting the rows waits for the device, which has nothing else to do yet.
        found = _SEEN.get(self.inner)
        self.cap = found if isinstance(found, Cap) else Cap()
        self._rows = self.wanted.reshape(-1).nonzero().squeeze(1)

    def in_place(self) -> AbstractContextManager[None]:
        """Let the head answer calls with scores ``[N, K, C]``, inside the hooks of FSDP2, DDP and precision plugins."""
        head: Any = self.inner.get_output_embeddings()
        hooked = "forward" in head.__dict__
        return head_answers(head, lambda original, hidden: self._answer(head, original, hooked, hidden))

    def _answer(self, head: Any, original: Any, hooked: bool, hidden: Tensor) -> Tensor:
        plain = not hooked and type(head).forward is nn.Linear.forward
        self.problem = self._misfit(head, hidden, plain)
        if self.problem:
            logits: Tensor = original(hidden)
            return logits
        rows, width = self._rows.to(hidden.device), max(self.ids.shape[1], 1)
        # The state before a token predicts it; the last state predicts nothing.
        states = hidden[rows // width, rows % width + hidden.shape[1] - self.ids.shape[1] - 1]
        ids = self.ids.to(hidden.device).reshape(-1)[rows]
        score = self._by_tiles if plain else self._by_tokens
        values = [value for value in score(head, original, states, ids) if value is not None]
        columns = [value.new_zeros(self.ids.numel()).index_copy(0, rows, value) for value in values]
        self.scores = torch.stack(columns, dim=-1).view(*self.ids.shape, len(columns))
        # One position more than is scored, so that the probe is there without any response token too.
        answer = nn.functional.pad(self.scores, (0, 0, 0, 1))
        return torch.cat((answer, answer.new_tensor(_PROBE).expand(*answer.shape[:2], -1)), dim=-1)

    def _misfit(self, head: Any, hidden: Tensor, plain: bool) -> str | None:
        rows, keep = self.ids.shape[0], self.ids.shape[1] + 1
        if self.scores is not None:
            return "its head is called more than once"
        if hidden.dim() != 3 or hidden.shape[0] != rows or hidden.shape[1] < keep:
            return f"its head is called with {list(hidden.shape)}, expected [{rows}, {keep} or more, H]"
        whole = not plain or (head.weight.shape == (head.out_features, head.in_features) and not hasattr(head.weight, "full_tensor"))
        return None if whole else "its head is split over ranks"

    def _by_tiles(self, head: Any, original: Any, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.backend == "liger" and head.bias is None and self.cap.cap is None and len(ids):
            return self._by_liger(head.weight, states, ids)
        return chunked_logprobs(
            states,
            head.weight,
            ids,
            bias=head.bias,
            temperature=self.temperature,
            cap=self.cap,
            entropy=self.entropy,
            entropy_grad=self.entropy_grad,
        )

    def _by_liger(self, weight: Tensor, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        dtype = product_dtype(states, weight)
        temperature = (self.temperature or 1.0) / self.cap.scale
        with torch.autocast(states.device.type, enabled=False):
            found = _liger().apply(states.to(dtype), weight.to(dtype), ids, temperature, return_entropy=self.entropy)
        if not self.entropy:
            return -found, None
        return -found[0], found[1].float() if self.entropy_grad else found[1].detach().float()

    def _by_tokens(self, head: Any, original: Any, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of a head that only its own forward knows (adapters, quantised weights): whole logits, a few tokens at a time, made twice."""

        def score(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
            logits = self.cap(original(states))
            return token_logprobs(logits, ids, self.temperature, entropy=self.entropy, entropy_grad=self.entropy_grad)

        size = max(_LOGITS_AT_ONCE // vocabulary(self.inner), 1)
        parts = [checkpoint(score, *part, use_reentrant=False) for part in zip(states.split(size), ids.split(size), strict=True)]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies) if self.entropy else None

    def read(self, output: Tensor) -> Tensor | None:
        """Scores ``[N, K, C]`` from the model's output, or None where it has to run again: see ``problem``, or its cap is now known."""
        found = self._cap_seen(output)
        if isinstance(found, str) or self.scores is None:
            self.problem = str(found)
            refuse(self.inner, self.problem)
            return None
        _SEEN[self.inner] = found
        if found != self.cap:
            return None
        # Through the output where it is untouched, so that whatever watches it (DDP's reducer) sees the graph.
        untouched = self.cap == Cap() and output.dtype == self.scores.dtype
        if untouched:
            return output[:, :-1, : self.scores.shape[-1]]
        # A zero of the output's graph: FSDP2 gathers the head's weight again when a gradient reaches the output.
        return self.scores + output[:, :-1, :1].to(self.scores.dtype) * 0.0

    def _cap_seen(self, output: Tensor) -> Cap | str:
        if self.scores is None or self.problem:
            return self.problem or "its head is not called"
        rows, columns, width = self.scores.shape
        expected = [rows, columns + 1, width + len(_PROBE)]
        if list(output.shape) != expected:
            return f"its output is {list(output.shape)}, expected {expected}"
        if self.inner in _SEEN:
            return self.cap
        found = observed_cap(output[0, 0, width:].detach(), getattr(text_config(self.inner), "final_logit_softcapping", None))
        return found or "it changes its head's output in an unknown way"


def observed_cap(answer: Tensor, softcap: float | None) -> Cap | None:
    """What turned the probe into ``answer``: nothing, a scale, a cap of ``softcap``, or None for something else."""
    probe = answer.new_tensor(_PROBE).double()
    at_one = float(answer[_PROBE.index(1.0)])
    for cap in (None, softcap) if softcap else (None,):
        if cap is not None and abs(at_one) >= cap:
            continue
        scale = at_one if cap is None else cap * math.atanh(at_one / cap)
        guess = Cap(1.0 if math.isclose(scale, 1.0, rel_tol=1e-4) else scale, cap)
        if torch.allclose(guess(probe), answer.double(), rtol=1e-3, atol=1e-6):
            return guess
    return None
