"""From drawn tokens to ``Rollouts``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from aapa_lightning.rollout.base import RolloutRequest
from aapa_lightning.rollout.text import decode_with_ends
from aapa_lightning.thinking import prompt_end
from aapa_lightning.types import Rollouts, pad_left, pad_right


class Response(NamedTuple):
    """One drawn response: its tokens, their log-probs in nats, and whether the length limit cut it."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    truncated: bool


def collate(requests: Sequence[RolloutRequest], responses: Sequence[Response], tokenizer: Any, device: torch.device | str) -> Rollouts:
    """Pad, decode and stack.

    Args:
        requests: the request of each of the ``N`` responses; those of a request adjacent.
        responses: ``N``.
        tokenizer: decodes them.
        device: where the tensors go.
    """
    pad = tokenizer.pad_token_id
    prompt_ids, prompt_mask = pad_left([list(request.prompt_ids) for request in requests], pad)
    response_ids = pad_right([response.ids for response in responses], pad)
    lengths = torch.tensor([len(response.ids) for response in responses], dtype=torch.int64)
    logprobs = torch.zeros(response_ids.shape)
    ends = torch.zeros(response_ids.shape, dtype=torch.int64)
    texts = []
    prompts = {id(request): prompt_end(tokenizer, request.prompt_ids) for request in requests}
    for i, response in enumerate(responses):
        text, text_ends = decode_with_ends(tokenizer, response.ids)
        texts.append(text)
        logprobs[i, : len(response.ids)] = torch.tensor(response.logprobs)
        ends[i, : len(response.ids)] = torch.tensor(text_ends, dtype=torch.int64)
    return Rollouts(
        prompt_ids=prompt_ids.to(device),
        prompt_mask=prompt_mask.to(device),
        response_ids=response_ids.to(device),
        response_mask=(torch.arange(response_ids.shape[1]) < lengths[:, None]).to(device),
        truncated=torch.tensor([response.truncated for response in responses], dtype=torch.bool, device=device),
        group_ids=torch.tensor([request.slot for request in requests], dtype=torch.int64, device=device),
        engine_logprobs=logprobs.to(device),
        token_ends=ends.to(device),
        texts=texts,
        records=[request.record for request in requests],
        prompt_ends=[prompts[id(request)] for request in requests],
    )
