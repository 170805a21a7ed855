"""Continuous batching by transformers' ``generate_batch``: a paged cache, and new rows in the place of those that ended."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from aapa_lightning.errors import ConfigError
from aapa_lightning.rollout.base import SamplingParams
from aapa_lightning.rollout.decoding import Drawn
from aapa_lightning.rollout.embedded import EmbeddedEngine
from aapa_lightning.types import pad_right

#: Tokens of a page of the cache.
_PAGE = 64


class ContinuousEngine(EmbeddedEngine):
    """Generates by ``model.generate_batch``, which shares the cache of equal prompts and keeps a GPU full when lengths differ much.

    It draws its own noise: what is drawn depends on how rows fell into batches, so a run repeats itself at temperature 0 alone, and a
    resumed run goes on with other responses. Log-probs are transformers' own, at the temperature and behind top-p and top-k.

    Args:
        *args: see ``EmbeddedEngine``.
        options: further arguments of transformers' ``ContinuousBatchingConfig``, such as ``max_batch_tokens``.
        **kwargs: see ``EmbeddedEngine``.
    """

    def __init__(self, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options = options or {}

    def draw(self, prompts: list[list[int]], owners: list[int], keys: Tensor, params: SamplingParams, *, lockstep: bool) -> Drawn:
        """See ``EmbeddedEngine.draw``.

        Raises:
            ConfigError: stop strings, or weights that ranks share and cannot gather.
            RuntimeError: responses that do not come back.
        """
        from transformers import ContinuousBatchingConfig, GenerationConfig

        if params.stop:
            raise ConfigError(f"sampling.stop: continuous batching takes none, found {list(params.stop)}; use engine: transformers")
        if lockstep:
            raise ConfigError("engine: continuous needs whole weights on every rank, found shards (ZeRO-3, or gather: false)")
        sampled = params.temperature > 0
        generation = GenerationConfig(
            max_new_tokens=params.max_new_tokens,
            do_sample=sampled,
            temperature=params.temperature if sampled else None,
            top_p=params.top_p if sampled else None,
            top_k=params.top_k if sampled else None,
            eos_token_id=list(self.eos_ids) or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        seed = int(keys[0]) & 0x7FFFFFFF
        # left to itself it takes most of the memory that is free
        pages = sum(math.ceil((len(prompts[owner]) + params.max_new_tokens) / _PAGE) for owner in owners)
        page = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"  # its name before transformers 5.17
        options = {page: _PAGE, "num_blocks": pages + 1} | self.options
        batching = ContinuousBatchingConfig(return_logprobs=True, seed=seed, **options)
        generate: Any = self.model.generate_batch
        with torch.random.fork_rng(devices=[keys.device] if keys.device.type == "cuda" else []):
            found = generate([prompts[owner] for owner in owners], generation_config=generation, continuous_batching_config=batching)
        return self._drawn(found, len(owners), keys.device)

    def _drawn(self, found: dict[str, Any], rows: int, device: torch.device) -> Drawn:
        # they come back as they end; their names count them in the order that they were asked for
        outputs = [found[name] for name in sorted(found, key=lambda name: int(name.rpartition("_")[2]))]
        failed = [output.error for output in outputs if output.error]
        if failed or len(outputs) != rows:
            raise RuntimeError(f"generate_batch: expected {rows} responses, found {len(outputs)}; {failed[:1] or 'the others got lost'}")
        tokens = [output.generated_tokens for output in outputs]
        ids = pad_right(tokens, self.tokenizer.pad_token_id)
        logprobs = torch.zeros(ids.shape)
        for i, output in enumerate(outputs):
            logprobs[i, : len(tokens[i])] = torch.tensor(output.logprobs[: len(tokens[i])])
        return Drawn(
            ids.to(device),
            logprobs.to(device),
            torch.tensor([len(row) for row in tokens], device=device),
            torch.tensor([bool(row) and row[-1] in self.eos_ids for row in tokens], device=device),
        )
