"""Options that would do nothing without another one are refused by name; with it, and at their defaults, they are taken."""

from __future__ import annotations

from functools import partial

import pytest

from aapa_lightning.anchor.guard import Guard
from aapa_lightning.anchor.term import AnchorTerm
from aapa_lightning.callbacks.anchor import AnchorCallback
from aapa_lightning.data.datamodule import AapaDataModule
from aapa_lightning.errors import ConfigError
from aapa_lightning.modules.chord import CHORDModule
from aapa_lightning.modules.grpo import GRPOModule
from aapa_lightning.modules.inference import InferenceModule
from aapa_lightning.modules.uniapl import UniAPLModule
from aapa_lightning.objectives.correction import CorrectionOptions
from aapa_lightning.policy import PolicySpec
from aapa_lightning.rewards.functions import FunctionReward
from aapa_lightning.rollout.vllm_server import VLLMServerEngine


class Judge:
    needs_experts = whole_response = False

    def fingerprint(self):
        return "judge"


class Bank:
    fingerprint = "judge"

    def expert_logits(self, record):
        return None


REWARD = FunctionReward(lambda texts, _: [0.0] * len(texts), name="r")
GRPO, CHORD, UNIAPL = (partial(kind, PolicySpec()) for kind in (GRPOModule, CHORDModule, UniAPLModule))
SERVER = partial(VLLMServerEngine, None, None, (), url="http://localhost:1")
TERM = partial(AnchorTerm, Judge())

#: What is made with which options, the option that does nothing, and what gives it something to do.
CASES = [
    (GRPO, {"kl_estimator": "k2"}, {"beta": 0.1}),
    (UNIAPL, {"kl_ratio": False}, {"beta": 0.1}),
    (CHORD, {"mu_valley": 0.3}, {"mu_decay_steps": 5}),
    (GRPO, {"reward_weights": [0.7]}, {"rewards": [REWARD]}),
    (partial(InferenceModule, PolicySpec()), {"eval_temperature": 0.5, "eval_samples": 0}, {"eval_samples": 1}),
    (CorrectionOptions, {"high": 3.0}, {"mode": "truncate"}),
    (CorrectionOptions, {"level": "sequence"}, {"mode": "mask"}),
    (CorrectionOptions, {"sequence": "mean", "mode": "mask"}, {"level": "sequence"}),
    (Guard, {"action": "stop"}, {"max_zero_variance": 0.9}),
    (Guard, {"patience": 1}, {"min_auroc": 0.4}),
    (TERM, {"softmin_temperature": 2.0}, {"pool": "softmin"}),
    (TERM, {"scale_floor": 0.2, "scale": "fixed"}, {"scale": "batch"}),
    (TERM, {"guard": Guard(min_auroc=0.4)}, {"bank": Bank()}),
    (AapaDataModule, {"seed": 3}, {"val_fraction": 0.1}),
    (SERVER, {"folder_on_server": "/mnt"}, {"folder": "weights"}),
    (partial(AnchorCallback), {"discriminator": Judge(), "encoder": "model"}, {"discriminator": "folder"}),
]


@pytest.mark.parametrize(("make", "options", "needed"), CASES, ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_an_option_that_does_nothing_alone_is_refused_by_name(make, options, needed):
    name = next(name for name in options if name not in needed and name != "mode")
    with pytest.raises(ConfigError, match=rf"{name}.*(does nothing|is never reached)"):
        make(**options)
    make(**options | needed)


def test_a_limit_on_the_correlation_with_rewards_needs_rewards(tiny_model_dir):
    from aapa_lightning.modules.sft import SFTModule

    module = SFTModule(PolicySpec(str(tiny_model_dir)))
    module.anchor = TERM(guard=Guard(min_correlation=0.1))
    with pytest.raises(ConfigError, match=r"guard\.min_correlation does nothing: it asks for rewards, and SFT has none"):
        module.make_plan(1, 1)
    module.anchor = TERM(guard=Guard(max_length_growth=2.0))
    module.make_plan(1, 1)
