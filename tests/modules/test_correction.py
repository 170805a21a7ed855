"""The correction for the engine's distribution, in whole runs."""

from dataclasses import replace
from math import log

import pytest
import torch

from aapa_lightning.objectives.correction import CorrectionOptions
from aapa_lightning.rollout.transformers_engine import TransformersEngine

METRICS = ("engine_weight", "engine_outside", "engine_kl")


class Doubled(TransformersEngine):
    """Says that it drew every token with half the probability that it did."""

    def generate(self, requests, params, *, seed, window):
        rollouts = super().generate(requests, params, seed=seed, window=window)
        return replace(rollouts, engine_logprobs=rollouts.engine_logprobs - log(2))


def run(kit, spec, name, correction, anchored, **options):
    rows = kit.Rows()
    module = kit.make_module(name, spec, sgd=True, correction=correction, **options)
    kit.fit(module, kit.make_trainer(2, callbacks=[kit.make_anchor()] if anchored else [], logger=rows, accumulate=2))
    return module.state_dict(), [row for _, row in rows.rows]


@pytest.mark.parametrize(("name", "anchored"), [("grpo", True), ("chord", False), ("uniapl", True), ("sft", True), ("preference", True)])
def test_weights_of_one_change_nothing_and_are_logged(kit, spec, same, name, anchored):
    plain, plain_rows = run(kit, spec, name, CorrectionOptions(), anchored)
    weighted, rows = run(kit, spec, name, CorrectionOptions("truncate", low=1.0, high=1.0), anchored)
    same(plain, weighted)
    terms = {"anchor"} if name in ("sft", "preference") else {"policy", "anchor"} if anchored else {"policy"}
    for before, row in zip(plain_rows, rows, strict=True):
        assert row.keys() - before.keys() == {f"train/{term}/{metric}" for term in terms for metric in METRICS}
        assert {row[f"train/{term}/engine_weight"] for term in terms} == {1.0}
        assert all(0 <= row[f"train/{term}/engine_kl"] < 1e-6 for term in terms)  # the embedded engine is the trainer


def test_a_mismatch_is_weighted_and_masked(kit, spec, same, differ):
    start, _ = run(kit, spec, "grpo", None, False, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0), engine=Doubled)
    masked, rows = run(kit, spec, "grpo", CorrectionOptions("mask", high=1.5), False, engine=Doubled)
    same(start, masked)
    for row in rows:
        assert (row["train/policy/engine_weight"], row["train/policy/engine_outside"], row["train/losses/policy"]) == (0.0, 1.0, 0.0)
        assert row["train/policy/engine_kl"] == pytest.approx(2 - 1 - log(2), rel=1e-4)
    doubled, rows = run(kit, spec, "grpo", CorrectionOptions("truncate", high=3.0), False, engine=Doubled)
    assert differ(start, doubled)
    assert [row["train/policy/engine_weight"] for row in rows] == pytest.approx([2.0, 2.0], rel=1e-4)
