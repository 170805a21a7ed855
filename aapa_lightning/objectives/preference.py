"""The table of preference objectives: what each needs, what the module adds to it, and how its options are checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from aapa_lightning.errors import ConfigError, Limit, check_numbers, choose
from aapa_lightning.objectives.amapo import amapo_loss
from aapa_lightning.objectives.dpo import dpo_loss
from aapa_lightning.objectives.dr_dpo import dr_dpo_loss
from aapa_lightning.objectives.gapo import gapo_loss
from aapa_lightning.objectives.hypo import hypo_loss
from aapa_lightning.objectives.ipo import ipo_loss
from aapa_lightning.objectives.kto import kto_loss
from aapa_lightning.objectives.orpo import orpo_loss
from aapa_lightning.objectives.robust import cdpo_loss, rdpo_loss, ropo_loss
from aapa_lightning.objectives.rrhf import rrhf_loss
from aapa_lightning.objectives.simpo import simpo_loss
from aapa_lightning.objectives.sympo import sympo_loss
from aapa_lightning.types import LabelLossInputs, LossOutputs, PairLossInputs


@dataclass(frozen=True, slots=True)
class PreferenceObjective:
    """A preference loss and what it takes to use it.

    Args:
        loss: ``loss(inputs, **options)``, one loss per pair or labelled response.
        needs_reference: takes the log-probs of a frozen reference policy.
        labels: takes ``LabelLossInputs`` rather than ``PairLossInputs``.
        probe: takes the margins at weights perturbed along this loss's gradient; None for most. Has the options of ``loss``.
        batch_statistics: depends on other rows: of the micro-step and of all ranks, so it changes with the micro-batch size; with
            ``labels`` of the whole optimiser step.
        sft_weight: default weight of the chosen responses' NLL, a mean over the step's response tokens, which the module adds.
        options: defaults that differ from the function's own.
    """

    loss: Callable[..., LossOutputs]
    needs_reference: bool = False
    labels: bool = False
    probe: Callable[..., LossOutputs] | None = None
    batch_statistics: bool = False
    sft_weight: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def bind(self, options: Mapping[str, Any]) -> Callable[..., LossOutputs]:
        """Fix the options, after checking their names, types and ranges.

        Args:
            options: by name; the others keep their defaults.

        Returns:
            ``loss(inputs)``.

        Raises:
            ConfigError: an unknown option (the message lists the known ones), a value of another type or out of range.

        >>> PREFERENCES["ipo"].bind({"beta": "high"})
        Traceback (most recent call last):
        aapa_lightning.errors.ConfigError: option beta of ipo_loss: expected float, found 'high' (str)
        """
        name = getattr(self.loss, "__name__", repr(self.loss))
        parameters = inspect.signature(self.loss, eval_str=True).parameters.values()
        types = {parameter.name: parameter.annotation for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
        if options and not types:
            raise ConfigError(f"{name} has no options; found {', '.join(options)}")
        for option, value in options.items():
            _check_type(f"option {option} of {name}", value, choose(types, option, f"option of {name}"))
            if types[option] in (int, float):
                check_numbers(options, {option: Limit()}, f"option of {name}: ")
        bound = partial(self.loss, **{**self.options, **options})
        # One made-up row runs the function's own range checks now rather than at the first step.
        bound(_made_up_row(self.labels))
        return bound

    def bind_probe(self, options: Mapping[str, Any]) -> Callable[..., LossOutputs] | None:
        """The probe with the options, and the defaults, of the loss; None without one."""
        if self.probe is None:
            return None
        parameters = inspect.signature(self.loss).parameters.values()
        defaults = {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
        return partial(self.probe, **{**defaults, **self.options, **options})


def _check_type(what: str, value: Any, expected: type) -> None:
    accepted = (int, float) if expected is float else expected
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
        raise ConfigError(f"{what}: expected {expected.__name__}, found {value!r} ({type(value).__name__})")


def _made_up_row(labels: bool) -> PairLossInputs | LabelLossInputs:
    row, length = -torch.ones(1), torch.ones(1, dtype=torch.int64)
    return LabelLossInputs(row, row, length.bool(), row) if labels else PairLossInputs(row, row, length, length, row, row, row)


#: Every preference objective. A new row is checked by the battery of its tests.
PREFERENCES: dict[str, PreferenceObjective] = {
    "dpo": PreferenceObjective(dpo_loss, needs_reference=True),
    "ipo": PreferenceObjective(ipo_loss, needs_reference=True),
    "simpo": PreferenceObjective(simpo_loss),
    "orpo": PreferenceObjective(orpo_loss, sft_weight=1.0),
    "rpo": PreferenceObjective(dpo_loss, needs_reference=True, sft_weight=0.005, options={"beta": 0.01}),
    "hypo": PreferenceObjective(hypo_loss, needs_reference=True),
    "amapo": PreferenceObjective(amapo_loss, batch_statistics=True),
    "cdpo": PreferenceObjective(cdpo_loss, needs_reference=True),
    "rdpo": PreferenceObjective(rdpo_loss, needs_reference=True),
    "ropo": PreferenceObjective(ropo_loss, needs_reference=True),
    "sympo": PreferenceObjective(sympo_loss, needs_reference=True),
    "dr_dpo": PreferenceObjective(dr_dpo_loss, needs_reference=True, batch_statistics=True),
    "kto": PreferenceObjective(kto_loss, needs_reference=True, labels=True, batch_statistics=True),
    "gapo": PreferenceObjective(gapo_loss, probe=simpo_loss, batch_statistics=True),
    "rrhf": PreferenceObjective(rrhf_loss, sft_weight=1.0),
}
