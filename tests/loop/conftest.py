"""Rollouts made by hand."""

from __future__ import annotations

import pytest
import torch

from aapa_lightning.types import Record, Rollouts


@pytest.fixture
def make_rollouts():
    """Rollouts of given prompt and response lengths; ids count up, so every cell is told from every other."""

    def make(prompts: list[int], responses: list[int], *, group: int = 1, truncated: tuple[int, ...] = ()) -> Rollouts:
        count, width, length = len(responses), max(prompts), max([*responses, 1])
        prompt_mask = torch.arange(width) >= width - torch.tensor(prompts)[:, None]
        response_mask = torch.arange(length) < torch.tensor(responses)[:, None]
        cells = torch.arange(count * (width + length)).reshape(count, -1) % 290 + 3
        return Rollouts(
            prompt_ids=cells[:, :width].masked_fill(~prompt_mask, 0),
            prompt_mask=prompt_mask,
            response_ids=cells[:, width:].masked_fill(~response_mask, 0),
            response_mask=response_mask,
            truncated=torch.tensor([i in truncated for i in range(count)]),
            group_ids=torch.arange(count) // group,
            engine_logprobs=-cells[:, width:].float().masked_fill(~response_mask, 0),
            token_ends=torch.arange(1, length + 1).expand(count, -1).masked_fill(~response_mask, 0),
            texts=["x" * n for n in responses],
            records=[Record(f"prompt {i // group}") for i in range(count)],
        )

    return make
