"""Reward of verifiable instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.rewards.base import Reward
from aapa_lightning.rewards.instructions import CHECKS, follows, validate_instruction
from aapa_lightning.types import Record


class InstructionReward(Reward):
    """Whether a response follows its record's instructions (``instructions.CHECKS``; IFEval's strict verdicts).

    Args:
        mode: ``all`` gives 1 when every instruction is followed, else 0; ``fraction`` gives the share that is followed.
        unsupported: what becomes of records with an identifier that no check knows, or with no instruction: ``error`` stops before
            training, ``skip-record`` leaves them out and says how many and why. A missing or malformed argument is an error in both.
        name: logged name.

    Raises:
        ConfigError: unknown mode.
    """

    def __init__(
        self,
        *,
        mode: Literal["all", "fraction"] = "all",
        unsupported: Literal["error", "skip-record"] = "error",
        name: str = "instructions",
    ) -> None:
        if mode not in ("all", "fraction"):
            raise ConfigError(f"reward {name!r}: mode must be 'all' or 'fraction', found {mode!r}")
        if unsupported not in ("error", "skip-record"):
            raise ConfigError(f"reward {name!r}: unsupported must be 'error' or 'skip-record', found {unsupported!r}")
        self.name = name
        self.mode = mode
        self.unsupported = unsupported

    def skip_reason(self, record: Record) -> str | None:
        """Why a record is left out, or None; raises DataError when it cannot be scored."""
        if self.unsupported == "skip-record":
            if not record.instructions:
                return "no instructions"
            for instruction in record.instructions:
                if instruction.id not in CHECKS:
                    return f"{instruction.id} is not supported"
        self._validate(record)
        return None

    def __call__(self, responses: Sequence[str], records: Sequence[Record]) -> list[float]:
        """Score ``N`` responses: numbers in [0, 1]."""
        return [self._score(response, record) for response, record in zip(responses, records, strict=True)]

    def _validate(self, record: Record) -> None:
        if not record.instructions:
            raise DataError(
                f"{record.source}: no instructions, but reward {self.name!r} needs some; add a column 'instructions', or set "
                "unsupported to 'skip-record'"
            )
        for instruction in record.instructions:
            validate_instruction(instruction, record.source)

    def _score(self, response: str, record: Record) -> float:
        self._validate(record)
        followed = [follows(instruction, response) for instruction in record.instructions]
        return float(all(followed)) if self.mode == "all" else sum(followed) / len(followed)
