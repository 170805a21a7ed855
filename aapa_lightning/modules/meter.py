"""Metrics of an optimiser step: sums over its micro-steps, one reduction over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from aapa_kernels.anchor_advantage.groups import accumulator
from aapa_lightning.loop.terms import LossTerm
from aapa_lightning.reduce import Mean, masked_sum
from aapa_lightning.types import SumOverRanks


class StepMeter:
    """Collects a step's losses, per-token metrics and window metrics, and gives their values over micro-steps and ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}
        self._logged: set[str] = set()

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add to the numerator and denominator of a metric."""
        old_total, old_count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (old_total + total, old_count + count)

    def add_means(self, values: Mapping[str, float]) -> None:
        """Add means over this rank's share of a window by their parts, and plain numbers, which are the same on all ranks."""
        for name, value in values.items():
            self.add(name, *((value.total, value.count) if isinstance(value, Mean) else (value, 1.0)))

    def add_terms(self, terms: list[LossTerm], values: Mapping[str, Tensor], loss: Tensor) -> None:
        """Add one micro-step: reduced losses carry the number of micro-steps x ranks, so the step's loss is their mean."""
        self.add("loss", loss.detach(), 1.0)
        for term in terms:
            self.add(f"losses/{term.name}", values[term.name], 1.0)
            tokens = term.mask.sum()
            for name, value in term.outputs.metrics.items():
                self.add(f"{term.name}/{name}", masked_sum(value, term.mask), tokens)

    def compute(self, sum_over_ranks: SumOverRanks, device: torch.device) -> dict[str, float]:
        """Values over all ranks, by name; empties the meter. Called by every rank with the same names."""
        names = sorted(self._sums)
        pairs = [
            torch.stack([torch.as_tensor(part, dtype=accumulator(device), device=device) for part in self._sums[name]]) for name in names
        ]
        self._sums = {}
        if not names:
            return {}
        totals = sum_over_ranks(torch.stack(pairs)).tolist()
        return {name: total / count if count else 0.0 for name, (total, count) in zip(names, totals, strict=True)}

    def log(self, module: L.LightningModule, metrics: Mapping[str, float]) -> None:
        """Log values of this step as ``train/...``, and nothing for what only earlier steps had, which Lightning would repeat."""
        values = {f"train/{name}": value for name, value in metrics.items()}
        if stale := self._logged - values.keys():
            results: Any = module.trainer._results or {}  # private, but there is no other way to take a value back
            for key in [key for key, result in results.items() if result.meta.name in stale]:
                del results[key]
        self._logged = set(values)
        module.log_dict(values)
