"""What loggers, ``module.hparams`` and ``load_from_checkpoint`` get to know of how a module was made."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from aapa_lightning.anchor.server import ScoreServer
from aapa_lightning.errors import ConfigError
from aapa_lightning.hyperparameters import plain
from aapa_lightning.modules.discriminator import DiscriminatorModule
from aapa_lightning.modules.grpo import GRPOModule
from aapa_lightning.modules.reward_model import RewardModelModule
from aapa_lightning.modules.sft import SFTModule
from aapa_lightning.policy import PolicySpec


def test_hparams_are_the_arguments_and_the_defaults_as_plain_values(kit, spec):
    module = GRPOModule(spec, group_size=3, rewards=[kit.TextReward()], optimizer=partial(torch.optim.AdamW, lr=1e-2))
    found = json.loads(json.dumps(dict(module.hparams)))
    assert found["group_size"] == 3
    assert found["policy"]["model"] == spec.model
    assert found["rewards"] == [{"class_path": "modules_kit.TextReward"}]
    assert found["optimizer"]["init_args"] == {"lr": 1e-2}
    assert found["eval_batch_size"] == 32  # a default of a base class
    assert found["max_skipped_steps"] == 10


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (lambda: DiscriminatorModule("encoder", lr=0.5), "lr", 0.5),
        (lambda: RewardModelModule(PolicySpec("base"), human_weight=0.25), "human_weight", 0.25),
    ],
)
def test_every_module_says_its_arguments(make, name, value):
    assert make().hparams[name] == value


def test_secrets_and_tensors_stay_out():
    server = ScoreServer("http://host:1", body={"user": "me", "auth": {"token": "hf_1"}, "n": 3}, api_key_env="THE_KEY")
    found = plain(
        {
            "server": server,
            "api_key": "sk-1",
            "hub_token": "hf_2",
            "url": "https://user:pass@host/x",
            "api_key_env": "sk-abc123456789",
            "pad_token": "<pad>",
            "max_tokens": 5,
            "weights": torch.zeros(2, 3),
        }
    )
    assert found["server"]["body"] == {"user": "***", "auth": {"token": "***"}, "n": 3}
    assert found["server"]["api_key_env"] == "THE_KEY"
    assert not [secret for secret in ("hf_1", "hf_2", "sk-1", "pass", "sk-abc") if secret in json.dumps(found)]
    assert (found["pad_token"], found["max_tokens"], found["weights"]) == ("<pad>", 5, "tensor (2, 3)")


def test_a_logger_gets_them_and_a_checkpoint_makes_the_module_again(kit, spec, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    trained = kit.fit(kit.make_module("sft", spec), kit.make_trainer(2, logger=logger))
    logged = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert logged["batch_size"] == 4
    assert logged["data"]["val_fraction"] == 0.0
    trained.trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = SFTModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.policy == trained.policy
    assert again.seed == 3
    assert all(torch.equal(value, kit.weights(again)[name]) for name, value in kit.weights(trained).items())


def test_a_checkpoint_of_a_module_with_objects(kit, spec, tmp_path):
    trained = kit.fit(kit.make_module("grpo", spec), kit.make_trainer(1))
    trained.trainer.save_checkpoint(tmp_path / "last.ckpt")
    reward = kit.TextReward()
    again = GRPOModule.load_from_checkpoint(tmp_path / "last.ckpt", rewards=[reward])
    assert again.rewards.rewards == [reward]
    assert again.group_size == trained.group_size == 3


def test_a_checkpoint_that_does_not_say_enough(kit, spec, tmp_path):
    trained = kit.fit(kit.make_module("sft", spec), kit.make_trainer(1))
    trained.trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    torch.save({**state, "hyper_parameters": {}}, tmp_path / "old.ckpt")
    with pytest.raises(ConfigError, match=r"SFTModule\.load_from_checkpoint: cannot make the module .* pass the arguments"):
        SFTModule.load_from_checkpoint(tmp_path / "old.ckpt")
