"""What engines share that generate with the very model in training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aapa_lightning.errors import ConfigError
from aapa_lightning.logprobs.head import causal_model, vocabulary
from aapa_lightning.logprobs.inputs import forget_lengths, learned_positions, padded_inputs, rotary_limit
from aapa_lightning.logprobs.padding import sees_padding
from aapa_lightning.rollout.base import RolloutEngine, RolloutRequest, SamplingParams
from aapa_lightning.rollout.collate import Response, collate
from aapa_lightning.rollout.lockstep import can_gather, max_over_ranks
from aapa_lightning.rollout.rows import Stops
from aapa_lightning.rollout.sampling import row_keys
from aapa_lightning.sharding import gathered_parameters, is_sharded
from aapa_lightning.types import Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from aapa_lightning.rollout.decoding import Drawn


class EmbeddedEngine(RolloutEngine):
    """Generates with the model being trained, in eval mode and without activation checkpointing, and restores both.

    Args:
        model: a Hugging Face causal LM.
        tokenizer: its tokenizer.
        eos_ids: every id that ends a response.
        max_rows: rows generated at once; None for all. What is drawn does not depend on it.
        gather: hold the weights of a sharded model whole on every rank while it generates, so that ranks need not wait for each other at
            every token. False keeps the shards: less memory, and a gather of every layer for every token. ZeRO-3 always keeps them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: Sequence[int],
        *,
        max_rows: int | None = None,
        gather: bool = True,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.eos_ids = tuple(eos_ids)
        self.max_rows = max_rows
        self.gather = gather
        self._stops: dict[tuple[str, ...], Stops] = {}

    @abstractmethod
    def draw(self, prompts: list[list[int]], owners: list[int], keys: Tensor, params: SamplingParams, *, lockstep: bool) -> Drawn:
        """Draw a response for every row.

        Args:
            prompts: token ids.
            owners: the prompt of each row.
            keys: int64 ``[B]`` on the model's device, the noise of each row.
            params: how.
            lockstep: ranks run the model equally often.
        """

    @torch.no_grad()
    def generate(self, requests: Sequence[RolloutRequest], params: SamplingParams, *, seed: int, window: int) -> Rollouts:
        """Draw responses; see ``RolloutEngine.generate``.

        Raises:
            ConfigError: a prompt and its response may need more positions than the model has learned, or than it turns alike.
        """
        self._check_positions(requests, params)
        rows = [(request, sample) for request in requests for sample in range(request.samples)]
        keys = row_keys(seed, window, [(request.slot, sample) for request, sample in rows]).to(self.model.device)
        lockstep = is_sharded(self.model) and not (self.gather and can_gather(self.model))
        responses: dict[int, Response] = {}
        with nullcontext() if lockstep else gathered_parameters(self.model), generation_mode(self.model):
            parts = self._parts([len(request.prompt_ids) for request, _ in rows])
            # agreed on before the first of them: ranks that ask in the middle would wait for those that draw
            turns = max_over_ranks(len(parts), self.model.device) if lockstep else len(parts)
            for part in parts:
                # requests are told apart by themselves: two may have equal slots
                chosen = {id(rows[i][0]): rows[i][0] for i in part}
                place = {key: i for i, key in enumerate(chosen)}
                prompts = [list(request.prompt_ids) for request in chosen.values()]
                owners = [place[id(rows[i][0])] for i in part]
                drawn = self.draw(prompts, owners, keys[torch.tensor(part, device=keys.device)], params, lockstep=lockstep)
                responses |= zip(part, _responses(drawn), strict=True)
            self._keep_company(turns - len(parts), params)
        return collate([request for request, _ in rows], [responses[i] for i in range(len(rows))], self.tokenizer, self.model.device)

    def _parts(self, lengths: list[int]) -> list[list[int]]:
        """Rows that are drawn together: as many as may be, of one length where the model sees padding."""
        inner, device = causal_model(self.model), self.model.device
        forget_lengths(inner)  # rotary positions of a longer row that was scored

        def read(ids: Tensor, mask: Tensor) -> Tensor:
            logits: Tensor = self.model(**padded_inputs(self.model, ids, mask)).logits
            return logits

        # ranks of a sharded model try it together, whatever their prompts
        ragged = len(set(lengths)) > 1 or is_sharded(self.model)
        apart = ragged and sees_padding(self.model, read, vocabulary(inner) or len(self.tokenizer), device, "left")
        groups: dict[int, list[int]] = {}
        for i, length in enumerate(lengths):
            groups.setdefault(length if apart else 0, []).append(i)
        most = self.max_rows or max(len(lengths), 1)
        return [group[start : start + most] for group in groups.values() for start in range(0, len(group), most)]

    def _keep_company(self, turns: int, params: SamplingParams) -> None:
        """Run the model while another rank has rows."""
        for _ in range(turns):
            key = torch.zeros(1, dtype=torch.int64, device=self.model.device)
            self.draw([[self.tokenizer.pad_token_id]], [0], key, params, lockstep=True)

    def check_lengths(self, prompt: int, response: int) -> None:
        """Raise ConfigError where rotary positions that change with length would turn within a row that is being drawn.

        Keys in the cache would keep the turn of shorter rows, which no forward pass over a whole row has.
        """
        limit = rotary_limit(causal_model(self.model))
        if limit is not None and prompt + response > limit:
            raise ConfigError(
                f"sampling.max_new_tokens: expected a prompt and its response within {limit} tokens, beyond which the rotary positions of "
                f"{type(causal_model(self.model)).__name__} change with length (`dynamic`, `longrope`), found up to {prompt} + {response}; "
                "lower it, or prompt_format.max_prompt_tokens"
            )

    def _check_positions(self, requests: Sequence[RolloutRequest], params: SamplingParams) -> None:
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        self.check_lengths(longest, params.max_new_tokens)
        limit = learned_positions(causal_model(self.model))
        if limit is not None and longest + params.max_new_tokens > limit:
            raise ConfigError(
                f"sampling.max_new_tokens: expected a prompt and its response within the {limit} positions that the model has learned, "
                f"found {longest} + {params.max_new_tokens}; lower it, or prompt_format.max_prompt_tokens"
            )

    def stops(self, strings: Sequence[str]) -> Stops:
        """What ends a row. Kept, since stop strings are matched to the whole vocabulary when it is made."""
        key = tuple(strings)
        if key not in self._stops:
            self._stops[key] = Stops(self.eos_ids, self.tokenizer, key, self.model.device)
        return self._stops[key]


def _responses(drawn: Drawn) -> list[Response]:
    ids, logprobs, lengths = drawn.ids.tolist(), drawn.logprobs.tolist(), drawn.lengths.tolist()
    return [
        Response(ids[i][:length], logprobs[i][:length], not ended)
        for i, (length, ended) in enumerate(zip(lengths, drawn.ended.tolist(), strict=True))
    ]


@contextmanager
def generation_mode(model: PreTrainedModel) -> Iterator[None]:
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
