"""What a reward is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from aapa_lightning.thinking import ScoreThinking, as_thinking
from aapa_lightning.types import Record


class Reward(ABC):
    """Scores responses. A reward has a ``name`` and is called with ``N`` responses and their records.

    Two more methods may be there:

    - ``skip_reason(record) -> str | None`` is called once for every record before training (``RewardSet.select``). It raises DataError for
      a record that the reward cannot score, and returns why a record is to be left out, or None to train on it.
    - ``score_or_abstain(responses, records)`` is called in the reward's place. It returns what the reward does, or a list with None for
      each response that it cannot score, such as one whose verifier timed out. ``task_advantages`` says what becomes of those.
    """

    name: str
    #: What of a response this reward judges; None leaves it to its ``RewardSet``. Called by itself, a reward judges answers.
    score_thinking: ScoreThinking | None = None

    def judged(self, responses: Sequence[str]) -> Sequence[str]:
        """Return what of each response the reward judges: its answer, or all of it."""
        return as_thinking(self.score_thinking or False).answers(responses)

    @abstractmethod
    def __call__(self, responses: Sequence[str], records: Sequence[Record]) -> Tensor | Sequence[float]:
        """Score ``N`` responses.

        Args:
            responses: decoded responses; from a ``RewardSet`` their answers, without the thinking before them.
            records: their records: prompt, instructions and extra columns.

        Returns:
            ``N`` finite numbers: a float32 tensor ``[N]`` or a sequence of floats.
        """
