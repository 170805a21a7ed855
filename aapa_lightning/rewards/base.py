"""The reward protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from aapa_lightning.types import Record


@runtime_checkable
class Reward(Protocol):
    """Scores responses. Anything callable with a ``name`` is a reward.

    ``__call__(responses, records)`` takes ``N`` decoded responses and their records (prompt, instructions and extra columns are in the
    record) and returns ``N`` finite numbers: a float32 tensor ``[N]`` or a sequence of floats.

    One more method may be there: ``skip_reason(record) -> str | None``. It is called once for every record before training
    (``RewardSet.select``), raises DataError for a record that the reward cannot score, and returns why a record is to be left out, or None
    to train on it.
    """

    name: str

    def __call__(self, responses: Sequence[str], records: Sequence[Record]) -> Tensor | Sequence[float]:
        """Score ``N`` responses."""
        ...
