"""``AnchorTerm`` from rollouts to signal, what it refuses, and what it remembers."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from aapa_lightning.anchor.guard import Guard
from aapa_lightning.anchor.schedule import Adaptive, Linear
from aapa_lightning.anchor.segment import Segmenter
from aapa_lightning.anchor.term import AnchorTerm
from aapa_lightning.errors import ConfigError, DataError
from aapa_lightning.reduce import StepCounts, aggregate
from aapa_lightning.types import TokenLossInputs

TEXTS = ["One two. Three four five six.", "One two three four.", "One.", "One two three. One two."]


class Bank:
    def __init__(self, fingerprint, table):
        self.fingerprint, self.table = fingerprint, table

    def expert_logits(self, record):
        return self.table.get(record.prompt)


def test_signal_by_hand(make_rollouts, word_judge):
    rollouts = make_rollouts(TEXTS, [0, 0, 1, 1])
    signal = AnchorTerm(word_judge(), transform="score", scale="fixed").signal(rollouts)
    assert signal.logits.tolist() == [-1.0, 1.0, 1.0, -2.0, 0.0, -1.0]
    torch.testing.assert_close(signal.scores, torch.tensor([0.0, 1.0, -2.0, -0.5]))
    torch.testing.assert_close(signal.advantages[:, 0], torch.tensor([-0.5, 0.5, -0.75, 0.75]))
    assert not signal.advantages.requires_grad
    assert signal.advantages[~rollouts.response_mask].eq(0).all()


def test_bt_gap_subtracts_the_experts_mean(make_rollouts, word_judge):
    judge = word_judge()
    bank = Bank(judge.fingerprint(), {"prompt 0": torch.tensor([1.0, 3.0]), "prompt 1": torch.tensor([-1.0])})
    signal = AnchorTerm(judge, transform="bt_gap", pool="min", scale="fixed", tau=2.0, bank=bank).signal(make_rollouts(TEXTS, [0, 0, 1, 1]))
    gaps = [-1.0 - 2.0, 1.0 - 2.0, -2.0 + 1.0, -1.0 + 1.0]
    torch.testing.assert_close(signal.scores, torch.tensor([-math.log1p(math.exp(-gap / 2)) for gap in gaps]))
    assert signal.metrics["expert_logit"] == pytest.approx(0.5)
    with pytest.raises(DataError, match=r"data\.jsonl:7"):
        AnchorTerm(judge, transform="bt_gap", bank=bank).signal(make_rollouts(TEXTS[:2], [7, 7]))


def test_a_discriminator_that_needs_experts_names_the_record_without(make_rollouts, word_judge):
    judge = word_judge()
    judge.needs_experts = True
    with pytest.raises(DataError, match=r"data.jsonl:3.*expert"):
        AnchorTerm(judge).signal(make_rollouts(TEXTS[:2], [3, 3]))
    AnchorTerm(judge).signal(make_rollouts(TEXTS[:2], [3, 3], experts=("An answer.",)))


def test_a_logit_that_is_not_finite_names_the_record(make_rollouts, word_judge):
    with pytest.raises(DataError, match=r"data.jsonl:4.*nan"):
        AnchorTerm(word_judge(math.nan)).signal(make_rollouts(TEXTS[:2], [4, 4]))


def test_three_lines_in_a_loop_of_ones_own(make_rollouts, word_judge):
    rollouts = make_rollouts(TEXTS, [0, 0, 1, 1])
    logprobs = torch.full(rollouts.response_ids.shape, -1.0, requires_grad=True)
    anchor = AnchorTerm(word_judge(), weight=0.5, transform="score", scale="fixed")
    from aapa_lightning.objectives.surrogate import clipped_surrogate

    signal = anchor.signal(rollouts)
    losses = clipped_surrogate(TokenLossInputs(logprobs, logprobs.detach(), rollouts.response_mask, signal.advantages)).losses
    loss = anchor.weight(0) * aggregate(losses, rollouts.response_mask, "grpo", StepCounts(float(rollouts.lengths.sum()), 4.0))
    loss.backward()
    lengths = rollouts.lengths[:, None]
    torch.testing.assert_close(logprobs.grad, -0.5 * signal.advantages / lengths / 4)


def test_weight_zero_still_scores(make_rollouts, word_judge):
    term = AnchorTerm(word_judge(), weight=0.0)
    rollouts = make_rollouts(TEXTS, [0, 0, 1, 1])
    signal = term.signal(rollouts)
    assert term.weight(5) == 0.0
    assert signal.advantages.abs().sum() > 0
    assert signal.metrics["score_std_within"] > 0
    assert "auroc" not in term.observe(rollouts, signal, torch.ones(4))


def test_frozen_again_at_every_signal_and_unchanged(make_rollouts, word_judge):
    judge = word_judge()
    before = judge.fingerprint()
    term = AnchorTerm(judge)
    assert not judge.weight.requires_grad
    judge.train().requires_grad_(True)
    first, second = (term.signal(make_rollouts(TEXTS, [0, 0, 1, 1])).logits for _ in range(2))
    assert torch.equal(first, second)
    assert not judge.training
    assert not judge.dropout.training
    assert not judge.weight.requires_grad
    assert judge.fingerprint() == before


def test_networks_inside_a_plain_discriminator_are_frozen(word_judge):
    class Encoder:
        def __init__(self):
            self.model = nn.Linear(2, 2)

    class Plain:
        needs_experts = whole_response = False

        def __init__(self):
            self.encoder, self.head = Encoder(), nn.Dropout(0.5)

        def fingerprint(self):
            return "plain"

    judge = Plain()
    AnchorTerm(judge)
    assert not judge.head.training
    assert not judge.encoder.model.training
    assert not judge.encoder.model.weight.requires_grad


def test_scores_do_not_depend_on_autocast(make_rollouts):
    class Matmul(nn.Module):
        needs_experts = whole_response = False

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 1)

        def score(self, responses, records, spans):
            return self.linear(torch.linspace(0, 1, 64 * len(spans.response_index)).view(-1, 64))[:, 0]

        def fingerprint(self):
            return "matmul"

    term, rollouts = AnchorTerm(Matmul()), make_rollouts(TEXTS, [0, 0, 1, 1])
    expected = term.signal(rollouts).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(term.signal(rollouts).logits, expected)


def test_a_judge_of_whole_responses_sees_one_sentence_each(make_rollouts, word_judge):
    judge = word_judge()
    judge.whole_response = True
    signal = AnchorTerm(judge, segmenter=Segmenter(language="de")).signal(make_rollouts(TEXTS, [0, 0, 1, 1]))
    assert signal.logits.tolist() == [3.0, 1.0, -2.0, 2.0]


def test_the_discriminators_own_segmenter_is_the_default(word_judge):
    judge = word_judge()
    assert AnchorTerm(judge).segmenter == Segmenter()
    judge.segmenter = Segmenter(language="de")
    assert AnchorTerm(judge).segmenter.language == "de"
    assert AnchorTerm(judge, segmenter=Segmenter(language="fr")).segmenter.language == "fr"


def test_row_order_padding_and_empty_responses(make_rollouts, word_judge):
    texts, groups, order = [*TEXTS, "", ""], [0, 0, 1, 1, 0, 2], [5, 2, 0, 4, 3, 1]
    for granularity in ("response", "sentence"):
        term = AnchorTerm(word_judge(), granularity=granularity)
        plain = term.signal(make_rollouts(texts, groups, truncated=[False] * 5 + [True]))
        moved = term.signal(make_rollouts([texts[i] for i in order], [groups[i] for i in order], truncated=[i == 5 for i in order], pad=4))
        torch.testing.assert_close(moved.scores, plain.scores[order])
        torch.testing.assert_close(moved.advantages[:, : plain.advantages.shape[1]], plain.advantages[order])
        assert moved.advantages[0].eq(0).all()  # empty, and alone in its group


@pytest.mark.parametrize(
    ("options", "whole", "said"),
    [
        ({"granularity": "sentence", "combine": "reward"}, False, "a reward is one number per response"),
        ({"granularity": "sentence"}, True, "one logit for a whole response"),
        ({"transform": "bt_gap"}, False, "expects a bank"),
        ({"bank": Bank("other", {})}, False, "another discriminator"),
        ({"weight": -1.0}, False, "weight"),
    ],
)
def test_illegal_combinations(word_judge, options, whole, said):
    judge = word_judge()
    judge.whole_response = whole
    with pytest.raises(ConfigError, match=said):
        AnchorTerm(judge, **options)


def test_hosts_that_an_anchor_cannot_join(word_judge):
    term = AnchorTerm(word_judge(), granularity="sentence")
    term.check_host(group_size=2)
    with pytest.raises(ConfigError, match="mix the sentences' credits"):
        term.check_host(group_size=8, ratio_level="sequence")
    AnchorTerm(word_judge()).check_host(group_size=8, ratio_level="sequence")
    with pytest.raises(ConfigError, match="at least 2, found 1"):
        term.check_host(group_size=1)


def test_state_holds_no_weights_and_refuses_another_discriminator(word_judge):
    state = AnchorTerm(word_judge(1.0)).state_dict()
    assert not any(isinstance(value, torch.Tensor) for value in state.values())
    AnchorTerm(word_judge(1.0)).load_state_dict(state)
    with pytest.raises(ConfigError, match="another discriminator"):
        AnchorTerm(word_judge(2.0)).load_state_dict(state)
    with pytest.raises(ConfigError, match="another weight schedule"):
        AnchorTerm(word_judge(1.0), weight=Adaptive(0.3)).load_state_dict(state)


def window_of(make_rollouts, i):
    return make_rollouts([f"{'word ' * (1 + i)}end.", "One two."], [0, 0])


def test_observations_count_once_and_survive_a_restart(make_rollouts, word_judge):
    def build():
        return AnchorTerm(word_judge(), weight=Adaptive(Linear(1.0, 0.5, 10)), guard=Guard(max_length_growth=1.2, patience=2))

    whole, half = build(), build()
    weights = []
    for i in range(6):
        rollouts = window_of(make_rollouts, i)
        whole.observe(rollouts, whole.signal(rollouts), torch.tensor([1.0 - 0.1 * i, 0.5]))
        half.observe(rollouts, half.signal(rollouts), torch.tensor([1.0 - 0.1 * i, 0.5]))
        resumed = build()  # stopped between collecting and the step: restored, and once more observed
        resumed.load_state_dict(half.state_dict())
        half = resumed
        if i % 2:
            half.observe(rollouts, half.signal(rollouts), torch.tensor([1.0 - 0.1 * i, 0.5]))
        assert half.advance() == whole.advance()
        assert half.advance() is None
        assert half.state_dict() == whole.state_dict()
        weights.append(half.weight(0))
    assert whole.windows == 6
    assert whole.trips > 0
    assert weights[-1] < weights[0]


def test_measures_are_logged_without_limits_and_with_a_bank(make_rollouts, word_judge):
    judge = word_judge()
    bank = Bank(judge.fingerprint(), {"prompt 0": torch.tensor([5.0, 7.0])})
    term = AnchorTerm(judge, bank=bank)
    rollouts = make_rollouts(TEXTS, [0, 0, 1, 1], experts=("An answer.",))
    signal = term.signal(rollouts)
    measures = term.observe(rollouts, signal, torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert measures["auroc"] == 1.0
    assert measures["length_growth"] == 1.0
    first, second = ((signal.scores[i] - signal.scores[i + 1]).item() for i in (0, 2))
    assert measures["correlation"] == pytest.approx((first - second) / math.sqrt(2 * (first**2 + second**2)))
    assert set(measures) >= {"length", "length_vs_expert", "entropy", "entropy_ratio", "score_zero_variance", "task_zero_variance"}
    assert term.advance().tripped == ()


def test_dropped_rows(make_rollouts, word_judge):
    rollouts = make_rollouts(TEXTS, [0, 0, 0, 0], truncated=[True, False, False, False])
    dropped = AnchorTerm(word_judge(), truncated="drop").signal(rollouts)
    others = make_rollouts(TEXTS[1:], [0, 0, 0])
    alone = AnchorTerm(word_judge()).signal(others)
    assert dropped.advantages[0].eq(0).all()
    torch.testing.assert_close(dropped.advantages[1:, : alone.advantages.shape[1]], alone.advantages)


def test_sum_over_ranks_is_called_as_promised(make_rollouts, word_judge):
    rollouts, calls = make_rollouts(TEXTS, [0, 0, 1, 1]), []

    def count(value):
        calls.append(value)
        return value

    for scale, expected in (("batch", 1), ("fixed", 0), ("group", 0)):
        calls.clear()
        term = AnchorTerm(word_judge(), scale=scale)
        signal = term.signal(rollouts, sum_over_ranks=count)
        assert len(calls) == expected
        term.observe(rollouts, signal, torch.ones(4), sum_over_ranks=count)
        assert len(calls) == expected + 1
    assert dataclasses.is_dataclass(signal)
