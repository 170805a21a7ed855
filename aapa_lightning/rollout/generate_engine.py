"""Hugging Face's own ``generate`` as a rollout engine: for models that ``decode`` does not know, and for static caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from aapa_lightning.rollout.base import SamplingParams
from aapa_lightning.rollout.decoding import Drawn
from aapa_lightning.rollout.embedded import EmbeddedEngine
from aapa_lightning.rollout.rows import Stops, perturb
from aapa_lightning.types import pad_left


class GenerateEngine(EmbeddedEngine):
    """Generates by ``model.generate``. It reads a prompt for each of its responses, and every row stays to the end of the longest.

    Args:
        *args: see ``EmbeddedEngine``.
        cache: ``dynamic``, or ``static``: keys and values of fixed size, under which transformers compiles the forward on CUDA, with CUDA
            graphs. Experimental: never run on a GPU.
        **kwargs: see ``EmbeddedEngine``.
    """

    def __init__(self, *args: Any, cache: Literal["dynamic", "static"] = "dynamic", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cache = cache

    def draw(self, prompts: list[list[int]], owners: list[int], keys: Tensor, params: SamplingParams, *, lockstep: bool) -> Drawn:
        """See ``EmbeddedEngine.draw``."""
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        pad = self.tokenizer.pad_token_id
        prompt_ids, prompt_mask = (part.to(keys.device) for part in pad_left([prompts[owner] for owner in owners], pad))
        sampler = _Sampler(keys, params)
        ends = _Ends(self.stops(params.stop), self.eos_ids, len(owners), prompt_ids.shape[1], keys.device)
        generate: Any = self.model.generate  # a mixin's method that the stubs take for a tensor
        sequences = generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            generation_config=GenerationConfig(
                do_sample=False,  # the sampler has already drawn: the argmax of its scores is the sample
                max_new_tokens=params.max_new_tokens,
                pad_token_id=pad,
                eos_token_id=None,
                cache_implementation=None if self.cache == "dynamic" else self.cache,
            ),
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([ends]),
            synced_gpus=lockstep,
        )
        ids = sequences[:, prompt_ids.shape[1] :]
        lengths = torch.where(ends.ended, ends.lengths, ids.shape[1])
        return Drawn(ids, torch.stack(sampler.logprobs, -1), lengths, ends.ended)


class _Sampler:
    """Logits processor: row-keyed draws. Remembers their log-probs."""

    def __init__(self, keys: Tensor, params: SamplingParams) -> None:
        self.keys, self.params = keys, params
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noisy, _, logprobs = perturb(scores, self.keys, len(self.logprobs), self.params)
        self.logprobs.append(logprobs)
        return noisy


class _Ends:
    """Stopping criterion that remembers where each row ended."""

    def __init__(self, stops: Stops, eos_ids: Sequence[int], rows: int, prompt_length: int, device: torch.device) -> None:
        # transformers pads finished rows only where a criterion has this attribute
        self.eos_token_id = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._stops, self._prompt_length = stops, prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = self._stops(input_ids[:, self._prompt_length :]) & ~self.ended
        self.lengths = torch.where(done, input_ids.shape[1] - self._prompt_length, self.lengths)
        self.ended = self.ended | done
        return self.ended
