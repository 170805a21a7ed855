"""Rewards are built from YAML by class path and arguments."""

import pytest
from jsonargparse import ArgumentParser

from aapa_lightning.rewards.base import Reward
from aapa_lightning.rewards.compose import RewardSet

CONFIG = """
rewards:
- class_path: aapa_lightning.rewards.verifiable.InstructionReward
  init_args: {mode: fraction, unsupported: skip-record}
- class_path: aapa_lightning.rewards.text.RegexReward
  init_args: {pattern: a+, flags: i}
- class_path: aapa_lightning.rewards.text.LengthReward
  init_args: {minimum: 3}
- class_path: aapa_lightning.rewards.text.SoftOverlongReward
  init_args: {limit: 100, buffer: 20, unit: characters}
- class_path: aapa_lightning.rewards.functions.TRLReward
  init_args: {function: "trl.rewards:think_format_reward"}
- class_path: aapa_lightning.rewards.functions.FunctionReward
  init_args: {function: "%s:one", name: mine}
weights: [1, 1, 1, 0.5, 1, 1]
"""


@pytest.mark.filterwarnings("ignore")
def test_rewards_from_yaml(tmp_path):
    (tmp_path / "mine.py").write_text("def one(responses, records):\n    return [1.0] * len(responses)\n")
    parser = ArgumentParser()
    parser.add_argument("--rewards", type=list[Reward])
    parser.add_argument("--weights", type=list[float])
    built = parser.instantiate_classes(parser.parse_string(CONFIG % (tmp_path / "mine.py")))
    rewards = RewardSet(built.rewards, built.weights)
    assert rewards.names == ["instructions", "regex", "length", "overlong", "think_format_reward", "mine"]
