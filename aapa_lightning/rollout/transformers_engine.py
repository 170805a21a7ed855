"""The default rollout engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from aapa_lightning.errors import ConfigError
from aapa_lightning.rollout.base import SamplingParams
from aapa_lightning.rollout.decoding import Drawn, can_decode, decode, local
from aapa_lightning.rollout.embedded import EmbeddedEngine
from aapa_lightning.rollout.lockstep import max_over_ranks


class TransformersEngine(EmbeddedEngine):
    """Decodes with the model being trained: each prompt is read once, and rows that have ended leave the batch.

    Raises:
        ConfigError: a model that ``decode`` does not know.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not can_decode(self.model):
            raise ConfigError(
                f"engine: transformers does not know the state that {type(self.model).__name__} keeps between tokens (recurrent, or rotary "
                "positions that change with length); use engine: generate"
            )

    def draw(self, prompts: list[list[int]], owners: list[int], keys: Tensor, params: SamplingParams, *, lockstep: bool) -> Drawn:
        """See ``decode``."""
        stops, pad = self.stops(params.stop), self.tokenizer.pad_token_id
        return decode(self.model, prompts, owners, keys, params, stops, pad, self._some_rank if lockstep else local)

    def _some_rank(self, going: bool) -> bool:
        return bool(max_over_ranks(int(going), self.model.device))
