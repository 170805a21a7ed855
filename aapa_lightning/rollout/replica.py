"""An engine with a copy of the policy, which may draw while the policy is trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from aapa_lightning.errors import ConfigError
from aapa_lightning.rollout.base import RolloutEngine, RolloutRequest, SamplingParams
from aapa_lightning.rollout.transformers_engine import TransformersEngine
from aapa_lightning.sharding import is_sharded, shard_units
from aapa_lightning.types import Rollouts


class ReplicaEngine(RolloutEngine):
    """Generates as ``TransformersEngine`` does, with a copy of the model that ``sync`` brings up to date.

    For asynchronous rollouts without a server: it takes the memory of the trained weights once more; frozen ones (under adapters, the base
    model) are shared. Log-probs are those of the weights at the last ``sync``.

    Args:
        model: the policy; whole on this rank.
        tokenizer: its tokenizer.
        eos_ids: every id that ends a response.
        max_rows: rows generated at once; None for all.
    """

    own_weights = True

    def __init__(self, model: Any, tokenizer: Any, eos_ids: Sequence[int], *, max_rows: int | None = None) -> None:
        self._source, self._tokenizer, self._eos_ids, self._max_rows = model, tokenizer, eos_ids, max_rows
        self._engine: TransformersEngine | None = None

    def check_training(self) -> None:
        """Raise ConfigError where the policy lies in shards."""
        if is_sharded(self._source) or shard_units(self._source):  # gathered for the moment, or not
            raise ConfigError("engine: replica needs whole weights on every rank, found shards; use vllm or a vLLM server")

    def check_lengths(self, prompt: int, response: int) -> None:
        """See ``EmbeddedEngine.check_lengths``."""
        TransformersEngine(self._source, self._tokenizer, self._eos_ids).check_lengths(prompt, response)

    @torch.no_grad()
    def sync(self, step: int) -> None:
        """Copy the policy's weights, whatever the step: they may have been exchanged within it, for a validation.

        Raises:
            ConfigError: they lie in shards.
        """
        self.check_training()
        if self._engine is None:
            # made here and not at the start, when the policy was not yet on its device
            frozen: dict[int, Any] = {id(p): p for p in self._source.parameters() if not p.requires_grad}
            model = copy.deepcopy(self._source, frozen).eval().requires_grad_(False)
            self._engine = TransformersEngine(model, self._tokenizer, self._eos_ids, max_rows=self._max_rows)
            return
        for mine, current in zip(self._engine.model.parameters(), self._source.parameters(), strict=True):
            if mine is not current:
                mine.copy_(current)

    def generate(self, requests: Sequence[RolloutRequest], params: SamplingParams, *, seed: int, window: int) -> Rollouts:
        """Draw responses; see ``RolloutEngine.generate``."""
        if self._engine is None:
            raise RuntimeError("generate before the first sync")
        return self._engine.generate(requests, params, seed=seed, window=window)

    def close(self) -> None:
        """Drop the copy."""
        self._engine = None
