import pytest
import torch

from aapa_lightning.loop.terms import LossTerm, join_terms, total_loss
from aapa_lightning.reduce import StepCounts
from aapa_lightning.types import LossOutputs

MASK = torch.tensor([[True, True, False], [True, False, False]])
COUNTS = StepCounts(tokens=7.0, responses=3.0)


@pytest.fixture
def parameters() -> torch.Tensor:
    return torch.linspace(-1, 1, 6).reshape(2, 3).requires_grad_()


def term(name: str, losses: torch.Tensor, weight: float = 1.0, **kwargs) -> LossTerm:
    return LossTerm(name, LossOutputs(losses), MASK, COUNTS, weight=weight, **kwargs)


def gradient(terms: list[LossTerm], parameters: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    total, _ = total_loss(terms, scale)
    return total.detach(), torch.autograd.grad(total, parameters, retain_graph=True)[0]


def test_the_total_is_the_weighted_sum_of_shares_times_scale(parameters) -> None:
    terms = [term("a", parameters.exp()), term("b", parameters**2, 0.3, aggregation="grpo")]
    total, values = total_loss(terms, 4.0)
    x = parameters.detach().double()
    a = 4 * x.exp()[MASK].sum() / 7
    b = 4 * ((x[0, :2] ** 2).mean() + x[1, 0] ** 2) / 3
    assert total.item() == pytest.approx((a + 0.3 * b).item(), rel=1e-6)
    assert values["a"].item() == pytest.approx(a.item(), rel=1e-6)
    assert values["b"].item() == pytest.approx(b.item(), rel=1e-6)
    assert not any(value.requires_grad for value in values.values())
    assert total.requires_grad


def test_dr_grpo_gets_its_constant(parameters) -> None:
    total, _ = total_loss([term("a", parameters, aggregation="dr_grpo", max_response_tokens=10)], 1.0)
    assert total.item() == pytest.approx(parameters.detach()[MASK].sum().item() / 30, rel=1e-6)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_term_of_weight_zero_is_logged_and_leaves_no_bit_changed(parameters, where: int) -> None:
    bare = [term("a", parameters.exp()), term("b", torch.sin(parameters) * 1e-3, 0.1)]
    expected = gradient(bare, parameters, 3.0)
    nothing = term("c", parameters**3 * 1e6, 0.0)
    extended = [*bare[:where], nothing, *bare[where:]]
    found = gradient(extended, parameters, 3.0)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    values = total_loss(extended, 3.0)[1]
    assert values["c"].item() == pytest.approx(3 * (parameters.detach().double() ** 3 * 1e6)[MASK].sum().item() / 7, rel=1e-6)


def test_a_value_that_is_not_finite_cannot_come_through_a_weight_of_zero(parameters) -> None:
    bare = [term("a", parameters.exp())]
    broken = [*bare, term("c", parameters / 0.0, 0.0)]
    assert torch.equal(gradient(broken, parameters)[1], gradient(bare, parameters)[1])
    assert not total_loss(broken, 1.0)[1]["c"].isfinite()


def test_all_weights_zero_give_a_zero_with_a_graph(parameters) -> None:
    total, gradients = gradient([term("a", parameters.exp(), 0.0), term("b", parameters, 0.0)], parameters)
    assert total == 0
    assert torch.equal(gradients, torch.zeros(2, 3))


def test_without_gradients_there_is_no_graph(parameters) -> None:
    with torch.no_grad():
        total, _ = total_loss([term("a", parameters.exp())], 1.0)
    assert not total.requires_grad


def joined(weight: float = 0.3, **kwargs) -> tuple[LossTerm, LossTerm, LossTerm]:
    """Rows of unequal widths, with rubbish on the padding of the narrower ones."""
    wide = LossTerm(
        "a", LossOutputs(torch.tensor([[1.0, 2.0, 9.0]]), {"ratio": torch.ones(1, 3)}), MASK[:1], COUNTS, weight=weight, **kwargs
    )
    narrow_mask = torch.tensor([[True, False], [True, True]])
    metrics = {"ratio": torch.full((2, 2), 2.0)}
    narrow = LossTerm(
        "b", LossOutputs(torch.tensor([[4.0, float("nan")], [5.0, 6.0]]), metrics), narrow_mask, StepCounts(5.0, 4.0), weight=7.0
    )
    return wide, narrow, join_terms(wide, narrow)


@pytest.mark.parametrize("aggregation", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_joined_terms_share_one_normaliser(aggregation: str) -> None:
    _, _, term = joined(aggregation=aggregation, max_response_tokens=10)
    assert (term.name, term.aggregation, term.weight, term.counts) == ("a", aggregation, 0.3, StepCounts(12.0, 7.0))
    assert term.mask.tolist() == [[True, True, False], [True, False, False], [True, True, False]]
    expected = {"dapo": 2 * 18 / 12, "grpo": 2 * (1.5 + 4 + 5.5) / 7, "dr_grpo": 2 * 18 / (7 * 10), "bnpo": 18 / 5}[aggregation]
    assert term.reduce(2.0).item() == pytest.approx(expected)
    assert term.outputs.metrics["ratio"][term.mask].tolist() == [1.0, 1.0, 2.0, 2.0, 2.0]


def test_the_order_of_joining_changes_rows_alone() -> None:
    wide, narrow, term = joined()
    other = join_terms(narrow, wide)
    assert other.mask.tolist() == term.mask[[1, 2, 0]].tolist()
    assert other.reduce(1.0).item() == pytest.approx(term.reduce(1.0).item())
    assert (other.name, other.weight) == ("b", 7.0)


def test_gradients_pass_through_a_joined_term(parameters) -> None:
    first, second = term("a", parameters.exp()), term("b", parameters[:, :2] ** 2)
    second.mask = MASK[:, :2]
    (found,) = torch.autograd.grad(join_terms(first, second).reduce(1.0), parameters)
    x = parameters.detach()
    torch.testing.assert_close(found, torch.where(MASK, x.exp() + 2 * x, torch.zeros(())) / 14)


def test_a_part_without_a_graph_may_be_joined(parameters) -> None:
    first = term("a", parameters.exp())
    assert (
        not join_terms(
            LossTerm("b", LossOutputs(parameters.detach()), MASK, COUNTS), LossTerm("b", LossOutputs(torch.ones(2, 3)), MASK, COUNTS)
        )
        .reduce(1.0)
        .requires_grad
    )
    assert join_terms(first, LossTerm("b", LossOutputs(parameters.detach()), MASK, COUNTS)).reduce(1.0).requires_grad
