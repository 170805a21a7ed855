import pytest
import torch
from scipy.stats import wasserstein_distance

from aapa_lightning.modules.evaluation import Evaluator
from aapa_lightning.rewards.base import Reward
from aapa_lightning.rewards.compose import RewardSet
from aapa_lightning.types import Record, Rollouts


class Length(Reward):
    name = "length"

    def __call__(self, responses, records):
        return [float(len(response)) for response in responses]


class Starts(Reward):
    """Looks at the record too."""

    name = "starts"

    def __call__(self, responses, records):
        return torch.tensor([float(text.startswith(str(record.prompt))) for text, record in zip(responses, records, strict=True)])


class Judge(Starts):
    name = "well_formed"


def rollouts(texts: list[str], truncated: list[bool]) -> Rollouts:
    """One token a character."""
    lengths = torch.tensor([len(text) for text in texts])
    count, width = len(texts), int(lengths.max())
    mask = torch.arange(width) < lengths[:, None]
    zeros = torch.zeros(count, width, dtype=torch.int64)
    ones = torch.ones(count, 1, dtype=torch.bool)
    records = [Record("a")] * count
    return Rollouts(zeros[:, :1], ones, zeros, mask, torch.tensor(truncated), torch.arange(count), zeros.float(), zeros, texts, records)


BATCHES = [(["ab", "b", "abcd"], [False, True, False]), (["a"], [True])]
EXPERTS = [
    (torch.tensor([[-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0]]), torch.tensor([[True, True, False], [True, False, False]])),
    (torch.tensor([[-4.0, -6.0]]), torch.tensor([[False, True]])),
]


def evaluator(**kwargs) -> Evaluator:
    return Evaluator(RewardSet([Length(), Starts()], [1.0, -2.0]), [Judge()], torch.device("cpu"), **kwargs)


def test_figures_are_means_over_responses_and_tokens_not_over_batches() -> None:
    one = evaluator()
    for batch in BATCHES:
        one.add_rollouts(rollouts(*batch))
    for batch in EXPERTS:
        one.add_experts(*batch)
    figures = one.compute(generated=True, experts=True)
    assert figures == pytest.approx(
        {
            "response_length": 8 / 4,
            "truncated": 2 / 4,
            "reward": (8 - 2 * 3) / 4,
            "rewards/length": 8 / 4,
            "rewards/starts": 3 / 4,
            "well_formed": 3 / 4,
            "expert_logprob": -(1 + 2 + 3 + 6) / 4,
            "length_distance": wasserstein_distance([2, 1, 4, 1], [2, 1, 1]),
        },
        rel=1e-6,
    )


def test_only_what_was_measured_is_reported() -> None:
    one = evaluator()
    one.add_experts(*EXPERTS[0])
    assert set(one.compute(generated=False, experts=True)) == {"expert_logprob"}
    one = Evaluator(None, [], torch.device("cpu"))
    one.add_rollouts(rollouts(*BATCHES[0]))
    assert one.compute(generated=True, experts=False) == pytest.approx({"response_length": 7 / 3, "truncated": 1 / 3})


def test_pairs_are_counted_one_by_one() -> None:
    """A tie is half right; figures are means over pairs, not over batches."""
    one = evaluator()
    one.add_pairs(torch.tensor([-1.0, -4.0, -2.0, -2.0, -3.0, -2.0]))
    one.add_pairs(torch.tensor([-1.0, -5.0]))
    figures = one.compute(generated=False, experts=False, pairs=True)
    assert figures == pytest.approx({"pair_accuracy": 2.5 / 4, "chosen_logprob": -8 / 4, "rejected_logprob": -12 / 4})


def test_judges_need_names_of_their_own() -> None:
    from aapa_lightning.errors import ConfigError

    with pytest.raises(ConfigError, match="different names"):
        Evaluator(None, [Judge(), Judge()], torch.device("cpu"))


def test_autocast_rounds_no_figure() -> None:
    one = evaluator()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one.add_rollouts(rollouts(["b" * 1001], [False]))
    assert one.compute(generated=True, experts=False)["reward"] == 1001.0
