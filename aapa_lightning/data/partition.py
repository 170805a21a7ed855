"""Datasets divided by prompt, and a check that two have no prompt in common."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

from aapa_lightning.data.dialects import prompt_hash, prompt_text
from aapa_lightning.data.records import take
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Record


def split_by_prompt(records: Sequence[Record], shares: Mapping[str, float], seed: int) -> dict[str, Sequence[Record]]:
    """Divide a dataset into parts that share no prompt; neither the order of rows nor the process matters.

    Args:
        records: the dataset.
        shares: share of the prompts of each part, above 0, together 1.
        seed: another seed, another division.

    Raises:
        ConfigError: shares that are not above 0, or not 1 together.
        DataError: a part without a prompt.
    """
    if not shares or not all(share > 0 for share in shares.values()) or not math.isclose(math.fsum(shares.values()), 1.0):
        raise ConfigError(f"parts: expected shares above 0 that are 1 together, found {dict(shares)}")
    ranks = [hashlib.sha256(f"split:{seed}:{prompt_hash(record.prompt)}".encode()).digest() for record in records]
    prompts = sorted(set(ranks))
    parts: dict[str, Sequence[Record]] = {}
    begin, total = 0, 0.0
    for name, share in shares.items():
        total += share
        end = round(total * len(prompts))
        if begin == end:
            raise DataError(f"{len(prompts)} different prompts are too few: none is left for the part {name!r} with a share of {share}")
        own = set(prompts[begin:end])
        parts[name] = take(records, [i for i, rank in enumerate(ranks) if rank in own])
        begin = end
    return parts


def require_disjoint(records: Sequence[Record], others: Sequence[Record]) -> None:
    """Raise DataError that names the first prompt of ``others`` that is also one of ``records``."""
    sources = {prompt_hash(record.prompt): record.source for record in records}
    for other in others:
        if source := sources.get(prompt_hash(other.prompt)):
            raise DataError(
                f"{other.source}: its prompt is also that of {source}: {prompt_text(other.prompt)!r:.80}; expected datasets without "
                "a common prompt: make them with 'aapa data split'"
            )
