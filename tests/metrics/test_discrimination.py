"""Figures of a discriminator against torchmetrics, brute force and hand-made cases."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from aapa_lightning.metrics.functional.discrimination import (
    Judged,
    calibration_error,
    discrimination,
    weighted_auroc,
    weighted_paired_accuracy,
)


@pytest.fixture
def noise():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, generator=generator).mul(4).round() / 8  # ties
    return scores, torch.rand(300, generator=generator) < 0.3


def test_auroc_equals_torchmetrics(noise):
    scores, labels = noise
    found = weighted_auroc(scores, labels, torch.ones(1, 300))
    torch.testing.assert_close(found[0].float(), binary_auroc(torch.sigmoid(scores), labels.long()))


def test_integer_weights_are_repetitions(noise):
    scores, labels = noise
    weights = torch.randint(0, 3, (4, 300), generator=torch.Generator().manual_seed(1))
    found = weighted_auroc(scores, labels, weights)
    for row, value in zip(weights, found, strict=True):
        expected = binary_auroc(torch.sigmoid(scores.repeat_interleave(row)), labels.repeat_interleave(row).long())
        torch.testing.assert_close(value.float(), expected)


def test_auroc_of_one_class_is_undefined():
    assert math.isnan(float(weighted_auroc(torch.tensor([1.0, 2.0]), torch.tensor([True, True]), torch.ones(1, 2))[0]))


def test_calibration_equals_torchmetrics_when_balanced():
    logits = torch.randn(400, generator=torch.Generator().manual_seed(2)) * 2
    labels = torch.arange(400) % 2 == 0
    expected = binary_calibration_error(torch.sigmoid(logits), labels.long(), n_bins=15)
    assert calibration_error(logits, labels, torch.ones(400)) == pytest.approx(float(expected), abs=1e-6)


def test_calibration_is_at_equal_prior():
    # one positive at 3/4 for every negative at 1/4 is calibrated, however many negatives there are
    logits = torch.tensor([math.log(3)] * 3 + [-math.log(3)] + [-math.log(3)] * 30 + [math.log(3)] * 10)
    labels = torch.tensor([True] * 4 + [False] * 40)
    assert calibration_error(logits, labels, torch.ones(44)) == pytest.approx(0, abs=1e-7)


def test_paired_accuracy_by_hand():
    scores = torch.tensor([2.0, 1.0, 3.0, 2.0, 5.0, 0.0])
    labels = torch.tensor([True, False, False, False, True, False])
    groups = torch.tensor([0, 0, 0, 0, 1, 2])
    # prompt 0: beats 1, loses to 3, ties 2 -> 1/2; prompts 1 and 2 have one side only
    assert weighted_paired_accuracy(scores, labels, groups, torch.ones(1, 3)).tolist() == [0.5]
    assert math.isnan(float(weighted_paired_accuracy(scores, ~labels & False, groups, torch.ones(1, 3))[0]))


def judged(separation, n=200):
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(n) % 2 == 0
    index = torch.arange(n).repeat_interleave(3)
    logits = torch.randn(3 * n, generator=generator) + separation * labels[index]
    return Judged(logits, index, labels, torch.arange(n) // 2, torch.randint(5, 90, (n,), generator=generator))


def test_figures():
    found = discrimination(judged(1.0))
    assert found == discrimination(judged(1.0))
    # differences of two normals of distance 1: Phi(1 / sqrt 2) for sentences, Phi(sqrt(3 / 2)) for means of three
    assert found["sentence_auroc"] == pytest.approx(0.760, abs=0.04)
    assert found["response_auroc"] == pytest.approx(0.890, abs=0.04)
    assert found["paired_accuracy"] == pytest.approx(0.890, abs=0.08)
    for name in ("sentence_auroc", "response_auroc", "paired_accuracy"):
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
        assert found[f"{name}_high"] - found[f"{name}_low"] < 0.2
    assert found["length_auroc"] == pytest.approx(0.5, abs=0.1)
    assert {f"response_auroc_{name}" for name in ("short", "medium", "long")} <= found.keys()


def test_chance_and_perfection():
    chance = discrimination(judged(0.0))
    assert chance["response_auroc_low"] < 0.5 < chance["response_auroc_high"]
    assert discrimination(judged(50.0))["response_auroc"] == 1.0


def test_figures_without_meaning_are_left_out():
    few = Judged(torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), torch.tensor([True, False]), torch.tensor([0, 1]), torch.tensor([3, 9]))
    found = discrimination(few, resamples=0)
    assert found["response_auroc"] == 1.0
    assert "paired_accuracy" not in found
    assert "response_auroc_short" not in found
    assert not any(math.isnan(value) for value in found.values())
