"""A judge that anybody can compute by hand, and rollouts whose tokens are words."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from aapa_lightning.types import Record, Rollouts


class WordJudge(nn.Module):
    """Logit of a sentence: ``weight * (words of it - 3)``. Dropout on the way shows whether it is in evaluation mode."""

    needs_experts = False
    whole_response = False

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.dropout = nn.Dropout(0.9)
        self.seen = []

    def score(self, responses, records, spans):
        self.seen = list(responses)
        words = [len(text[a:b].split()) for text, row in zip(responses, spans.char_spans, strict=True) for a, b in row]
        return self.dropout(self.weight * (torch.tensor(words, dtype=torch.float32) - 3))

    def fingerprint(self):
        return hashlib.sha256(self.weight.detach().numpy().tobytes()).hexdigest()

    def save(self, folder: Path):
        raise AssertionError("an anchor never saves its discriminator")


@pytest.fixture
def word_judge():
    return WordJudge


@pytest.fixture
def make_rollouts():
    """``make_rollouts(texts, groups, ...)``: one token a word (with the space before it), then an EOS token unless truncated."""

    def make(texts, groups, *, experts=(), truncated=None, pad=0):
        truncated = torch.tensor(truncated or [False] * len(texts))
        ends = []
        for text, cut in zip(texts, truncated.tolist(), strict=True):
            row, position = [], 0
            for word in text.split():
                position = text.index(word, position) + len(word)
                row.append(position)
            if row:
                row[-1] = len(text)
            ends.append(row if cut else [*row, len(text)])
        width = max(1, *map(len, ends)) + pad
        mask = torch.tensor([[t < len(row) for t in range(width)] for row in ends])
        n = len(texts)
        return Rollouts(
            prompt_ids=torch.zeros(n, 1, dtype=torch.int64),
            prompt_mask=torch.ones(n, 1, dtype=torch.bool),
            response_ids=torch.ones(n, width, dtype=torch.int64),
            response_mask=mask,
            truncated=truncated,
            group_ids=torch.tensor(groups),
            engine_logprobs=-0.5 * mask.float(),
            token_ends=torch.tensor([row + [0] * (width - len(row)) for row in ends]),
            texts=list(texts),
            records=[Record(prompt=f"prompt {g}", experts=tuple(experts), source=f"data.jsonl:{g}") for g in groups],
        )

    return make
