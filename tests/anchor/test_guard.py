"""Measures against independent implementations; limits, patience, restarts and ranks."""

import dataclasses

import numpy as np
import pytest
import torch

from aapa_lightning.anchor.guard import Guard, measure
from aapa_lightning.anchor.segment import Segmenter, segment_rollouts
from aapa_lightning.anchor.signal import AnchorOptions, build_signal
from aapa_lightning.errors import ConfigError

TEXTS = ["One two. Three four five.", "Six seven.", "Eight.", "Nine ten. Eleven."]
LOGITS = [1.0, 3.0, 4.05, -1.0, 0.0, -2.5]
REWARDS = torch.tensor([1.0, 0.0, 1.0, 1.0])


@pytest.fixture
def window(make_rollouts):
    rollouts = make_rollouts(TEXTS, [0, 0, 1, 1], experts=("a" * 10, "b" * 30))
    return rollouts, build_signal(
        torch.tensor(LOGITS), segment_rollouts(rollouts, Segmenter()), rollouts, AnchorOptions(transform="score", scale="fixed")
    )


def test_measures_by_hand(window):
    rollouts, signal = window
    experts = torch.tensor([5.0, 3.05, -3.0])
    found = measure(rollouts, signal, REWARDS, experts)
    assert found["length"] == pytest.approx((6 + 3 + 2 + 4) / 4)
    assert found["length_vs_expert"] == pytest.approx(sum(map(len, TEXTS)) / 80)
    assert found["entropy"] == pytest.approx(0.5)
    assert found["score_zero_variance"] == 0.0
    assert found["task_zero_variance"] == 0.5
    assert found["task_reward"] == pytest.approx(0.75)
    scores = np.array([2.0, 4.05, -1.0, -1.25])
    a = scores - np.repeat([scores[:2].mean(), scores[2:].mean()], 2)
    b = REWARDS.numpy() - np.array([0.5, 0.5, 1.0, 1.0])
    assert found["correlation"] == pytest.approx((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
    pairs = [(e > s) + 0.5 * (e == s) for e in experts.tolist() for s in scores]
    assert found["auroc"] == pytest.approx(np.mean(pairs))


def test_missing_ingredients_leave_measures_out(window):
    rollouts, signal = window
    bare = dataclasses.replace(rollouts, records=[dataclasses.replace(record, experts=()) for record in rollouts.records])
    assert set(measure(bare, signal)) == {"length", "entropy", "score_zero_variance"}
    assert "correlation" not in measure(bare, signal, torch.ones(4))  # rewards without variance


def test_auroc_of_extreme_logits(window):
    rollouts, signal = window
    far = dataclasses.replace(signal, logits=torch.full((6,), -1e4))
    assert measure(rollouts, far, None, torch.tensor([1e4]))["auroc"] == 1.0
    assert measure(rollouts, far, None, torch.tensor([-1e4]))["auroc"] == 0.5


def test_two_ranks_measure_what_one_does(window, make_rollouts):
    rollouts, signal = window
    sent = []
    for groups, texts, logits, rewards in (([0, 0], TEXTS[:2], LOGITS[:3], REWARDS[:2]), ([0, 0], TEXTS[2:], LOGITS[3:], REWARDS[2:])):
        part = make_rollouts(texts, groups, experts=("a" * 10, "b" * 30))
        spans = segment_rollouts(part, Segmenter())
        mine = build_signal(torch.tensor(logits), spans, part, AnchorOptions(transform="score", scale="fixed"))
        experts = torch.tensor([5.0]) if sent else torch.tensor([3.05, -3.0])
        measure(part, mine, rewards, experts, sum_over_ranks=lambda value: sent.append(value) or value)
    assert len(sent) == 2
    both = measure(part, mine, rewards, experts, sum_over_ranks=lambda _: sent[0] + sent[1])
    assert both == pytest.approx(measure(rollouts, signal, REWARDS, torch.tensor([5.0, 3.05, -3.0])))


def test_no_limits_never_trip():
    guard = Guard()
    for length in (1.0, 1e6):
        assert guard.update({"length": length, "auroc": 0.0, "entropy": 0.0}).tripped == ()


def test_patience_and_first_window():
    guard = Guard(max_length_growth=2.0, min_auroc=0.4, patience=2, action="stop")
    lengths, aurocs = [10.0, 21.0, 19.0, 21.0, 22.0], [0.9, 0.9, 0.9, 0.3, 0.3]
    reports = [guard.update({"length": x, "auroc": y}) for x, y in zip(lengths, aurocs, strict=True)]
    assert [len(report.tripped) for report in reports] == [0, 0, 0, 0, 2]
    assert reports[-1].fresh == reports[-1].tripped
    again = guard.update({"length": 23.0, "auroc": 0.9})
    assert len(again.tripped) == 1
    assert again.fresh == ()
    assert "length_growth is 2.2, above 2 for 2 windows in a row" in reports[-1].tripped
    assert reports[-1].action == "stop"
    assert guard.relative({"length": 30.0})["length_growth"] == 3.0


def test_other_limits():
    limits = {"max_length_vs_expert": 1.5, "max_zero_variance": 0.5, "min_correlation": 0.0, "min_entropy_ratio": 0.5}
    guard = Guard(patience=1, **limits)
    good = {"length_vs_expert": 1.0, "score_zero_variance": 0.1, "correlation": 0.3, "entropy": 2.0}
    assert guard.update(good).tripped == ()
    bad = {"length_vs_expert": 2.0, "score_zero_variance": 0.9, "correlation": -0.3, "entropy": 0.5}
    assert len(guard.update(bad).tripped) == 4
    assert guard.update({}).tripped == ()


def test_restart_changes_nothing():
    def build():
        return Guard(max_length_growth=1.5, patience=2)

    whole, half = build(), build()
    for length in (10.0, 16.0, 17.0, 12.0, 20.0, 21.0):
        resumed = build()
        resumed.load_state_dict(half.state_dict())
        half = resumed
        assert half.update({"length": length}) == whole.update({"length": length})


def test_bad_arguments():
    with pytest.raises(ConfigError):
        Guard(action="panic")
    with pytest.raises(ConfigError):
        Guard(patience=0)
