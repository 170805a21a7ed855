"""Promises 1 and 8: an anchor of weight 0 changes nothing, and no anchor changes its discriminator."""

import pytest
import torch

from aapa_lightning.anchor.context import Encoding
from aapa_lightning.anchor.encoder import FrozenEncoder
from aapa_lightning.anchor.encoder_head import EncoderHeadDiscriminator
from aapa_lightning.anchor.head import StackedHead
from aapa_lightning.callbacks.anchor import AnchorCallback

#: Window shapes: several updates and minibatches, accumulation, clipping.
SHAPES = [
    ({}, {"accumulate": 1}),
    ({}, {"accumulate": 2, "gradient_clip_val": 0.5}),
]
WINDOWS = [
    ({"minibatches": 2, "updates_per_window": 2}, {"accumulate": 2}),
    ({"ratio_level": "sequence", "aggregation": "grpo", "beta": 0.1, "entropy_coef": 0.01}, {"accumulate": 1}),
]
CASES = [("sft", *case) for case in SHAPES] + [(name, *case) for name in ("grpo", "chord") for case in SHAPES + WINDOWS]
CASES += [("uniapl", *case) for case in (SHAPES[1], WINDOWS[0])]
COMBINES = {"sft": ["loss"], "grpo": ["loss", "advantage", "reward"], "chord": ["loss", "advantage", "reward"], "uniapl": ["loss"]}


@pytest.mark.parametrize(("name", "options", "trainer"), CASES)
def test_weight_zero_is_the_bare_objective(kit, spec, same, differ, name, options, trainer):
    def run(*callbacks):
        rows = kit.Rows()
        module = kit.fit(kit.make_module(name, spec, **options), kit.make_trainer(4, callbacks=callbacks, logger=rows, **trainer))
        return kit.weights(module), rows.rows

    bare, bare_rows = run()
    assert differ(bare, kit.weights(_loaded(kit.make_module(name, spec))))
    for combine in COMBINES[name]:
        off, rows = run(kit.make_anchor(0.0, combine=combine))
        same(bare, off)
        logged = {key for _, row in rows for key in row}
        assert {"train/anchor/score", "train/anchor/probability", "train/anchor/weight"} <= logged
        shared = [key for _, row in bare_rows for key in row if key != "epoch"]
        assert shared
        for (step, before), (step_off, after) in zip(bare_rows, rows, strict=True):
            assert step == step_off
            assert {key: after[key] for key in before} == before


@pytest.mark.parametrize("name", list(COMBINES))
def test_anchor_moves_the_policy_but_not_its_discriminator(kit, spec, differ, name):
    bare = kit.weights(kit.fit(kit.make_module(name, spec), kit.make_trainer(3)))
    for combine in COMBINES[name]:
        anchor = kit.make_anchor(0.5, combine=combine)
        before = anchor.discriminator.fingerprint()
        module = kit.fit(kit.make_module(name, spec), kit.make_trainer(3, callbacks=[anchor]))
        assert differ(bare, kit.weights(module))
        assert anchor.discriminator.fingerprint() == before
        assert all(p.grad is None and not p.requires_grad for p in anchor.discriminator.parameters())


@pytest.mark.parametrize("name", ["sft", "grpo", "chord"])
def test_an_encoder_and_its_head_stay_as_they_are(kit, spec, name, tmp_path):
    """The real discriminator, over the frozen initial policy: every tensor, before and after, in a run and its resume."""
    judge = EncoderHeadDiscriminator(FrozenEncoder(spec.model, Encoding()), StackedHead(1, 64, hidden_units=8), ("sentence", "response"))
    before = {key: value.clone() for part in (judge.encoder.model, judge.head) for key, value in part.state_dict().items()}
    fingerprint = judge.fingerprint()
    for ckpt in (None, tmp_path / "step=1.ckpt"):
        callbacks = [AnchorCallback(judge, weight=0.5), kit.SaveAt(tmp_path)]
        kit.fit(kit.make_module(name, spec), kit.make_trainer(2, callbacks=callbacks), ckpt=ckpt)
        after = {key: value for part in (judge.encoder.model, judge.head) for key, value in part.state_dict().items()}
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert judge.fingerprint() == fingerprint
        assert not judge.encoder.model.training
        assert not judge.head.training


def test_checkpoint_holds_the_fingerprint_and_no_discriminator(kit, spec, tmp_path):
    anchor = kit.make_anchor(0.5)
    module = kit.make_module("grpo", spec, beta=0.1)
    kit.fit(module, kit.make_trainer(2, callbacks=[anchor, kit.SaveAt(tmp_path)]))
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert all(name.startswith("model.") for name in checkpoint["state_dict"])
    assert checkpoint["callbacks"]["AnchorCallback"]["fingerprint"] == anchor.discriminator.fingerprint()
    sizes = {tuple(p.shape) for p in anchor.discriminator.parameters()}
    assert not [value for value in _tensors(checkpoint) if tuple(value.shape) in sizes]


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _loaded(module):
    module.configure_model()
    return module
