"""Reward of verifiable instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from aapa_lightning.errors import ConfigError, DataError, shown
from aapa_lightning.rewards.base import Reward
from aapa_lightning.rewards.instructions import CHECKS, follows, follows_loosely, validate_instruction
from aapa_lightning.thinking import ScoreThinking
from aapa_lightning.types import Record

#: Sums of such weights are finite.
_HEAVIEST = 1e300

CHOICES = {"mode": ("all", "fraction", "weighted"), "verdicts": ("strict", "loose"), "unsupported": ("error", "skip-record")}


class InstructionReward(Reward):
    """Whether a response follows its record's instructions (``instructions.CHECKS``; IFEval's verdicts).

    Args:
        mode: ``all`` gives 1 when every instruction is followed, else 0; ``fraction`` gives the share that is followed; ``weighted`` the
            weight of those that are followed over the weight of all.
        weights: for ``weighted``. A mapping from identifiers to numbers, 0 or more (an identifier that is not in it weighs 1), or the name
            of a column with a list of numbers, one for each of the record's instructions.
        verdicts: ``strict``, or ``loose``: an instruction is also followed where it would be without the first or the last line, or
            without asterisks.
        unsupported: what becomes of records with an identifier that no check knows, or with no instruction: ``error`` stops before
            training, ``skip-record`` leaves them out and says how many and why. A missing or malformed argument or weight is an error in
            both.
        score_thinking: judge the thinking before an answer too (``Reward``).
        name: logged name.

    Raises:
        ConfigError: unknown mode, verdicts or unsupported; weights without ``weighted`` or the other way round; malformed weights.
    """

    def __init__(
        self,
        *,
        mode: Literal["all", "fraction", "weighted"] = "all",
        weights: dict[str, float] | str | None = None,
        verdicts: Literal["strict", "loose"] = "strict",
        unsupported: Literal["error", "skip-record"] = "error",
        score_thinking: ScoreThinking | None = None,
        name: str = "instructions",
    ) -> None:
        for option, value in (("mode", mode), ("verdicts", verdicts), ("unsupported", unsupported)):
            if value not in CHOICES[option]:
                raise ConfigError(f"reward {name!r}: {option} must be {_or(CHOICES[option])}, found {value!r}")
        if (mode == "weighted") != (weights is not None):
            raise ConfigError(f"reward {name!r}: weights go with mode 'weighted', found mode {mode!r} and weights {weights!r}")
        if isinstance(weights, Mapping):
            _check_mapping(weights, name)
        self.name, self.score_thinking = name, score_thinking
        self.mode = mode
        self.weights = weights
        self.unsupported = unsupported
        self._follows = follows_loosely if verdicts == "loose" else follows

    def skip_reason(self, record: Record) -> str | None:
        """Why a record is left out, or None; raises DataError when it cannot be scored."""
        if self.unsupported == "skip-record":
            if not record.instructions:
                return "no instructions"
            for instruction in record.instructions:
                if instruction.id not in CHECKS:
                    return f"{instruction.id} is not supported"
        self._weights(record)
        return None

    def __call__(self, responses: Sequence[str], records: Sequence[Record]) -> list[float]:
        """Score ``N`` responses: numbers in [0, 1]."""
        return [self._score(response, record) for response, record in zip(self.judged(responses), records, strict=True)]

    def _weights(self, record: Record) -> list[float]:
        # One for each instruction of a valid record.
        if not record.instructions:
            raise DataError(
                f"{record.source}: no instructions, but reward {self.name!r} needs some; add a column 'instructions', or set "
                "unsupported to 'skip-record'"
            )
        for instruction in record.instructions:
            validate_instruction(instruction, record.source)
        if isinstance(self.weights, str):
            return self._column(self.weights, record)
        weights = [float((self.weights or {}).get(instruction.id, 1)) for instruction in record.instructions]
        if not any(weights):
            raise DataError(f"{record.source}: every instruction has weight 0 in reward {self.name!r}; give one of them a weight above 0")
        return weights

    def _column(self, column: str, record: Record) -> list[float]:
        values = record.extra.get(column)
        number = len(record.instructions)
        if not isinstance(values, list | tuple) or len(values) != number or not all(map(_is_weight, values)) or not any(values):
            raise DataError(
                f"{record.source}: reward {self.name!r} needs a column {column!r} with {number} numbers, one for each instruction, 0 or "
                f"more and not all 0; found {shown(values)}"
            )
        return list(map(float, values))

    def _score(self, response: str, record: Record) -> float:
        weights = self._weights(record)
        followed = [self._follows(instruction, response) for instruction in record.instructions]
        if self.mode == "all":
            return float(all(followed))
        return sum(weight for weight, held in zip(weights, followed, strict=True) if held) / sum(weights)


def _or(choices: Sequence[str]) -> str:
    return f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _HEAVIEST


def _check_mapping(weights: Mapping[str, Any], name: str) -> None:
    if unknown := sorted(weights.keys() - CHECKS.keys()):
        raise ConfigError(f"reward {name!r}: weights for unknown instructions {unknown}; expected some of {', '.join(sorted(CHECKS))}")
    if wrong := {key: value for key, value in weights.items() if not _is_weight(value)}:
        raise ConfigError(f"reward {name!r}: weights must be numbers, 0 or more, found {wrong}")
