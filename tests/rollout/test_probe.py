"""The probe of an engine's weights: what passes, what stops, and that it leaves everything else alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from aapa_lightning.errors import ConfigError
from aapa_lightning.rollout.base import RolloutEngine
from aapa_lightning.rollout.probe import WeightProbe, draw_probe, takes_weights
from aapa_lightning.rollout.replica import ReplicaEngine
from aapa_lightning.rollout.transformers_engine import TransformersEngine


@pytest.fixture
def policy(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).train()


@pytest.fixture
def engine(policy, tiny_tokenizer):
    return ReplicaEngine(policy, tiny_tokenizer, (tiny_tokenizer.eos_token_id,))


class Own(RolloutEngine):
    """An engine of a user: answers with a model of its own, which ``sync`` may or may not bring up to date."""

    def __init__(self, engine, change=lambda rollouts: rollouts):
        self.engine, self.change, self.asked = engine, change, 0

    def sync(self, step):
        return

    def generate(self, requests, params, *, seed, window):
        self.asked += 1
        return self.change(self.engine.generate(requests, params, seed=seed, window=window))


def _move(model, size):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def test_a_copy_that_is_brought_up_to_date_passes_at_every_step(policy, engine, tiny_tokenizer):
    probe = WeightProbe(1e-4)
    for step in range(3):
        engine.sync(step)
        probe.check(engine, policy, tiny_tokenizer, step)
        assert probe.gap == 0.0
        _move(policy, 0.05)


def test_the_gap_is_the_mean_over_the_answers_tokens(policy, engine, tiny_tokenizer):
    engine.sync(0)
    before = draw_probe(engine, tiny_tokenizer)
    _move(policy, 0.02)
    gaps = []
    for row in range(len(before)):
        prompt, ids = before.prompt_ids[row][before.prompt_mask[row]], before.response_ids[row][before.response_mask[row]]
        with torch.no_grad():
            logits = policy(torch.cat([prompt, ids])[None]).logits[0].double()
        own = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, ids[:, None])[:, 0]
        gaps += (own - before.engine_logprobs[row][before.response_mask[row]]).abs().tolist()
    probe = WeightProbe(10.0)
    probe.check(engine, policy, tiny_tokenizer, 0)
    assert probe.gap == pytest.approx(sum(gaps) / len(gaps), abs=1e-4)
    assert probe.gap > 0.01
    with pytest.raises(ConfigError, match=r"weights of step 7 its log-probs .* engine_tolerance is 0\.005"):
        WeightProbe(0.005).check(engine, policy, tiny_tokenizer, 7)


def test_answers_that_stay_while_the_policy_moves_are_found_below_the_bound(policy, engine, tiny_tokenizer):
    engine.sync(0)
    own, probe = Own(engine), WeightProbe(5.0)
    probe.check(own, policy, tiny_tokenizer, 0)
    probe.check(own, policy, tiny_tokenizer, 1)  # a policy that stayed: so may the answers
    _move(policy, 0.1)
    with pytest.raises(ConfigError, match=r"weights of step 2 its answers to a fixed prompt are the same to the bit"):
        probe.check(own, policy, tiny_tokenizer, 2)
    assert 0.5 < probe.gap < 5.0


def test_an_engine_is_asked_once_a_step_and_anew_when_weights_are_exchanged(policy, engine, tiny_tokenizer):
    engine.sync(0)
    own, probe = Own(engine), WeightProbe(1.0)
    for step in (0, 0, 1, 1):
        probe.check(own, policy, tiny_tokenizer, step)
    assert own.asked == 2
    probe.forget()
    probe.check(own, policy, tiny_tokenizer, 1)
    assert own.asked == 3


def test_only_engines_that_hold_weights_are_asked(policy, engine, tiny_tokenizer):
    embedded = TransformersEngine(policy, tiny_tokenizer, (tiny_tokenizer.eos_token_id,))
    assert [takes_weights(each) for each in (embedded, engine, Own(engine))] == [False, True, True]
    probe = WeightProbe(0.0)
    probe.check(embedded, policy, tiny_tokenizer, 0)
    assert probe.gap is None
    WeightProbe(None).check(Own(None), policy, tiny_tokenizer, 0)
    with pytest.raises(ConfigError, match="engine_tolerance: expected a finite number, at least 0, found nan"):
        WeightProbe(math.nan)


def test_tokens_without_a_log_prob_are_left_out(policy, engine, tiny_tokenizer):
    engine.sync(0)

    def unknown(rollouts):
        values = rollouts.engine_logprobs.clone()
        values[:, 0] = math.nan
        return replace(rollouts, engine_logprobs=values)

    probe = WeightProbe(1e-3)
    probe.check(Own(engine, unknown), policy, tiny_tokenizer, 0)
    assert probe.gap == 0.0
    nothing = WeightProbe(1e-3)
    nothing.check(Own(engine, lambda r: replace(r, engine_logprobs=r.engine_logprobs * math.nan)), policy, tiny_tokenizer, 0)
    assert nothing.gap is None


def test_ranks_share_one_verdict(policy, engine, tiny_tokenizer):
    """The other rank's engine is far off: this one's run stops too."""
    engine.sync(0)
    with pytest.raises(ConfigError, match="are 2 nats a token"):
        WeightProbe(0.1).check(engine, policy, tiny_tokenizer, 0, lambda sums: sums + torch.tensor([4.0 * sums[1], sums[1], 0.0]))


def test_the_probe_leaves_model_and_random_states_alone(policy, engine, tiny_tokenizer):
    engine.sync(0)
    policy.model.layers[0].eval()
    modes, state = [module.training for module in policy.modules()], torch.get_rng_state()
    WeightProbe(1.0).check(engine, policy, tiny_tokenizer, 0)
    assert [module.training for module in policy.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in policy.parameters())
