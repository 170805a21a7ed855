"""The discriminator protocol."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from aapa_lightning.types import Record, SentenceSpans


@runtime_checkable
class Discriminator(Protocol):
    """A frozen judge of sentences.

    ``needs_experts``: true when the logits depend on the record's expert responses (reference-conditioned).
    ``whole_response``: true when it scores a response as one sentence; sentence granularity is then refused.
    """

    needs_experts: bool
    whole_response: bool

    def score(self, responses: Sequence[str], records: Sequence[Record], spans: SentenceSpans) -> Tensor:
        """Log-odds, at equal class prior, that the expert wrote each sentence.

        Args:
            responses: ``N`` decoded responses.
            records: their records (the prompt, and the experts where ``needs_experts``).
            spans: their sentences.

        Returns:
            float32 ``[S]`` on the discriminator's device, without gradient.
        """
        ...

    def fingerprint(self) -> str:
        """Hex digest of weights and settings: equal fingerprints give equal scores."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move weights; returns itself."""
        ...

    def save(self, folder: Path) -> None:
        """Write safetensors and JSON that ``load`` reads back."""
        ...
