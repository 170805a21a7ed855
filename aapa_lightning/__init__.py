"""AAPA Lightning: adversarially anchored preference alignment for Lightning.

The public names load on first use, so that importing the package costs no more than importing Lightning.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "AapaDataModule": "data.datamodule",
    "AnchorCallback": "callbacks.anchor",
    "AnchorTerm": "anchor.term",
    "CHORDModule": "modules.chord",
    "DiscriminatorData": "modules.discriminator_data",
    "DiscriminatorModule": "modules.discriminator",
    "ExpertBank": "anchor.bank",
    "GRPOModule": "modules.grpo",
    "InferenceModule": "modules.inference",
    "LoraSpec": "adapters",
    "PolicySpec": "policy",
    "PreferenceModule": "modules.preference",
    "PromptFormat": "data.prompt_format",
    "Record": "types",
    "RewardModelModule": "modules.reward_model",
    "RewardSet": "rewards.compose",
    "Rollouts": "types",
    "SFTModule": "modules.sft",
    "SamplingParams": "rollout.base",
    "Segmenter": "anchor.segment",
    "UniAPLModule": "modules.uniapl",
    "load_discriminator": "anchor.load",
    "read_records": "data.records",
}

__all__ = [*_EXPORTS]  # noqa: PLE0604 - the keys are strings

if TYPE_CHECKING:
    from aapa_lightning.adapters import LoraSpec
    from aapa_lightning.anchor.bank import ExpertBank
    from aapa_lightning.anchor.load import load_discriminator
    from aapa_lightning.anchor.segment import Segmenter
    from aapa_lightning.anchor.term import AnchorTerm
    from aapa_lightning.callbacks.anchor import AnchorCallback
    from aapa_lightning.data.datamodule import AapaDataModule
    from aapa_lightning.data.prompt_format import PromptFormat
    from aapa_lightning.data.records import read_records
    from aapa_lightning.modules.chord import CHORDModule
    from aapa_lightning.modules.discriminator import DiscriminatorModule
    from aapa_lightning.modules.discriminator_data import DiscriminatorData
    from aapa_lightning.modules.grpo import GRPOModule
    from aapa_lightning.modules.inference import InferenceModule
    from aapa_lightning.modules.preference import PreferenceModule
    from aapa_lightning.modules.reward_model import RewardModelModule
    from aapa_lightning.modules.sft import SFTModule
    from aapa_lightning.modules.uniapl import UniAPLModule
    from aapa_lightning.policy import PolicySpec
    from aapa_lightning.rewards.compose import RewardSet
    from aapa_lightning.rollout.base import SamplingParams
    from aapa_lightning.types import Record, Rollouts


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
