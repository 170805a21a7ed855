"""Engines by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from aapa_lightning.rollout.base import EngineFactory, RolloutEngine
from aapa_lightning.rollout.transformers_engine import TransformersEngine

EngineName = Literal["auto", "transformers"]


def build_engine(
    choice: EngineName | EngineFactory, model: Any, tokenizer: Any, eos_ids: Sequence[int], max_rows: int | None
) -> RolloutEngine:
    """The engine that ``choice`` stands for.

    Args:
        choice: a name, or a factory.
        model: the policy.
        tokenizer: its tokenizer.
        eos_ids: every id that ends a response.
        max_rows: responses that an embedded engine generates at once; None for all.
    """
    if callable(choice):
        return choice(model, tokenizer, eos_ids)
    return TransformersEngine(model, tokenizer, eos_ids, max_rows=max_rows)
