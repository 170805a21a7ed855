import logging

import pytest
import torch

from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.rewards.base import Reward
from aapa_lightning.rewards.compose import RewardSet
from aapa_lightning.rewards.functions import FunctionReward
from aapa_lightning.rewards.text import RegexReward
from aapa_lightning.types import Record

RECORDS = [Record(prompt=str(i), key=f"k{i}", source=f"d.jsonl:{i + 1}") for i in range(3)]
TEXTS = ["a", "bb", "ccc"]


def reward(function, name="mine"):
    return FunctionReward(function, name=name)


def lengths(responses, records):
    return [len(response) for response in responses]


def test_scores_are_columns():
    rewards = RewardSet([reward(lengths), RegexReward("b")], weights=[2, 0.5])
    scores = rewards.score(TEXTS, RECORDS)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[1, 0], [2, 1], [3, 0]]
    assert rewards.names == ["mine", "regex"]
    assert rewards.weights == [2.0, 0.5]
    assert RewardSet([reward(lengths)]).weights == [1.0]
    assert RewardSet([reward(lengths)]).score([], []).shape == (0, 1)


def test_tensors_are_taken_without_their_graph():
    weight = torch.ones((), requires_grad=True, dtype=torch.float64)
    scores = RewardSet([reward(lambda responses, records: weight * torch.arange(3))]).score(TEXTS, RECORDS)
    assert not scores.requires_grad
    assert scores[:, 0].tolist() == [0, 1, 2]


def test_our_rewards_follow_the_protocol():
    assert isinstance(RegexReward("a"), Reward)
    assert isinstance(reward(lengths), Reward)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_name_reward_and_record(value):
    rewards = RewardSet([reward(lambda responses, records: [0.0, value, 0.0])])
    with pytest.raises(DataError, match=r"reward 'mine' must return finite numbers, found .*d\.jsonl:2 \(key k1\), response 'bb'"):
        rewards.score(TEXTS, RECORDS)


def test_an_exception_names_reward_and_record():
    def fail(responses, records):
        return [1 / (len(response) - 2) for response in responses]

    with pytest.raises(DataError, match=r"reward 'mine' raised ZeroDivisionError: .*\(at d\.jsonl:2 \(key k1\), response 'bb'\)"):
        RewardSet([reward(fail)]).score(TEXTS, RECORDS)

    def fail_together(responses, records):
        if len(responses) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(DataError, match=r"RuntimeError: too many .*one of 3 records, none of which fails alone"):
        RewardSet([reward(fail_together)]).score(TEXTS, RECORDS)


@pytest.mark.parametrize("values", [[1.0], [[1.0], [1.0], [1.0]], 1.0])
def test_wrong_shapes(values):
    with pytest.raises(DataError, match=r"reward 'mine' must return one number per response, 3 in all; found shape"):
        RewardSet([reward(lambda responses, records: values)]).score(TEXTS, RECORDS)


def test_values_that_are_no_numbers():
    with pytest.raises(DataError, match=r"reward 'mine' raised TypeError.*d\.jsonl:1"):
        RewardSet([reward(lambda responses, records: [None] * len(responses))]).score(TEXTS, RECORDS)


def test_illegal_sets():
    with pytest.raises(ConfigError, match="at least one reward"):
        RewardSet([])
    with pytest.raises(ConfigError, match="different names, found 'mine' more than once"):
        RewardSet([reward(lengths), reward(lengths)])
    with pytest.raises(ConfigError, match=r"one weight per reward \(mine\), found 2"):
        RewardSet([reward(lengths)], [1, 2])
    with pytest.raises(ConfigError, match="weights must be finite"):
        RewardSet([reward(lengths)], [float("nan")])
    with pytest.raises(ConfigError, match="wrap a function in FunctionReward"):
        RewardSet([lengths])


class Picky:
    name = "picky"

    def skip_reason(self, record):
        return "odd" if record.prompt in ("1", "3") else None

    def __call__(self, responses, records):
        return [0.0] * len(responses)


def test_select_leaves_records_out_and_says_why(caplog):
    with caplog.at_level(logging.WARNING):
        assert RewardSet([Picky(), reward(lengths)]).select(RECORDS) == [0, 2]
    assert "1 of 3 records left out by rewards: picky: odd (1)" in caplog.text
    assert RewardSet([reward(lengths)]).select(RECORDS) == [0, 1, 2]
    with pytest.raises(DataError, match=r"the rewards leave out all 1 records: picky: odd \(1\)"):
        RewardSet([Picky()]).select(RECORDS[1:2])


class Abstains(Reward):
    name = "abstains"

    def __call__(self, responses, records):
        return [1.0] * len(responses)

    def score_or_abstain(self, responses, records):
        return [None, 2.0, 3.0]


@pytest.mark.parametrize("reward_", [Abstains(), FunctionReward(lambda r, _: [None, 2.0, 3.0], may_abstain=True, name="f")])
def test_a_reward_may_abstain(reward_):
    rewards = RewardSet([reward_, RegexReward("a")], [2.0, 1.0])
    columns = rewards.score(TEXTS, RECORDS)
    assert columns[:, 0].isnan().tolist() == [True, False, False]
    assert rewards.total(columns).tolist() == [float(c) if i == 0 else 2.0 * (i + 1) + float(c) for i, c in enumerate(columns[:, 1])]
    alone = RewardSet([reward_])
    assert alone.total(alone.score(TEXTS, RECORDS)).isnan().tolist() == [True, False, False]
