"""Every row of PREFERENCES, with each of its variants, gets every invariant."""

import inspect
import itertools
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from aapa_lightning.errors import ConfigError
from aapa_lightning.objectives.preference import PREFERENCES
from aapa_lightning.types import LabelLossInputs, PairLossInputs

#: Options beyond the defaults that are worth the whole battery.
VARIANTS = {
    "dpo": [{"length_normalize": True, "beta": 5.0}],
    "simpo": [{"label_smoothing": 0.2}],
    "amapo": [{"label_smoothing": 0.2}],
    "gapo": [{"label_smoothing": 0.2}],
    "sympo": [{"kind": "ramp"}, {"kind": "unhinged"}, {"clip": 0.09}],
    "dr_dpo": [{"beta_prime": 0.1, "beta": 1.0}],
    "kto": [{"desirable_weight": 1.5, "undesirable_weight": 0.5}],
}
CASES = [(name, options) for name in PREFERENCES for options in [{}, *VARIANTS.get(name, [])]]
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value) if isinstance(value, dict) else value)
every_row = pytest.mark.parametrize("name", PREFERENCES)

COMMON = {"margin", "weight", "accuracy"}
REWARDS = {"chosen_reward", "rejected_reward"}


def pair_inputs(values, lengths):
    chosen, rejected, ref_chosen, ref_rejected, stressed = values
    return PairLossInputs(chosen, rejected, *lengths, ref_chosen, ref_rejected, stressed)


def random_inputs(name, dtype=torch.float32, rows=6):
    g = torch.Generator().manual_seed(11)
    lengths = torch.tensor([[5, 1, 3, 9, 2, 4], [4, 2, 3, 1, 7, 6]])[:, :rows]
    policy = -3 * torch.rand(2, rows, generator=g, dtype=dtype) * lengths
    reference = policy + 2 * torch.randn(2, rows, generator=g, dtype=dtype)
    stressed = torch.randn(rows, generator=g, dtype=dtype)
    if PREFERENCES[name].labels:
        labels = torch.tensor([True, False, False, True, True, False])[:rows]
        return LabelLossInputs(policy[0], reference[0], labels, 1.5 + torch.randn(5, generator=g, dtype=dtype))
    return pair_inputs((*policy, *reference, stressed), lengths)


def trained(inputs):
    """Names of the fields that carry the gradient."""
    return ("logprobs",) if isinstance(inputs, LabelLossInputs) else ("chosen_logprobs", "rejected_logprobs")


def run(objective, inputs):
    """Outputs, and the gradient of the losses' sum by each log-prob, ``[1 or 2, rows]``."""
    leaves = {name: getattr(inputs, name).detach().clone().requires_grad_() for name in trained(inputs)}
    outputs = objective(replace(inputs, **leaves))
    return outputs, torch.stack(torch.autograd.grad(outputs.losses.sum(), tuple(leaves.values())))


def take(inputs, index, mismatched=slice(None)):
    """Some rows of the inputs, and some of the mismatched log-ratios."""
    chosen = {}
    for entry in fields(inputs):
        value = getattr(inputs, entry.name)
        if isinstance(value, Tensor):
            chosen[entry.name] = value[mismatched if entry.name == "mismatched_log_ratios" else index]
    return replace(inputs, **chosen)


def same(some, others, rtol=0.0, atol=0.0):
    assert some[0].metrics.keys() == others[0].metrics.keys()
    torch.testing.assert_close(some[0].losses, others[0].losses, rtol=rtol, atol=atol)
    torch.testing.assert_close(some[1], others[1], rtol=rtol, atol=atol)
    for name, metric in some[0].metrics.items():
        torch.testing.assert_close(metric, others[0].metrics[name], rtol=rtol, atol=atol)


@every_case
def test_gradient_equals_finite_differences_in_float64(name, options):
    inputs, objective = random_inputs(name, torch.float64), PREFERENCES[name].bind(options)
    names = trained(inputs)
    held = objective(inputs).metrics.get("adaptive_margin")

    def total(*leaves):
        outputs = objective(replace(inputs, **dict(zip(names, leaves, strict=True))))
        if held is None:
            return outputs.losses.sum()
        # AMaPO stops the gradient at its adaptive margin, so the differences are taken with that margin held.
        margin, eps = leaves[0] / inputs.chosen_lengths - leaves[1] / inputs.rejected_lengths, options.get("label_smoothing", 0.0)
        logits = 2.0 * margin - held
        return -((1 - eps) * F.logsigmoid(logits) + eps * F.logsigmoid(-logits)).sum()

    leaves = tuple(getattr(inputs, field).clone().requires_grad_() for field in names)
    assert torch.autograd.gradcheck(total, leaves)
    expected = torch.stack(torch.autograd.grad(total(*leaves), leaves))
    direct = run(objective, inputs)[1]
    torch.testing.assert_close(direct, expected)
    assert direct.abs().sum() > 0


@every_case
def test_weight_is_the_slope_against_the_margin(name, options):
    inputs, objective = random_inputs(name, torch.float64), PREFERENCES[name].bind(options)
    outputs, grads = run(objective, inputs)
    clipped = outputs.metrics.get("clipped", torch.zeros(6))
    if "clip" in options:
        assert set(clipped.tolist()) == {0.5, 1.0}
    step, expected = 1e-6, []
    for field in trained(inputs):
        ends = [objective(replace(inputs, **{field: getattr(inputs, field) + shift})).metrics["margin"] for shift in (step, -step)]
        expected.append(-outputs.metrics["weight"] * (ends[0] - ends[1]) / (2 * step))
    # Where one reward of two is clipped the whole slope rests on the other, and `weight` is the mean.
    whole = clipped != 0.5
    torch.testing.assert_close(grads[:, whole], torch.stack(expected)[:, whole], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(grads.abs().mean(0), torch.stack(expected).abs().mean(0), rtol=1e-6, atol=1e-8)


@every_case
def test_finite_at_extreme_log_probs(name, options):
    extremes = (-1e4, -1.0, 0.0)
    table = torch.tensor(list(itertools.product(extremes, extremes, extremes[::2], extremes[::2], (-1e4, 0.0, 1e4), (0, 1, 700))))
    *values, length = table.T
    objective = PREFERENCES[name].bind(options)
    if PREFERENCES[name].labels:
        batches = [LabelLossInputs(values[0], values[2], length > 0, drift) for drift in (values[1] - values[3], torch.tensor([1e4]))]
    else:
        batch = pair_inputs(values, (length.long(), length.flip(0).long()))
        batches = [batch, *(take(batch, slice(start, start + 1)) for start in range(0, len(table), 37))]
    for inputs in batches:
        outputs, grads = run(objective, inputs)
        assert outputs.losses.isfinite().all()
        assert grads.isfinite().all()
        assert all(metric.isfinite().all() for metric in outputs.metrics.values())


@every_case
def test_order_of_the_rows_changes_nothing(name, options):
    inputs, objective = random_inputs(name), PREFERENCES[name].bind(options)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    outputs, grads = run(objective, inputs)
    expected = replace(outputs, losses=outputs.losses[order], metrics={key: value[order] for key, value in outputs.metrics.items()})
    tolerance = 2e-6 if PREFERENCES[name].batch_statistics else 0.0
    same(run(objective, take(inputs, order)), (expected, grads[:, order]), tolerance, tolerance)


def join(parts):
    outputs, grads = zip(*parts, strict=True)
    metrics = {key: torch.cat([part.metrics[key] for part in outputs]) for key in outputs[0].metrics}
    return replace(outputs[0], losses=torch.cat([part.losses for part in outputs]), metrics=metrics), torch.cat(grads, -1)


@every_case
def test_ranks_equal_one_process(name, options):
    inputs, row = random_inputs(name), PREFERENCES[name]
    objective = row.bind(options)
    # Labelled responses may come in unequal numbers.
    cut, other = (2, 4) if row.labels else (3, 0)
    ranks = [take(inputs, slice(0, cut), slice(0, other)), take(inputs, slice(cut, None), slice(other, None))]
    sent = []
    for rank in ranks:
        objective(replace(rank, gather=lambda value: sent.append(value.detach()) or value.detach()))
    # A probe's margins depend on the batch too, but they come in ready.
    assert row.batch_statistics == (bool(sent) or row.probe is not None)
    whole, alone = run(objective, inputs), [run(objective, rank) for rank in ranks]
    if not sent:
        same(join(alone), whole)
        return
    assert len(sent) == 2
    assert len({len(value) for value in sent}) == 1
    everything = torch.cat(sent)
    same(join([run(objective, replace(rank, gather=lambda value: everything)) for rank in ranks]), whole, 2e-6, 2e-6)
    assert not torch.allclose(join(alone)[0].losses, whole[0].losses, rtol=1e-3)


@every_case
def test_types_and_metrics(name, options):
    row = PREFERENCES[name]
    expected = COMMON | ({"reward", "desirable", "kl"} if row.labels else {"chosen_logprob", "rejected_logprob"})
    expected |= REWARDS if row.needs_reference and not row.labels else set()
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        inputs = random_inputs(name)
        floats = [
            f.name for f in fields(inputs) if isinstance(getattr(inputs, f.name), Tensor) and getattr(inputs, f.name).is_floating_point()
        ]
        inputs = replace(inputs, **{field: getattr(inputs, field).to(dtype) for field in floats})
        inputs = replace(inputs, **{field: getattr(inputs, field).requires_grad_() for field in floats})
        outputs = row.bind(options)(inputs)
        assert outputs.losses.requires_grad
        assert expected <= outputs.metrics.keys()
        for value in (outputs.losses, *outputs.metrics.values()):
            assert (value.dtype, value.shape) == (wanted, (6,))
        assert not any(metric.requires_grad for metric in outputs.metrics.values())
        outputs.losses.sum().backward()
        assert {field for field in floats if getattr(inputs, field).grad is not None} == set(trained(inputs))


@every_case
def test_swapping_the_responses_flips_the_accuracy(name, options):
    inputs, objective = random_inputs(name), PREFERENCES[name].bind(options)
    if PREFERENCES[name].labels:
        swapped, tied = replace(inputs, labels=~inputs.labels), LabelLossInputs(*[inputs.logprobs] * 2, inputs.labels, torch.zeros(1))
    else:
        tensors = [getattr(inputs, field.name) for field in fields(inputs)][:6]
        swapped = PairLossInputs(*[tensors[i] for i in (1, 0, 3, 2, 5, 4)], -inputs.stressed_margins)
        tied = PairLossInputs(*[tensors[i] for i in (0, 0, 2, 2, 4, 4)], inputs.stressed_margins)
    accuracy = objective(inputs).metrics["accuracy"]
    assert set(accuracy.tolist()) == {0.0, 1.0}
    assert torch.equal(objective(swapped).metrics["accuracy"], 1 - accuracy)
    assert objective(tied).metrics["accuracy"].tolist() == [0.5] * 6


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if not PREFERENCES[case[0]].labels])
def test_a_response_without_tokens_has_mean_0(name, options):
    inputs, objective = random_inputs(name), PREFERENCES[name].bind(options)
    inputs.chosen_lengths[0] = inputs.rejected_lengths[1] = 0
    outputs, grads = run(objective, inputs)
    assert outputs.losses.isfinite().all()
    assert outputs.metrics["chosen_logprob"][0] == outputs.metrics["rejected_logprob"][1] == 0
    if name in ("ipo", "simpo", "orpo", "amapo", "gapo", "rrhf") or "length_normalize" in options:
        assert grads[0, 0] == grads[1, 1] == 0


@every_case
def test_no_rows_give_a_zero_with_a_graph(name, options):
    outputs, grads = run(PREFERENCES[name].bind(options), random_inputs(name, rows=0))
    assert outputs.losses.shape == (0,)
    assert outputs.losses.sum() == 0
    assert grads.shape[1] == 0


@every_row
def test_the_row_says_what_it_needs(name):
    row, inputs = PREFERENCES[name], random_inputs(name)
    assert row.labels == isinstance(inputs, LabelLossInputs)
    if row.labels:
        return
    for needed, missing in ((row.needs_reference, "ref_rejected_logprobs"), (row.probe is not None, "stressed_margins")):
        if needed:
            with pytest.raises(ConfigError, match=f"expected .*{missing}, found None"):
                row.bind({})(replace(inputs, **{missing: None}))
        else:
            assert row.bind({})(replace(inputs, **{missing: None})).losses.isfinite().all()


@every_row
def test_every_option_is_documented(name):
    loss = PREFERENCES[name].loss
    text = inspect.getdoc(loss)
    for option in list(inspect.signature(loss).parameters)[1:]:
        assert f"\n    {option}: " in text
    assert "\nReference" in text
    assert ">>> " in text
