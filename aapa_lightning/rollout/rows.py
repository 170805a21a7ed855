"""The rows of a batch under generation: how the next token is drawn, and where each row ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aapa_lightning.rollout.base import SamplingParams
from aapa_lightning.rollout.sampling import filter_logits, gumbel_noise


def perturb(logits: Tensor, keys: Tensor, position: int, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a token for every row.

    Args:
        logits: ``[B, V]``, of the model.
        keys: int64 ``[B]``, see ``row_keys``.
        position: index of the token in the response.
        params: temperature, top-p and top-k.

    Returns:
        Scores float32 ``[B, V]`` whose argmax is the draw, the draw int64 ``[B]``, and its log-prob float32 ``[B]`` nats at
        softmax(logits / temperature).
    """
    logits = logits.float()
    scores = logits
    if params.temperature > 0:
        logits = logits / params.temperature
        scores = filter_logits(logits, params.top_p, params.top_k) + gumbel_noise(keys, position, logits.shape[-1])
    drawn = scores.argmax(-1)
    return scores, drawn, logits.gather(-1, drawn[:, None]).squeeze(-1) - logits.logsumexp(-1)


class Stops:
    """Which rows have ended: by an EOS id or a stop string. No mask is ever read off ids.

    Args:
        eos_ids: every id that ends a response.
        tokenizer: matches stop strings to its vocabulary.
        strings: stop strings.
        device: of the tokens.
    """

    def __init__(self, eos_ids: Sequence[int], tokenizer: Any, strings: Sequence[str], device: torch.device) -> None:
        self.eos_ids = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)
        self._strings = None
        if strings:
            from transformers import StopStringCriteria

            self._strings = StopStringCriteria(tokenizer, list(strings))
        #: How many of the last tokens it looks at.
        self.reach = 1 if self._strings is None else self._strings.maximum_token_len

    def __call__(self, responses: Tensor) -> Tensor:
        """Whether each row's last token ends it.

        Args:
            responses: int64 ``[B, t]``, the last ``reach`` tokens of the responses alone: a prompt's last characters must not complete a
                stop string.

        Returns:
            bool ``[B]``.
        """
        done = torch.isin(responses[:, -1], self.eos_ids)
        # the criterion's own signature; it looks at ids alone
        return done if self._strings is None else done | self._strings(responses, None)
