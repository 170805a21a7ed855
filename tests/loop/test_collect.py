import warnings
from dataclasses import fields

import pytest
import torch

from aapa_lightning.anchor.term import AnchorTerm
from aapa_lightning.errors import ConfigError
from aapa_lightning.loop.collect import AdvantageOptions, collect
from aapa_lightning.loop.experience import Experience, slice_rollouts
from aapa_lightning.rewards.base import Reward
from aapa_lightning.rewards.compose import RewardSet
from aapa_lightning.rollout.base import RolloutRequest, SamplingParams
from aapa_lightning.types import Record, Rollouts

#: Two groups of two: rewards are response lengths.
LENGTHS = [2, 4, 1, 5]
REQUESTS = [RolloutRequest([3], Record(f"prompt {i}"), i, 2) for i in range(2)]


class FakeEngine:
    """Returns what it was given and remembers how it was asked."""

    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts = rollouts
        self.asked: dict = {}

    def generate(self, requests, params, *, seed, window) -> Rollouts:
        assert not torch.is_grad_enabled()
        self.asked = {"requests": requests, "params": params, "seed": seed, "window": window}
        return self.rollouts


class Length(Reward):
    name = "length"

    def __call__(self, responses, records):
        return [float(len(response)) for response in responses]


class Even(Reward):
    name = "even"

    def __call__(self, responses, records):
        return [float(len(response) % 2 == 0) for response in responses]


class FakeDiscriminator:
    """Scores a response by hand-picked logits."""

    needs_experts = False
    whole_response = True
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])

    def score(self, responses, records, spans):
        return self.logits[spans.response_index]

    def fingerprint(self) -> str:
        return "fake"

    def to(self, device):
        return self

    def save(self, folder) -> None: ...


@pytest.fixture
def rollouts(make_rollouts) -> Rollouts:
    return make_rollouts([1, 1, 1, 1], LENGTHS, group=2, truncated=(1,))


def run(rollouts: Rollouts, **kwargs) -> Experience:
    settings = {"sampling": SamplingParams(), "seed": 0, "window": 0, "rewards": RewardSet([Length()])} | kwargs
    return collect(REQUESTS, engine=FakeEngine(rollouts), **settings)


def test_rewards_become_advantages_of_their_group(rollouts) -> None:
    experience = run(rollouts, rewards=RewardSet([Length(), Even()], [1.0, 10.0]), options=AdvantageOptions(scale="none"))
    assert experience.rewards.tolist() == [[2, 1], [4, 1], [1, 0], [5, 0]]
    assert experience.advantages.tolist() == pytest.approx([-1, 1, -2, 2])
    grouped = run(rollouts).advantages  # (2, 4): mean 3, deviation sqrt 2; (1, 5): mean 3, deviation sqrt 8
    assert grouped.tolist() == pytest.approx([-1 / (2**0.5 + 1e-4), 1 / (2**0.5 + 1e-4), -2 / (8**0.5 + 1e-4), 2 / (8**0.5 + 1e-4)])
    metrics = experience.metrics
    assert metrics["rewards/length"] == 3.0
    assert metrics["rewards/even"] == 0.5
    assert metrics["reward"] == pytest.approx(8.0)
    assert metrics["response_length"] == 3.0
    assert metrics["truncated"] == 0.25


def test_the_engine_is_asked_once_with_everything(rollouts) -> None:
    engine = FakeEngine(rollouts)
    params = SamplingParams(temperature=0.5)
    collect(REQUESTS, engine=engine, sampling=params, seed=7, window=9)
    assert engine.asked == {"requests": REQUESTS, "params": params, "seed": 7, "window": 9}


def test_truncated_responses_leave_the_loss_but_not_the_group(rollouts) -> None:
    kept, masked = run(rollouts), run(rollouts, options=AdvantageOptions(mask_truncated=True))
    assert torch.equal(kept.loss_mask, rollouts.response_mask)
    assert masked.loss_mask.sum(-1).tolist() == [2, 0, 1, 5]
    assert torch.equal(kept.advantages, masked.advantages)


def test_without_rewards_the_task_has_no_say(rollouts) -> None:
    experience = run(rollouts, rewards=None)
    assert experience.advantages.tolist() == [0, 0, 0, 0]
    assert experience.scores is experience.anchor_advantages is experience.old_logprobs is experience.ref_logprobs is None


def test_rescored_logprobs_are_kept(rollouts) -> None:
    old, reference = torch.zeros(4, 5), torch.ones(4, 5)
    experience = run(rollouts, rescore=lambda found: (old, reference))
    assert experience.old_logprobs is old
    assert experience.ref_logprobs is reference


def test_k1_in_the_reward(rollouts) -> None:
    old = torch.arange(20.0).reshape(4, 5) / 10
    reference = old - torch.tensor([[0.1], [0.2], [-0.3], [0.0]])
    options = AdvantageOptions(scale="none", reward_kl=0.5)
    experience = run(rollouts, options=options, rescore=lambda found: (old, reference))
    # sums over the response of log pi - log ref: 2 x 0.1, 4 x 0.2, 1 x -0.3, 0
    penalties = [0.2, 0.8, -0.3, 0.0]
    assert experience.rewards[:, 1].tolist() == pytest.approx(penalties, abs=1e-6)
    totals = [length - 0.5 * penalty for length, penalty in zip(LENGTHS, penalties, strict=True)]
    expected = [totals[i] - sum(totals[i // 2 * 2 : i // 2 * 2 + 2]) / 2 for i in range(4)]
    assert experience.advantages.tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ConfigError, match="reward_kl needs the old and the reference"):
        run(rollouts, options=options)


def anchor(**kwargs) -> AnchorTerm:
    return AnchorTerm(FakeDiscriminator(), **({"transform": "score", "scale": "fixed"} | kwargs))


def test_the_anchor_scores_and_leaves_the_task_alone(rollouts) -> None:
    bare, anchored = run(rollouts), run(rollouts, anchor=anchor(), anchor_weight=0.3)
    assert torch.equal(bare.advantages, anchored.advantages)
    assert torch.equal(bare.rewards, anchored.rewards)
    assert anchored.scores.tolist() == [0.5, -1.0, 2.0, 0.0]
    per_response = torch.tensor([0.75, -0.75, 1.0, -1.0])
    assert torch.equal(anchored.anchor_advantages, (per_response[:, None] * rollouts.response_mask))
    assert any(name.startswith("anchor/") for name in anchored.metrics)
    for field in fields(Experience):
        value = getattr(anchored, field.name)
        assert not isinstance(value, torch.Tensor) or not value.requires_grad


def test_the_anchor_as_a_reward(rollouts) -> None:
    options = AdvantageOptions(scale="none")
    experience = run(rollouts, anchor=anchor(combine="reward"), anchor_weight=2.0, options=options)
    totals = [length + 2 * logit for length, logit in zip(LENGTHS, FakeDiscriminator.logits.tolist(), strict=True)]
    assert experience.advantages.tolist() == pytest.approx(
        [(totals[0] - totals[1]) / 2, (totals[1] - totals[0]) / 2, (totals[2] - totals[3]) / 2, (totals[3] - totals[2]) / 2]
    )
    assert experience.rewards[:, 1].tolist() == [0.5, -1.0, 2.0, 0.0]
    off = run(rollouts, anchor=anchor(combine="reward"), anchor_weight=0.0, options=options)
    assert torch.equal(off.advantages, run(rollouts, options=options).advantages)


def test_only_the_first_requests_are_rewarded(rollouts) -> None:
    """The task is worked out from the first group alone, whatever the second group's responses are; the anchor scores both."""
    rewards, options = RewardSet([Length(), Even()], [1.0, 10.0]), AdvantageOptions(scale="batch", reward_kl=0.5)
    old = torch.arange(20.0).reshape(4, 5) / 10
    rescored = {"rescore": lambda found: (old[: len(found)], old[: len(found)] - 0.1), "rewards": rewards, "options": options}
    watched = []

    class Watched(AnchorTerm):
        def observe(self, rollouts, signal, task_rewards=None, **kwargs):
            watched.append((rollouts, signal, task_rewards))
            return super().observe(rollouts, signal, task_rewards, **kwargs)

    term = Watched(FakeDiscriminator(), transform="score", scale="fixed")
    experience = run(rollouts, rewarded=1, anchor=term, anchor_weight=0.3, **rescored)
    first = slice_rollouts(rollouts, slice(2))
    alone = collect(REQUESTS[:1], engine=FakeEngine(first), sampling=SamplingParams(), seed=0, window=0, **rescored)
    assert torch.equal(experience.advantages, torch.cat([alone.advantages, torch.zeros(2)]))
    assert torch.equal(experience.rewards[:2], alone.rewards)
    assert experience.rewards.shape == (4, 3)
    assert experience.rewards[2:].isnan().all()
    assert {name: experience.metrics[name] for name in alone.metrics} == alone.metrics
    assert torch.equal(experience.scores, FakeDiscriminator.logits)
    assert experience.anchor_advantages[2:, 0].tolist() == [1.0, -1.0]
    assert torch.equal(experience.loss_mask, rollouts.response_mask)
    assert torch.equal(experience.old_logprobs, old)
    ((seen, signal, totals),) = watched
    assert seen.texts == first.texts
    assert torch.equal(signal.scores, FakeDiscriminator.logits[:2])
    assert totals.tolist() == pytest.approx([12.0, 14.0])


def test_the_anchor_as_a_reward_of_the_first_requests(rollouts) -> None:
    experience = run(rollouts, rewarded=1, anchor=anchor(combine="reward"), anchor_weight=2.0, options=AdvantageOptions(scale="none"))
    assert experience.rewards[:2].tolist() == [[2.0, 0.5], [4.0, -1.0]]
    assert experience.advantages.tolist() == pytest.approx([0.5, -0.5, 0.0, 0.0])


def test_truncated_sampling_warns(rollouts) -> None:
    for sampling in (SamplingParams(top_p=0.9), SamplingParams(top_k=5)):
        with pytest.warns(UserWarning, match="biases the gradient"):
            run(rollouts, sampling=sampling)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(rollouts)


def test_the_logged_reward_is_the_tasks_alone(rollouts) -> None:
    experience = run(rollouts, anchor=anchor(combine="reward"), anchor_weight=2.0)
    assert experience.metrics["reward"] == 3.0  # the mean length; with the anchor's column it would be 3.75


def test_autocast_rounds_no_reward(rollouts) -> None:
    seen = []

    class Watched(AnchorTerm):
        def observe(self, rollouts, signal, task_rewards=None, **kwargs):
            seen.append(task_rewards)
            return super().observe(rollouts, signal, task_rewards, **kwargs)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        experience = run(rollouts, rewards=RewardSet([Length(), Even()], [1.001, 0.37]), anchor=Watched(FakeDiscriminator()))
    totals = [1.001 * length + 0.37 * (length % 2 == 0) for length in LENGTHS]
    assert experience.metrics["reward"] == pytest.approx(sum(totals) / len(totals), rel=1e-6)
    torch.testing.assert_close(seen[0], torch.tensor(totals))


def test_the_loss_finds_no_weight_that_was_cast_without_gradient(rollouts) -> None:
    """Under autocast a cast of a weight is kept; one made while sampling has no way back to the weight in torch 2.9."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._to_copy.default
            return func(*args, **(kwargs or {}))

    layer, inputs = torch.nn.Linear(2, 2, bias=False), torch.ones(1, 2, dtype=torch.bfloat16)

    def rescore(rollouts):
        layer(inputs)
        return None, None

    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(rollouts, rescore=rescore)
        with Casts() as casts:
            layer(inputs)
    assert casts.count == 1


class Abstains(Length):
    """Scores no response that is marked."""

    name = "abstains"

    def score_or_abstain(self, responses, records):
        return [None if text.startswith(responses[0]) else value for text, value in zip(responses, self(responses, records), strict=True)]


@pytest.mark.parametrize("combine", ["loss", "advantage", "reward"])
def test_what_no_reward_could_score_gets_no_advantage_whatever_the_anchor_joins(rollouts, combine) -> None:
    rollouts.texts[0] = rollouts.texts[1] = "unscored"
    options = AdvantageOptions(scale="none", reward_kl=0.5)
    zeros = torch.zeros_like(rollouts.engine_logprobs)
    rewards = RewardSet([Abstains()])
    experience = run(
        rollouts, rewards=rewards, options=options, anchor=anchor(combine=combine), anchor_weight=1.0, rescore=lambda _: (zeros, zeros)
    )
    assert experience.rewards[:2, 0].isnan().all()
    assert experience.advantages[:2].tolist() == [0.0, 0.0]
    assert experience.advantages[2:].abs().min() > 0
    assert all(torch.tensor(value).isfinite() for value in experience.metrics.values()), experience.metrics
    assert experience.metrics["rewards/abstains"] == experience.metrics["guard/task_reward"] == pytest.approx(3.0)
