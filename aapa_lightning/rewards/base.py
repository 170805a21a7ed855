"""What a reward is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from aapa_lightning.types import Record


class Reward(ABC):
    """Scores responses. A reward has a ``name`` and is called with ``N`` responses and their records.

    One more method may be there: ``skip_reason(record) -> str | None``. It is called once for every record before training
    (``RewardSet.select``), raises DataError for a record that the reward cannot score, and returns why a record is to be left out, or None
    to train on it.
    """

    name: str

    @abstractmethod
    def __call__(self, responses: Sequence[str], records: Sequence[Record]) -> Tensor | Sequence[float]:
        """Score ``N`` responses.

        Args:
            responses: decoded responses.
            records: their records: prompt, instructions and extra columns.

        Returns:
            ``N`` finite numbers: a float32 tensor ``[N]`` or a sequence of floats.
        """
