"""An endless stream over a finite dataset in which position is arithmetic, not state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from aapa_lightning.data.fingerprint import fingerprint
from aapa_lightning.errors import DataError
from aapa_lightning.seeds import derive_seed
from aapa_lightning.types import Record


class RecordStream:
    """Record ``i`` of an endless, reshuffled pass over ``records`` is a pure function of (seed, i).

    Args:
        records: the dataset.
        seed: seed of the permutations; two streams with equal seeds over equally long datasets are aligned.
        name: what errors call the dataset.

    Raises:
        DataError: the dataset is empty.
    """

    def __init__(self, records: Sequence[Record], seed: int = 0, name: str = "the dataset") -> None:
        if len(records) == 0:
            raise DataError(
                f"{name}: expected at least one record to train on, found an empty dataset; give it records, or leave fewer out"
            )
        self.records = records
        self.seed = seed
        self._passes: dict[int, Tensor] = {}

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Number and digest of the records, see ``data.fingerprint``."""
        return fingerprint(self.records)

    def __len__(self) -> int:
        """Length of one pass."""
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        """Record ``index`` of the endless stream, ``index >= 0``."""
        number, position = divmod(index, len(self.records))
        return self.records[int(self._order(number)[position])]

    def _order(self, number: int) -> Tensor:
        if number not in self._passes:
            generator = torch.Generator().manual_seed(derive_seed("pass", self.seed, number))
            # a window may straddle two passes, so the last two permutations are kept
            self._passes = {k: v for k, v in self._passes.items() if k == number - 1}
            self._passes[number] = torch.randperm(len(self.records), generator=generator)
        return self._passes[number]
