import pytest
import torch

from aapa_lightning.data.encode import PromptFormat, encode_prompt
from aapa_lightning.loop.experience import Experience
from aapa_lightning.loop.loader import WindowStep
from aapa_lightning.loop.plan import WindowPlan
from aapa_lightning.loop.window import open_window, policy_inputs, restore_window, rollout_requests
from aapa_lightning.objectives.correction import CorrectionOptions
from aapa_lightning.reduce import StepCounts
from aapa_lightning.types import Demonstration, Record


def experience_of(rollouts, **kwargs) -> Experience:
    mask = rollouts.response_mask & ~rollouts.truncated[:, None]
    return Experience(rollouts, mask, torch.zeros(len(rollouts), 1), torch.arange(float(len(rollouts))), **kwargs)


def demonstration(learned: int) -> Demonstration:
    return Demonstration(list(range(3, 6 + learned)), [False] * 3 + [True] * learned, Record("p", ("e",)))


PLAN = WindowPlan(prompts=4, samples=2, minibatches=2, passes=2, demonstrations=2, accumulate=2)
LENGTHS = [3, 1, 2, 5, 0, 4, 1, 2]
LEARNED = [2, 3, 1, 1, 4, 0, 5, 2]


@pytest.fixture
def window(make_rollouts):
    rollouts = make_rollouts([2] * 8, LENGTHS, group=2, truncated=(3,))
    return open_window(5, PLAN, experience_of(rollouts), [demonstration(n) for n in LEARNED])


def test_counts_are_those_of_the_optimiser_step(window) -> None:
    # minibatch 0: prompts 0 and 1 (row 3 is truncated and masked), minibatch 1: prompts 2 and 3 (row 4 is empty)
    expected = [StepCounts(6.0, 3.0), StepCounts(7.0, 3.0)]
    # a step's two micro-steps take one demonstration each; one of them has nothing to learn
    imitated = [StepCounts(5.0, 2.0), StepCounts(2.0, 2.0), StepCounts(4.0, 1.0), StepCounts(7.0, 2.0)]
    for micro_step in range(8):
        experience, counts = window.rollouts_of(micro_step)
        assert counts == expected[micro_step // 2 % 2]
        assert experience.rollouts.group_ids.tolist() == [micro_step % 4] * 2
        rows, counts = window.demonstrations_of(micro_step)
        assert counts == imitated[micro_step // 2]
        assert [sum(row.response_mask) for row in rows] == [LEARNED[micro_step]]


def test_counts_are_summed_over_ranks_in_one_reduction(make_rollouts) -> None:
    calls: list[torch.Tensor] = []

    def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
        calls.append(value)
        return value * 3 + 1

    rollouts = make_rollouts([1, 1], [2, 3], group=2)
    plan = WindowPlan(prompts=3, samples=2, demonstrations=3, world_size=3)
    window = open_window(0, plan, experience_of(rollouts), [demonstration(4)], sum_over_ranks)
    assert len(calls) == 1
    assert window.rollouts_of(0)[1] == StepCounts(16.0, 7.0)
    assert window.demonstrations_of(0)[1] == StepCounts(13.0, 4.0)


def test_the_layout_does_not_change_the_counts(make_rollouts) -> None:
    rollouts = make_rollouts([2] * 8, LENGTHS, group=2)
    plans = [WindowPlan(prompts=4, samples=2, minibatches=2, accumulate=a) for a in (1, 2)]
    found = [open_window(0, plan, experience_of(rollouts), []) for plan in plans]
    assert torch.equal(found[0].rollout_counts, found[1].rollout_counts)


def test_a_window_without_rollouts(make_rollouts) -> None:
    window = open_window(0, WindowPlan(demonstrations=1), None, [demonstration(2)])
    assert window.demonstrations_of(0)[1] == StepCounts(2.0, 1.0)
    with pytest.raises(RuntimeError, match="no rollouts"):
        window.rollouts_of(0)


def test_state_survives_a_checkpoint(window, tmp_path) -> None:
    torch.save(window.state(), tmp_path / "w.ckpt")
    state = torch.load(tmp_path / "w.ckpt", weights_only=True)
    records = window.experience.rollouts.records
    step = WindowStep(5, 3, list(enumerate(records[::2])), [])
    again = restore_window(state, PLAN, step, window.demonstrations, torch.device("cpu"))
    assert again.number == 5
    assert again.experience.rollouts.records == records
    for micro_step in range(8):
        (one, counts), (other, other_counts) = window.rollouts_of(micro_step), again.rollouts_of(micro_step)
        assert counts == other_counts
        assert torch.equal(one.rollouts.response_ids, other.rollouts.response_ids)
        assert torch.equal(one.loss_mask, other.loss_mask)
        assert window.demonstrations_of(micro_step) == again.demonstrations_of(micro_step)


BOTH = WindowPlan(prompts=2, samples=2, minibatches=2, demonstrations=2, sample_demonstrations=True, accumulate=1)
#: Four rows to prompts, then four for each step's two demonstrations; row 5 is truncated and masked.
BOTH_LENGTHS = [3, 1, 2, 5, 2, 3, 1, 1, 4, 0, 6, 2]


@pytest.fixture
def both(make_rollouts):
    rollouts = make_rollouts([2] * 12, BOTH_LENGTHS, group=2, truncated=(5,))
    return open_window(3, BOTH, experience_of(rollouts), [demonstration(n) for n in (2, 3, 1, 4)])


def test_responses_to_demonstrations_have_rows_and_counts_of_their_own(both) -> None:
    expected = [StepCounts(4.0, 3.0), StepCounts(12.0, 3.0)]
    for micro_step in range(2):
        experience, counts = both.sampled_of(micro_step)
        assert counts == expected[micro_step]
        assert experience.rollouts.group_ids.tolist() == [[2, 2, 3, 3], [4, 4, 5, 5]][micro_step]
        assert experience.rollouts.lengths.tolist() == BOTH_LENGTHS[4 + 4 * micro_step : 8 + 4 * micro_step]
        assert both.rollouts_of(micro_step)[1] == [StepCounts(4.0, 2.0), StepCounts(7.0, 2.0)][micro_step]


def test_counts_of_responses_to_demonstrations_are_summed_over_ranks(make_rollouts) -> None:
    rollouts = make_rollouts([2] * 12, BOTH_LENGTHS, group=2)
    window = open_window(0, BOTH, experience_of(rollouts), [demonstration(1)] * 4, lambda value: value * 10)
    assert [window.sampled_of(i)[1] for i in range(2)] == [StepCounts(70.0, 40.0), StepCounts(120.0, 30.0)]


def test_responses_to_demonstrations_survive_a_checkpoint(both, tmp_path) -> None:
    torch.save(both.state(), tmp_path / "w.ckpt")
    records = both.experience.rollouts.records[::2]
    step = WindowStep(3, 1, list(enumerate(records[:2])), list(enumerate(records[2:], start=2)))
    again = restore_window(torch.load(tmp_path / "w.ckpt", weights_only=True), BOTH, step, both.demonstrations, torch.device("cpu"))
    assert again.experience.rollouts.records == both.experience.rollouts.records
    for micro_step in range(2):
        (one, counts), (other, other_counts) = both.sampled_of(micro_step), again.sampled_of(micro_step)
        assert counts == other_counts
        assert torch.equal(one.rollouts.response_ids, other.rollouts.response_ids)
        assert torch.equal(one.advantages, other.advantages)


def test_a_window_that_samples_to_prompts_alone_counts_nothing_else(window) -> None:
    assert window.sampled_counts.tolist() == [[0, 0]] * 4


def test_requests_carry_slot_record_and_tokens(tiny_tokenizer) -> None:
    records = [Record("abc"), Record("def")]
    step, plan = WindowStep(0, 0, [(4, records[0]), (7, records[1])]), WindowPlan(prompts=2, samples=3)
    requests = rollout_requests(tiny_tokenizer, step, PromptFormat(), plan)
    assert [(request.slot, request.record, request.samples) for request in requests] == [(4, records[0], 3), (7, records[1], 3)]
    assert [request.prompt_ids for request in requests] == [encode_prompt(tiny_tokenizer, record, PromptFormat()) for record in records]
    step = WindowStep(0, 0, [(0, records[0])], [(1, records[1])])
    for sampled, slots in ((False, [0]), (True, [0, 1])):
        plan = WindowPlan(prompts=1, samples=3, demonstrations=1, sample_demonstrations=sampled)
        assert [request.slot for request in rollout_requests(tiny_tokenizer, step, PromptFormat(), plan)] == slots


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


def test_without_old_logprobs_the_ratio_is_one_and_the_gradient_lives(model, make_rollouts) -> None:
    experience = experience_of(make_rollouts([3, 1], [2, 4], truncated=(1,)))
    inputs = policy_inputs(model, experience, torch.tensor([1.0, -2.0]), 0.7)
    assert torch.equal(inputs.logprobs.detach(), inputs.old_logprobs)
    assert inputs.logprobs.requires_grad
    assert not inputs.old_logprobs.requires_grad
    assert inputs.advantages.tolist() == [[1.0] * 4, [-2.0] * 4]
    assert torch.equal(inputs.response_mask, experience.loss_mask)
    assert inputs.entropy is inputs.ref_logprobs is None


def test_the_correction_uses_the_old_logprobs_and_the_trained_tokens(model, make_rollouts) -> None:
    rollouts = make_rollouts([3, 1], [2, 4], truncated=(1,))
    experience = experience_of(rollouts)
    plain = policy_inputs(model, experience, torch.tensor([1.0, -2.0]), 0.7, correction=CorrectionOptions())
    assert (plain.weights, plain.weight_metrics) == (None, {})
    rollouts.engine_logprobs = plain.old_logprobs - torch.tensor([[0.25], [0.5]])
    inputs = policy_inputs(model, experience, torch.tensor([1.0, -2.0]), 0.7, correction=CorrectionOptions("truncate"))
    kept = experience.loss_mask
    torch.testing.assert_close(inputs.weights, torch.tensor([[0.25], [0.5]]).exp() * kept)
    torch.testing.assert_close(inputs.weight_metrics["engine_weight"], inputs.weights)
    experience.old_logprobs = rollouts.engine_logprobs.clone()  # of several updates per window
    assert torch.equal(policy_inputs(model, experience, torch.ones(2), 0.7, correction=CorrectionOptions("mask")).weights, kept.float())


def test_what_is_held_is_used(model, make_rollouts) -> None:
    rollouts = make_rollouts([3, 1], [2, 4])
    held = torch.randn(2, 4)
    per_token = torch.arange(8.0).reshape(2, 4)
    inputs = policy_inputs(model, experience_of(rollouts, old_logprobs=held, ref_logprobs=held - 1), per_token, 0.7, entropy=True)
    assert inputs.old_logprobs is held
    assert torch.equal(inputs.ref_logprobs, held - 1)
    assert torch.equal(inputs.advantages, per_token)
    assert not inputs.entropy.requires_grad
    entropy = policy_inputs(model, experience_of(rollouts), per_token, 0.7, entropy=True, entropy_grad=True).entropy
    assert entropy.requires_grad
    assert torch.equal(entropy.detach(), inputs.entropy)
