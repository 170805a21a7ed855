"""Engines by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from aapa_lightning.errors import COUNT, check_numbers
from aapa_lightning.rollout.base import EngineFactory, RolloutEngine
from aapa_lightning.rollout.continuous_engine import ContinuousEngine
from aapa_lightning.rollout.decoding import can_decode
from aapa_lightning.rollout.embedded import EmbeddedEngine
from aapa_lightning.rollout.generate_engine import GenerateEngine
from aapa_lightning.rollout.replica import ReplicaEngine
from aapa_lightning.rollout.transformers_engine import TransformersEngine

EngineName = Literal["auto", "transformers", "generate", "static", "continuous", "replica", "vllm"]


def _auto(model: Any, *args: Any, **kwargs: Any) -> RolloutEngine:
    # the fastest that was measured; ``benchmarks/rollouts.py`` measures the others beside it
    return (TransformersEngine if can_decode(model) else GenerateEngine)(model, *args, **kwargs)


def _static(*args: Any, **kwargs: Any) -> RolloutEngine:
    return GenerateEngine(*args, cache="static", **kwargs)


def _vllm(*args: Any, max_rows: int | None = None) -> RolloutEngine:
    from aapa_lightning.rollout.vllm_colocated import VLLMEngine

    return VLLMEngine(*args)


#: What each name stands for: from model, tokenizer, EOS ids and ``max_rows`` to an engine.
ENGINES: dict[EngineName, Callable[..., RolloutEngine]] = {
    "auto": _auto,
    "transformers": TransformersEngine,
    "generate": GenerateEngine,
    "static": _static,
    "continuous": ContinuousEngine,
    "replica": ReplicaEngine,
    "vllm": _vllm,
}


def build_engine(
    choice: EngineName | EngineFactory, model: Any, tokenizer: Any, eos_ids: Sequence[int], max_rows: int | None = None
) -> RolloutEngine:
    """The engine that ``choice`` stands for.

    Args:
        choice: a name out of ``ENGINES``, or a factory.
        model: the policy.
        tokenizer: its tokenizer.
        eos_ids: every id that ends a response.
        max_rows: responses that an embedded engine generates at once; None for all.
    """
    if callable(choice):
        engine = choice(model, tokenizer, eos_ids)
        if isinstance(engine, EmbeddedEngine):
            check_numbers({"max_rows": engine.max_rows}, {"max_rows": COUNT}, "engine.")
            engine.max_rows = engine.max_rows or max_rows
        return engine
    return ENGINES[choice](model, tokenizer, eos_ids, max_rows=max_rows)
