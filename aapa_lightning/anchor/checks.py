"""What an anchor refuses, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from aapa_lightning.anchor.base import Discriminator
from aapa_lightning.anchor.signal import AnchorOptions
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.types import Record


class Bank(Protocol):
    """What the anchor asks of an expert bank (``anchor/bank.py``)."""

    fingerprint: str

    def expert_logits(self, record: Record) -> Tensor | None:
        """Logits of all sentences of the expert responses to a record's prompt, float32 ``[K]``; None for an unknown prompt."""
        ...


def check_parts(options: AnchorOptions, discriminator: Discriminator, bank: Bank | None, fingerprint: str) -> None:
    """Raise ConfigError when options, discriminator (with its fingerprint) and bank do not go together."""
    if options.granularity == "sentence" and discriminator.whole_response:
        raise ConfigError(
            f"anchor: granularity=sentence does not go with {type(discriminator).__name__}: it gives one logit for a whole response, so "
            "there are no sentences to give credit to; use granularity=response or a sentence-level discriminator"
        )
    if options.transform == "bt_gap" and bank is None:
        raise ConfigError(
            "anchor: transform=bt_gap compares every sentence with the expert's own logits and expects a bank, found none; build one with "
            "`aapa bank build` and pass bank=FOLDER, or use another transform"
        )
    if bank is not None and bank.fingerprint != fingerprint:
        raise ConfigError(
            f"anchor: the bank was built with another discriminator: expected fingerprint {fingerprint[:12]}, found "
            f"{bank.fingerprint[:12]}; build it again with `aapa bank build`"
        )


def check_host(options: AnchorOptions, *, group_size: int, ratio_level: Literal["token", "sequence"]) -> None:
    """Raise ConfigError for a host objective that the anchor cannot join."""
    if group_size < 2:
        raise ConfigError(
            f"anchor: scores are compared within the responses to one prompt: expected a group size of at least 2, found {group_size}; "
            "raise it"
        )
    if options.granularity == "sentence" and ratio_level == "sequence":
        raise ConfigError(
            "anchor: granularity=sentence does not go with ratio_level=sequence: one ratio (and one clip) for the whole response would mix "
            "the sentences' credits; use ratio_level=token or granularity=response"
        )


def mean_expert_logits(bank: Bank, records: Sequence[Record]) -> Tensor:
    """Mean expert logit of each record's prompt, float32 ``[N]``. Raises DataError naming the first record that the bank lacks."""
    means: dict[int, Tensor] = {}  # of each record once: a group shares its own
    for record in records:
        if id(record) in means:
            continue
        logits = bank.expert_logits(record)
        if logits is None or logits.numel() == 0:
            raise DataError(
                f"{record.source}: expected expert logits of this prompt in the bank, found none; transform=bt_gap compares every sentence "
                "with them. Build the bank from the records that are trained on, with an expert response each"
            )
        means[id(record)] = logits.float().mean()
    return torch.stack([means[id(record)] for record in records]) if means else torch.zeros(0)
