"""CHORD's mixture: the logged loss is that of the schedule, worked out by hand."""

import pytest


def test_the_mixture_follows_the_schedule(kit, spec):
    """Warm-up 0, 0.4; peak 0.8, halfway down 0.5, valley 0.2. The policy's share is the rest, and the anchor stands beside both."""
    rows = kit.Rows()
    module = kit.make_module("chord", spec, mu_warmup_steps=2, mu_decay_steps=2, mu_peak=0.8, mu_valley=0.2)
    kit.fit(module, kit.make_trainer(5, accumulate=2, callbacks=[kit.make_anchor(0.5)], logger=rows))
    for mu, (_, row) in zip((0.0, 0.4, 0.8, 0.5, 0.2), rows.rows, strict=True):
        assert row["train/mu"] == pytest.approx(mu)
        policy, imitation, anchor = (row[f"train/losses/{name}"] for name in ("policy", "sft", "anchor"))
        assert row["train/loss"] == pytest.approx((1 - mu) * policy + mu * imitation + 0.5 * anchor, rel=1e-5)
        assert (imitation > 0) is (mu > 0)
        assert (row["train/sft/nll"] > 0) is (mu > 0)
