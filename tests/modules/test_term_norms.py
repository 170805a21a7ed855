"""Gradient norms of the terms of a loss: against gradients worked out apart, and without a trace in training."""

import csv
from dataclasses import replace

import pytest
import torch
from torch import nn

from aapa_lightning.loop.terms import LossTerm
from aapa_lightning.modules.term_norms import TermNorms
from aapa_lightning.reduce import StepCounts
from aapa_lightning.runs import MetricsCSV
from aapa_lightning.types import LossOutputs, identity_sum

MASK = torch.tensor([[True, True, False], [True, False, False]])
COUNTS = StepCounts(tokens=7.0, responses=3.0)


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    """Two that both terms use, and one that none does."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(2, 3, generator=generator)) for _ in range(3)]


def terms_of(parameters, micro_step, weights=(1.0, 0.3)) -> list[LossTerm]:
    first, second, _ = parameters
    losses = [(first * second * (1 + micro_step)).exp(), (first + micro_step) ** 2]
    return [
        LossTerm(name, LossOutputs(loss), MASK, COUNTS, aggregation, weight)
        for name, loss, aggregation, weight in zip("ab", losses, ("dapo", "grpo"), weights, strict=True)
    ]


def by_hand(parameters, name, micro_steps) -> torch.Tensor:
    """The gradient of a term over micro-steps, written out in float64."""
    first, second, _ = (parameter.detach().double().requires_grad_() for parameter in parameters)
    total = torch.zeros((), dtype=torch.float64)
    for micro_step in micro_steps:
        if name == "a":
            total = total + (first * second * (1 + micro_step)).exp()[MASK].sum() / 7
        else:
            squares = (first + micro_step) ** 2
            total = total + 0.3 * (squares[0, :2].mean() + squares[1, 0]) / 3
    gradients = torch.autograd.grad(total, (first, second), allow_unused=True)
    return torch.cat([torch.zeros(6).double() if g is None else g.flatten() for g in gradients])


def test_norms_are_those_of_separate_gradients_over_micro_steps(parameters) -> None:
    norms = TermNorms(1)
    for _ in range(2):  # the second step starts anew
        for micro_step in range(3):
            norms.add(terms_of(parameters, micro_step), 3.0, nn.ParameterList(parameters))
        found = norms.compute(identity_sum)
        assert found == {f"grad_norms/{name}": pytest.approx(float(by_hand(parameters, name, range(3)).norm()), rel=1e-5) for name in "ab"}
    assert norms.compute(identity_sum) == {}


def test_ranks_add_up(parameters) -> None:
    """Two ranks with a micro-step each, scale 2, are one rank with two."""
    ranks = [TermNorms(1), TermNorms(1)]
    for rank, norms in enumerate(ranks):
        norms.add(terms_of(parameters, rank), 2.0, nn.ParameterList(parameters))
    sent: list[list[torch.Tensor]] = [[], []]
    for norms, values in zip(ranks, sent, strict=True):
        norms.compute(lambda value, values=values: values.append(value) or value)
    order = iter(range(len(sent[0])))

    def sum_over_ranks(value):
        i = next(order)
        return sent[0][i] + sent[1][i]

    again = TermNorms(1)
    again.add(terms_of(parameters, 0), 2.0, nn.ParameterList(parameters))
    expected = {f"grad_norms/{name}": pytest.approx(float(by_hand(parameters, name, range(2)).norm()), rel=1e-5) for name in "ab"}
    assert again.compute(sum_over_ranks) == expected


def test_terms_without_a_gradient_read_zero(parameters) -> None:
    norms = TermNorms(1)
    terms = terms_of(parameters, 0, weights=(0.0, 0.3))
    terms.append(LossTerm("c", LossOutputs(torch.ones(2, 3)), MASK, COUNTS))
    norms.add(terms, 1.0, nn.ParameterList(parameters))
    found = norms.compute(identity_sum)
    assert (found["grad_norms/a"], found["grad_norms/c"]) == (0.0, 0.0)
    assert found["grad_norms/b"] > 0


def test_grad_and_graph_are_left_alone(parameters) -> None:
    parameters[0].grad = kept = torch.ones(2, 3)
    terms = terms_of(parameters, 1)
    expected = torch.autograd.grad(sum(term.reduce(1.0) for term in terms), parameters[:2], retain_graph=True)
    TermNorms(1).add(terms, 1.0, nn.ParameterList(parameters))
    assert parameters[0].grad is kept
    assert torch.equal(kept, torch.ones(2, 3))
    assert parameters[1].grad is parameters[2].grad is None
    again = torch.autograd.grad(sum(term.reduce(1.0) for term in terms), parameters[:2])
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_which_steps_are_due() -> None:
    assert [step for step in range(7) if TermNorms(3).due(step)] == [0, 3, 6]
    assert not any(TermNorms(0).due(step) for step in range(7))


@pytest.mark.parametrize(("precision", "checkpointing"), [("32-true", False), ("bf16-mixed", False), ("32-true", True)])
def test_training_does_not_notice(kit, spec, same, tmp_path, precision, checkpointing):
    """Weights and logged rows are those of the run without; norms stand in the rows of steps 0 and 2 alone."""

    policy = replace(spec, activation_checkpointing=checkpointing)

    def run(name, every):
        module = kit.make_module("uniapl", policy, rl_weight=0.5, term_norms_every=every)
        (tmp_path / name).mkdir()
        callbacks, logger = [kit.make_anchor(0.5)], MetricsCSV(tmp_path / name)
        kit.fit(module, kit.make_trainer(4, accumulate=2, gradient_clip_val=0.5, callbacks=callbacks, logger=logger, precision=precision))
        with open(tmp_path / name / "metrics.csv", newline="") as file:
            return kit.weights(module), list(csv.DictReader(file))

    (bare, plain), (measured, rows) = run("bare", 0), run("measured", 2)
    same(bare, measured)
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    for before, row in zip(plain, rows, strict=True):
        assert {name: row[name] for name in before} == before
        norms = [row[f"train/grad_norms/{name}"] for name in ("sft", "policy", "anchor")]
        assert [bool(norm) for norm in norms] == [int(row["step"]) % 2 == 0] * 3
        assert not any(norms) or min(map(float, norms)) > 0


def test_the_norm_of_the_sum_is_within_the_sum_of_norms(kit, spec):
    """With one term it is the step's own norm; with three the triangle holds, and a weight is in its norm."""
    found = {}
    for name, options in {"alone": {"rl_weight": 0.0}, "half": {"rl_weight": 0.5}, "whole": {"rl_weight": 1.0}}.items():
        rows = kit.Rows()
        kit.fit(kit.make_module("uniapl", spec, term_norms_every=1, **options), kit.make_trainer(1, accumulate=2, logger=rows))
        found[name] = {key: value for _, row in rows.rows for key, value in row.items()}
    alone, half, whole = found["alone"], found["half"], found["whole"]
    assert alone["train/grad_norms/sft"] == pytest.approx(alone["train/grad_norm"], rel=1e-5)
    assert alone["train/grad_norms/policy"] == 0
    assert half["train/grad_norms/policy"] == pytest.approx(0.5 * whole["train/grad_norms/policy"], rel=1e-5)
    total, imitation, policy = (whole[f"train/grad_norm{part}"] for part in ("", "s/sft", "s/policy"))
    assert abs(imitation - policy) < total < imitation + policy


def test_a_second_fit_starts_with_nothing_gathered(kit, spec):
    module = kit.make_module("sft", spec, term_norms_every=1)
    kit.fit(module, kit.make_trainer(1))
    module._term_norms._gradients = {"sft": torch.ones(3)}
    module._term_norms._micro_steps = 1
    kit.fit(module, kit.make_trainer(1))
    assert not module._term_norms._gradients
