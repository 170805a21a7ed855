"""Batches of held-out prompts, the same number on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from aapa_lightning.data import collate  # noqa: F401 - lets plain loaders give records
from aapa_lightning.data.encode import NamedText, expert_responses
from aapa_lightning.data.responses import response_row
from aapa_lightning.errors import ConfigError
from aapa_lightning.loop.preferences import preferred_texts
from aapa_lightning.thinking import Thinking
from aapa_lightning.types import Record, Rollouts


class EvalStep:
    """Prompts of one evaluation batch; ``indices`` are their positions in the split. Empty on ranks that have run out.

    A plain class for the reason given at ``WindowStep``.
    """

    def __init__(self, indices: Sequence[int], records: Sequence[Record]) -> None:
        self.indices = indices
        self.records = records


class PlainBatches:
    """Makes steps of what a loader of the user's own gives: batches of records, numbered through the split over all ranks."""

    def __init__(self) -> None:
        self._seen = 0

    def step(self, batch: object, number: int, *, rank: int = 0, world_size: int = 1) -> EvalStep:
        """The step of a batch.

        Args:
            batch: a list of records, or one.
            number: of the batch in its loader, from 0.
            rank: this process.
            world_size: number of processes.

        Raises:
            ConfigError: anything else.
        """
        records = [batch] if isinstance(batch, Record) else batch
        if not isinstance(records, list | tuple) or not all(isinstance(record, Record) for record in records):
            raise ConfigError(
                f"expected a loader of batches of Records, found {type(batch).__name__}; use AapaDataModule, or "
                "DataLoader(read_records(path), batch_size=...)"
            )
        first = self._seen = 0 if number == 0 else self._seen
        self._seen += len(records)
        return EvalStep([(first + i) * world_size + rank for i in range(len(records))], list(records))


class EvalLoader:
    """Deals a split out to ranks, prompt by prompt, in batches.

    Args:
        records: the split.
        batch_size: prompts of a batch on one rank.
        rank: this process.
        world_size: number of processes. Ranks that run out yield empty batches: collectives stay in step.
    """

    def __init__(self, records: Sequence[Record], batch_size: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.records = records
        self.batch_size = batch_size
        self._indices = list(range(rank, len(records), world_size))
        self._batches = -(-len(records) // (batch_size * world_size))

    def __len__(self) -> int:
        """Number of batches."""
        return self._batches

    def __iter__(self) -> Iterator[EvalStep]:
        for batch in range(self._batches):
            indices = self._indices[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield EvalStep(indices, [self.records[i] for i in indices])


def predicted_rows(rollouts: Rollouts, samples: int, temperature: float, thinking: Thinking) -> list[dict[str, Any]]:
    """Rows of a response file.

    Args:
        rollouts: ``samples`` responses to each prompt, adjacent.
        samples: responses of a prompt.
        temperature: at which they were drawn.
        thinking: where a prompt ends with its opening tag, the row says so.
    """
    rows = []
    for i, (text, record) in enumerate(zip(rollouts.texts, rollouts.records, strict=True)):
        tag = thinking.opening(rollouts.prompt_ends[i]) if rollouts.prompt_ends else ""
        known = {"prompt_end": tag} if tag else {}
        cut = bool(rollouts.truncated[i])
        rows.append(response_row(record, text, temperature=temperature, sample=i % samples, truncated=cut, **known))
    return rows


def is_pair(record: Record) -> bool:
    """Return whether a record has both responses of a pair."""
    return record.chosen is not None and record.rejected is not None


def judged_responses(record: Record) -> list[NamedText]:
    """The responses whose likelihood evaluation reports, by name."""
    return [*expert_responses(record)[:1], *(preferred_texts(record) if is_pair(record) else ())]
