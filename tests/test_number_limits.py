"""Every number among the options has a limit: what is negative, NaN or infinite is refused by name, before anything is loaded."""

from __future__ import annotations

import inspect
import math
from functools import partial
from types import NoneType, SimpleNamespace, UnionType
from typing import Union, get_args, get_origin

import pytest
import torch

from aapa_lightning.adapters import LoraSpec
from aapa_lightning.anchor.guard import Guard
from aapa_lightning.anchor.schedule import Adaptive, Constant, Cosine, Linear, Warmup
from aapa_lightning.anchor.signal import AnchorOptions
from aapa_lightning.callbacks.run_folder import RunCheckpoint
from aapa_lightning.callbacks.samples import SampleWriter
from aapa_lightning.data.datamodule import AapaDataModule
from aapa_lightning.data.prompt_format import PromptFormat
from aapa_lightning.errors import COUNT, POSITIVE, SHARE, STEPS, WEIGHT, ConfigError, Limit, check_numbers, refuse_idle
from aapa_lightning.modules.chord import CHORDModule
from aapa_lightning.modules.grpo import GRPOModule
from aapa_lightning.modules.inference import InferenceModule
from aapa_lightning.modules.limits import check_optimizer_numbers, check_trainer_numbers
from aapa_lightning.modules.preference import PreferenceModule, StressOptions
from aapa_lightning.modules.reward_model import RewardModelModule
from aapa_lightning.modules.sft import SFTModule
from aapa_lightning.modules.uniapl import UniAPLModule
from aapa_lightning.modules.windowed import WindowedModule
from aapa_lightning.objectives.correction import CorrectionOptions
from aapa_lightning.objectives.preference import PREFERENCES
from aapa_lightning.policy import PolicySpec
from aapa_lightning.rollout.base import SamplingParams
from aapa_lightning.rollout.vllm_server import VLLMServerEngine

#: How to make each with its other options, and what its own constructor hands on to its bases.
OWNERS = {
    CHORDModule: (partial(CHORDModule, PolicySpec()), (GRPOModule, WindowedModule, InferenceModule)),
    GRPOModule: (partial(GRPOModule, PolicySpec()), (WindowedModule, InferenceModule)),
    UniAPLModule: (partial(UniAPLModule, PolicySpec()), (GRPOModule, WindowedModule, InferenceModule)),
    SFTModule: (partial(SFTModule, PolicySpec()), (WindowedModule, InferenceModule)),
    PreferenceModule: (partial(PreferenceModule, PolicySpec()), (WindowedModule, InferenceModule)),
    InferenceModule: (partial(InferenceModule, PolicySpec()), ()),
    RewardModelModule: (partial(RewardModelModule, PolicySpec()), (WindowedModule,)),
    StressOptions: (StressOptions, ()),
    SamplingParams: (SamplingParams, ()),
    CorrectionOptions: (partial(CorrectionOptions, mode="truncate"), ()),
    PromptFormat: (PromptFormat, ()),
    LoraSpec: (LoraSpec, ()),
    Guard: (Guard, ()),
    AnchorOptions: (lambda **options: AnchorOptions(**options).check(), ()),
    Constant: (Constant, ()),
    Linear: (lambda **options: Linear(**{"start": 1.0, "end": 0.0, "steps": 5} | options), ()),
    Cosine: (lambda **options: Cosine(**{"start": 1.0, "end": 0.0, "steps": 5} | options), ()),
    Warmup: (lambda **options: Warmup(**{"schedule": 1.0, "steps": 5} | options), ()),
    Adaptive: (lambda **options: Adaptive(**{"schedule": 1.0} | options), ()),
    RunCheckpoint: (RunCheckpoint, ()),
    SampleWriter: (SampleWriter, ()),
    AapaDataModule: (AapaDataModule, ()),
    VLLMServerEngine: (partial(VLLMServerEngine, None, None, (), url="http://localhost:1"), ()),
}
#: Numbers that may be negative, or infinite: no bound.
FREE = {
    ("seed", -1),
    ("min_correlation", -1),
    ("min_correlation", -1.5),
    ("high", math.inf),
    ("reject_high", math.inf),
    ("eval_temperature", None),
}


def _numbers(owner):
    """Options that are numbers, by name, with their kind."""
    for name, parameter in inspect.signature(owner, eval_str=True).parameters.items():
        kinds = get_args(parameter.annotation) if get_origin(parameter.annotation) in (Union, UnionType) else (parameter.annotation,)
        kinds = [kind for kind in kinds if kind is not NoneType]
        if {int, float} & set(kinds):
            yield name, float if float in kinds else int


CASES = [
    (owner, name, bad)
    for owner, (_, bases) in OWNERS.items()
    for source in (owner, *bases)
    for name, kind in _numbers(source)
    for bad in (-1, -1.5, math.nan, math.inf, -math.inf, 10**400, True, 1.5)
    if (name, bad) not in FREE and (kind is int or bad != 1.5)
]


@pytest.mark.parametrize(("owner", "name", "bad"), CASES, ids=lambda value: value.__name__ if isinstance(value, type) else str(value)[:12])
def test_a_number_outside_its_limit_is_refused_by_name(owner, name, bad):
    with pytest.raises(ConfigError, match=name):
        OWNERS[owner][0](**{name: bad})


@pytest.mark.parametrize("name", PREFERENCES)
def test_options_of_preference_objectives(name):
    objective = PREFERENCES[name]
    for option, _ in _numbers(objective.loss):
        for bad in (-1.0, math.nan, math.inf, 10**400):
            with pytest.raises(ConfigError, match=option):
                objective.bind({option: bad})


def test_limits_in_words_and_at_their_ends():
    words = [str(limit) for limit in (COUNT, STEPS, WEIGHT, POSITIVE, SHARE, Limit(), Limit(0, 1, above=True, below=True))]
    assert words == [
        "a whole number, at least 1",
        "a whole number, at least 0",
        "a finite number, at least 0",
        "a positive, finite number",
        "a number in [0, 1]",
        "a finite number",
        "a number in (0, 1)",
    ]
    assert [COUNT.holds(value) for value in (0, 1, 1.0, "1", None, True)] == [False, True, False, False, False, False]
    assert [SHARE.holds(value) for value in (0, 1, 0.5, 1.0001, -0.0)] == [True, True, True, False, True]
    assert not Limit(0, 1, above=True, below=True).holds(0)
    assert not Limit(0, 1, above=True, below=True).holds(1)
    check_numbers({"a": None, "b": [1, 2]}, {"a": COUNT, "b": COUNT})
    with pytest.raises(ConfigError, match=r"^x\.b: expected a whole number, at least 1, found 0$"):
        check_numbers({"b": [1, 0]}, {"b": COUNT}, "x.")


@pytest.mark.parametrize("settings", [{"lr": math.inf}, {"lr": math.nan}, {"lr": -0.1}, {"weight_decay": math.inf}, {"momentum": math.nan}])
def test_settings_of_an_optimiser(settings):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    optimizer.param_groups[0].update(settings)
    with pytest.raises(ConfigError, match=f"model.optimizer: {next(iter(settings))}: expected a finite number"):
        check_optimizer_numbers(optimizer)
    for good in (torch.optim.AdamW, torch.optim.Adafactor, torch.optim.RMSprop):
        check_optimizer_numbers(good([torch.nn.Parameter(torch.zeros(1, 1))], lr=torch.tensor(0.1) if good is torch.optim.AdamW else 0.1))


def test_options_that_do_nothing_alone_are_refused_by_name():
    def option(value: int = 3) -> None:
        del value

    refuse_idle(option, {"value": 3}, ["value"], "alone")
    with pytest.raises(ConfigError, match=r"^x\.value=4 does nothing alone; change that, or leave value out$"):
        refuse_idle(option, {"value": 4}, ["value"], "alone", "x.")


@pytest.mark.parametrize("clip", [-1.0, math.nan, math.inf])
def test_a_clip_of_the_gradient_is_checked_before_the_first_step(clip):
    with pytest.raises(ConfigError, match=r"trainer\.gradient_clip_val: expected a finite number, at least 0, found"):
        check_trainer_numbers(SimpleNamespace(gradient_clip_val=clip))
    for good in (None, 0, 1.0):
        check_trainer_numbers(SimpleNamespace(gradient_clip_val=good))
