"""The reward model's losses by hand, at the extremes, and by their gradients."""

import math

import pytest
import torch

from aapa_lightning.errors import ConfigError
from aapa_lightning.objectives.ranking import RANKINGS, ranking_loss


def test_values_by_hand():
    chosen, rejected = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0.5, 1.0, 0.5])
    outputs = ranking_loss(chosen, rejected)
    torch.testing.assert_close(outputs.losses, torch.tensor([math.log1p(math.exp(-1.5)), math.log1p(math.exp(2.0)), math.log(2.0)]))
    assert outputs.metrics["margin"].tolist() == [1.5, -2.0, 0.0]
    assert outputs.metrics["accuracy"].tolist() == [1.0, 0.0, 0.5]
    assert ranking_loss(chosen, rejected, kind="diff").losses.tolist() == [-1.5, 2.0, 0.0]


@pytest.mark.parametrize(("kind", "pull"), [("ranking", lambda margin: -1 / (1 + math.exp(margin))), ("diff", lambda margin: -1.0)])
def test_gradients_by_hand(kind, pull):
    chosen, rejected = torch.tensor([0.3, -2.0], requires_grad=True), torch.tensor([1.0, 0.0], requires_grad=True)
    ranking_loss(chosen, rejected, kind=kind).losses.sum().backward()
    expected = torch.tensor([pull(-0.7), pull(-2.0)])
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)


@pytest.mark.parametrize("kind", RANKINGS)
def test_extremes_stay_finite(kind):
    chosen, rejected = (torch.tensor(values, requires_grad=True) for values in ([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]))
    losses = ranking_loss(chosen, rejected, kind=kind).losses
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad.isfinite().all()
    assert losses[1] == 2e4  # linear where the model is wrong, not cut off


@pytest.mark.parametrize("kind", RANKINGS)
def test_only_differences_count(kind):
    torch.manual_seed(0)
    chosen, rejected = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(ranking_loss(chosen + 7, rejected + 7, kind=kind).losses, ranking_loss(chosen, rejected, kind=kind).losses)


def test_metrics_carry_no_graph():
    outputs = ranking_loss(torch.ones(2, requires_grad=True), torch.zeros(2))
    assert outputs.losses.requires_grad
    assert not any(value.requires_grad for value in outputs.metrics.values())


def test_an_unknown_kind_is_named():
    with pytest.raises(ConfigError, match=r"kind.*ranking.*hinge"):
        ranking_loss(torch.ones(1), torch.zeros(1), kind="hinge")
