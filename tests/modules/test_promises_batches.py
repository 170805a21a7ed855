"""Promise 5: padding and the order of rows do not change the loss of a slice."""

from dataclasses import replace

import pytest
import torch

from aapa_lightning.loop.loader import WindowStep
from aapa_lightning.loop.terms import total_loss

OPTIONS = [{}, {"aggregation": "grpo", "ratio_level": "sequence"}, {"aggregation": "dr_grpo", "beta": 0.1, "entropy_coef": 0.01}]
CASES = [("sft", {}), *((name, options) for name in ("grpo", "chord", "uniapl") for options in OPTIONS)]


def _window(kit, spec, name, **options):
    """A module with an open window of prompts between 10 and 50 tokens, and its trainer."""
    module = kit.make_module(name, spec, **options)
    trainer = kit.make_trainer(1, callbacks=[kit.make_anchor(0.5, granularity="sentence" if "ratio_level" not in options else "response")])
    kept = []
    module.on_before_zero_grad = lambda optimizer: kept.append(module.window)
    kit.fit(module, trainer)
    return module, kept[-1]


def _loss_and_gradient(module, window):
    module.zero_grad()
    loss, values = total_loss(module.loss_terms(window, 0), 1.0)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    return loss.detach(), values, gradient


def _pad(experience, left, right):
    """Columns of padding with absurd values in them."""

    def before(value, fill):
        return torch.cat([value.new_full((len(value), left), fill), value], 1)

    def after(value, fill):
        return torch.cat([value, value.new_full((len(value), right), fill)], 1)

    rollouts = experience.rollouts
    rollouts = replace(
        rollouts,
        prompt_ids=before(rollouts.prompt_ids, 5),
        prompt_mask=before(rollouts.prompt_mask, False),
        response_ids=after(rollouts.response_ids, 7),
        response_mask=after(rollouts.response_mask, False),
        engine_logprobs=after(rollouts.engine_logprobs, -9.0),
        token_ends=after(rollouts.token_ends, 0),
    )
    ref = experience.ref_logprobs
    return replace(
        experience,
        rollouts=rollouts,
        loss_mask=after(experience.loss_mask, False),
        anchor_advantages=after(experience.anchor_advantages, 3.0),
        old_logprobs=None if experience.old_logprobs is None else after(experience.old_logprobs, -5.0),
        ref_logprobs=None if ref is None else after(ref, -5.0),
    )


def _permute(experience, order):
    def pick(value):
        return None if value is None else value[order] if isinstance(value, torch.Tensor) else [value[i] for i in order.tolist()]

    rollouts = experience.rollouts
    fields = ["prompt_ids", "prompt_mask", "response_ids", "response_mask", "truncated", "group_ids", "engine_logprobs", "token_ends"]
    rollouts = replace(rollouts, **{name: pick(getattr(rollouts, name)) for name in [*fields, "texts", "records"]})
    names = ["loss_mask", "rewards", "advantages", "scores", "anchor_advantages", "old_logprobs", "ref_logprobs"]
    return replace(experience, rollouts=rollouts, **{name: pick(getattr(experience, name)) for name in names})


class _Uncut:
    """Experience whose slices keep all padding."""

    def __init__(self, experience):
        self.experience = experience

    def rows(self, rows):
        return _permute(self.experience, torch.arange(len(self.experience))[rows])


@pytest.mark.parametrize(("name", "options"), CASES)
def test_padding_and_order_of_rollouts(kit, spec, name, options):
    module, window = _window(kit, spec, name, **options)
    lengths = window.experience.rollouts.prompt_mask.sum(-1)
    assert lengths.max() > 2 * lengths.min()
    assert len(set(window.experience.rollouts.lengths.tolist())) > 2
    module._trainer = None  # what follows runs outside of the trainer, at optimiser step 0
    loss, values, gradient = _loss_and_gradient(module, window)
    parts = (window.plan.prompt_rows(0), window.plan.demonstration_rows(0) if window.plan.sample_demonstrations else slice(0, 0))
    order = torch.cat([torch.randperm(part.stop - part.start, generator=torch.Generator().manual_seed(0)) + part.start for part in parts])
    padded = replace(window, experience=_Uncut(_pad(window.experience, 3, 4)))
    shuffled = replace(window, experience=_permute(window.experience, order), demonstrations=window.demonstrations[::-1])
    for changed in (padded, shuffled):
        again, values_again, gradient_again = _loss_and_gradient(module, changed)
        torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(values_again, values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient_again, gradient, rtol=1e-4, atol=1e-5)
    assert float(gradient.abs().max()) > 1e-3


def test_order_of_prompts_changes_no_rollout(kit, spec):
    """The same prompts, dealt to other places of the batch, draw the same responses."""
    module = kit.make_module("grpo", spec)
    module.configure_model()
    module.plan = module.make_plan(1, 1)
    module._trainer = kit.make_trainer(1)
    prompts = list(enumerate(kit.make_records(4)))
    drawn = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        rollouts = module._collect(WindowStep(5, 0, [prompts[i] for i in order]), module.plan).rollouts
        drawn.append({(int(slot), i % 3, text) for i, (slot, text) in enumerate(zip(rollouts.group_ids, rollouts.texts, strict=True))})
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 12
