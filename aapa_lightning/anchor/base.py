"""What a discriminator is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from aapa_lightning.errors import ConfigError
from aapa_lightning.types import Record, SentenceSpans


class Discriminator(ABC):
    """A frozen judge of sentences. One of your own says how it scores and what its fingerprint is; the rest has defaults."""

    #: True when the logits depend on the record's expert responses (reference-conditioned).
    needs_experts: bool = False
    #: True when it scores a response as one sentence; sentence granularity is then refused.
    whole_response: bool = False

    @abstractmethod
    def score(self, responses: Sequence[str], records: Sequence[Record], spans: SentenceSpans) -> Tensor:
        """Log-odds, at equal class prior, that the expert wrote each sentence.

        Args:
            responses: ``N`` decoded responses.
            records: their records (the prompt, and the experts where ``needs_experts``).
            spans: their sentences.

        Returns:
            float32 ``[S]`` on the discriminator's device, without gradient.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of weights and settings: equal fingerprints give equal scores. A run resumes with no other."""

    def to(self, device: torch.device | str) -> Self:
        """Move weights, if there are any; returns itself."""
        return self

    def save(self, folder: Path) -> None:
        """Write safetensors and JSON that ``load_discriminator`` reads back.

        Raises:
            ConfigError: this kind is made from its arguments and has nothing to save.
        """
        raise ConfigError(f"{type(self).__name__} is not kept in a folder; name its class_path instead")
