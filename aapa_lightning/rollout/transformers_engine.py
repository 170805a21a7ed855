"""The embedded rollout engine: Hugging Face ``generate`` on the policy itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from aapa_lightning.rollout.base import RolloutEngine, RolloutRequest, SamplingParams
from aapa_lightning.rollout.sampling import filter_logits, gumbel_noise, row_keys
from aapa_lightning.rollout.text import decode_with_ends
from aapa_lightning.types import Rollouts, pad_right

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TransformersEngine(RolloutEngine):
    """Generates with the model being trained, in eval mode and without activation checkpointing, and restores both.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: its tokenizer.
        eos_ids: every id that ends a response.
        max_rows: rows generated at once; None for all. What is drawn does not depend on it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        *,
        max_rows: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.eos_ids = tuple(eos_ids)
        self.max_rows = max_rows
        self._criteria: dict[tuple[str, ...], Any] = {}

    @torch.no_grad()
    def generate(self, requests: Sequence[RolloutRequest], params: SamplingParams, *, seed: int, window: int) -> Rollouts:
        """Draw responses; see ``RolloutEngine.generate``."""
        rows = [(request, sample) for request in requests for sample in range(request.samples)]
        keys = row_keys(seed, window, [(request.slot, sample) for request, sample in rows])
        step = self.max_rows or max(len(rows), 1)
        drawn: list[tuple[list[int], list[float], bool]] = []
        with _generation_mode(self.model):
            for start in range(0, len(rows), step):
                prompts = [list(request.prompt_ids) for request, _ in rows[start : start + step]]
                drawn += self._generate_rows(prompts, keys[start : start + step], params)
        return self._collate([request for request, _ in rows], drawn)

    def _generate_rows(self, prompts: list[list[int]], keys: Tensor, params: SamplingParams) -> list[tuple[list[int], list[float], bool]]:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        device = self.model.device
        prompt_ids, prompt_mask = _pad_left(prompts, self.tokenizer.pad_token_id)
        sampler = _RowSampler(keys.to(device), params)
        stops = _RowStops(self.eos_ids, self._stop_strings(params.stop), len(prompts), prompt_ids.shape[1], device)
        generate: Any = self.model.generate  # a mixin's method that the stubs take for a tensor
        sequences = generate(
            input_ids=prompt_ids.to(device),
            attention_mask=prompt_mask.to(device),
            generation_config=GenerationConfig(
                do_sample=False,  # the sampler has already drawn: the argmax of its scores is the sample
                max_new_tokens=params.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=None,
            ),
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([stops]),
            synced_gpus=_is_sharded(self.model),
        )
        response = sequences[:, prompt_ids.shape[1] :].cpu()
        logprobs = sampler.logprobs().cpu()
        lengths = stops.lengths(response.shape[1])
        ended = stops.ended.cpu()
        return [
            (response[i, :length].tolist(), logprobs[i, :length].tolist(), not bool(ended[i])) for i, length in enumerate(lengths.tolist())
        ]

    def _stop_strings(self, stop: Sequence[str]) -> Any:
        """The criterion of stop strings, or None. Kept, since it matches them to the whole vocabulary when it is made."""
        key = tuple(stop)
        if key and key not in self._criteria:
            from transformers import StopStringCriteria

            self._criteria[key] = StopStringCriteria(self.tokenizer, list(key))
        return self._criteria.get(key)

    def _collate(self, requests: list[RolloutRequest], drawn: list[tuple[list[int], list[float], bool]]) -> Rollouts:
        pad, device = self.tokenizer.pad_token_id, self.model.device
        prompt_ids, prompt_mask = _pad_left([list(request.prompt_ids) for request in requests], pad)
        response_ids = pad_right([ids for ids, _, _ in drawn], pad)
        lengths = torch.tensor([len(ids) for ids, _, _ in drawn], dtype=torch.int64)
        logprobs = torch.zeros(response_ids.shape)
        ends = torch.zeros(response_ids.shape, dtype=torch.int64)
        texts = []
        for i, (ids, values, _) in enumerate(drawn):
            text, text_ends = decode_with_ends(self.tokenizer, ids)
            texts.append(text)
            logprobs[i, : len(ids)] = torch.tensor(values)
            ends[i, : len(ids)] = torch.tensor(text_ends, dtype=torch.int64)
        return Rollouts(
            prompt_ids=prompt_ids.to(device),
            prompt_mask=prompt_mask.to(device),
            response_ids=response_ids.to(device),
            response_mask=(torch.arange(response_ids.shape[1]) < lengths[:, None]).to(device),
            truncated=torch.tensor([truncated for _, _, truncated in drawn], dtype=torch.bool, device=device),
            group_ids=torch.tensor([request.slot for request in requests], dtype=torch.int64, device=device),
            engine_logprobs=logprobs.to(device),
            token_ends=ends.to(device),
            texts=texts,
            records=[request.record for request in requests],
        )


class _RowSampler:
    """Logits processor: temperature, top-k, top-p, row-keyed noise. Remembers the log-prob of what will be drawn."""

    def __init__(self, keys: Tensor, params: SamplingParams) -> None:
        self.keys = keys
        self.params = params
        self._columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.float()
        if self.params.temperature > 0:
            logits = logits / self.params.temperature
            noisy = filter_logits(logits, self.params.top_p, self.params.top_k)
            noisy = noisy + gumbel_noise(self.keys, len(self._columns), logits.shape[-1])
        else:
            noisy = logits
        drawn = noisy.argmax(-1, keepdim=True)
        self._columns.append(logits.gather(-1, drawn).squeeze(-1) - logits.logsumexp(-1))
        return noisy

    def logprobs(self) -> Tensor:
        """float32 ``[B, steps]``; columns after the end of a row mean nothing."""
        return torch.stack(self._columns, -1)


class _RowStops:
    """Stopping criterion: EOS ids and stop strings. Remembers where each row ended, so that no mask is ever read off ids."""

    def __init__(self, eos_ids: Sequence[int], strings: Any, rows: int, prompt_length: int, device: torch.device) -> None:
        # transformers pads finished rows only where a criterion has this attribute
        self.eos_token_id = torch.tensor(eos_ids, dtype=torch.int64, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self._prompt_length = prompt_length
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._strings = strings

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = torch.isin(input_ids[:, -1], self.eos_token_id)
        if self._strings is not None:
            # the response alone: a prompt's last characters must not complete a stop string
            done = done | self._strings(input_ids[:, self._prompt_length :], scores)
        self._lengths[done & ~self.ended] = input_ids.shape[1] - self._prompt_length
        self.ended |= done
        return self.ended

    def lengths(self, generated: int) -> Tensor:
        """int64 ``[B]``: where a row ended, or everything that was generated."""
        return torch.where(self.ended, self._lengths, generated).cpu()


def _pad_left(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Token rows as int64 ``[B, P]`` padded on the left, and the mask, bool ``[B, P]``."""
    ids = pad_right([row[::-1] for row in rows], value).flip(-1)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    width = ids.shape[1]
    return ids, torch.arange(width) >= width - lengths[:, None]


def _is_sharded(model: nn.Module) -> bool:
    """True when ranks must call the model equally often (FSDP2, tensor parallel, ZeRO-3)."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


@contextmanager
def _generation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, no checkpointing (it forces the cache off) and no generation defaults; all put back, also after an exception.

    ``generate`` fills options that are not set from the model's generation config. Chat models ship some that change the distribution
    (a repetition penalty), and then the trainer's forward is no longer what was sampled from.
    """
    from transformers import GenerationConfig

    # under an adapter the config belongs to the model inside
    defaults = [(module, module.generation_config) for module in model.modules() if "generation_config" in vars(module)]
    for module, _ in defaults:
        module.generation_config = GenerationConfig()  # type: ignore[assignment]  # a plain attribute of Hugging Face models
    training = [module for module in model.modules() if module.training]
    checkpointing = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    model.eval()
    for module in checkpointing:
        module.gradient_checkpointing = False  # type: ignore[assignment]  # a plain attribute of Hugging Face layers
    try:
        yield
    finally:
        for module, config in defaults:
            module.generation_config = config
        for module in training:
            module.training = True
        for module in checkpointing:
            module.gradient_checkpointing = True  # type: ignore[assignment]  # as above
