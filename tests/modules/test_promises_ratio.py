"""Promise 2: one update per window has ratio 1 everywhere; several start from it and move away."""

import pytest


def _ratios(kit, spec, name, steps, anchor=False, trainer=None, **options):
    rows = kit.Rows()
    seen = []
    module = kit.make_module(name, spec, **options)
    plain = module.policy_terms

    def watched(window, micro_step, weight):
        terms = plain(window, micro_step, weight)
        for term in terms:
            mask = term.mask
            seen.append(
                (window.number, micro_step, term.name, term.outputs.metrics["ratio"][mask], term.outputs.metrics["clip_fraction"][mask])
            )
        return terms

    module.policy_terms = watched
    kit.fit(module, kit.make_trainer(steps, callbacks=[kit.make_anchor()] if anchor else [], logger=rows, **(trainer or {})))
    return seen, [row for _, row in rows.rows]


@pytest.mark.parametrize("name", ["grpo", "chord", "uniapl"])
@pytest.mark.parametrize("options", [{}, {"ratio_level": "sequence", "aggregation": "grpo"}, {"beta": 0.1, "reward_kl": 0.1}])
def test_one_update_per_window(kit, spec, name, options):
    seen, rows = _ratios(kit, spec, name, 3, anchor=True, trainer={"accumulate": 2}, **options)
    assert {term for _, _, term, _, _ in seen} == {"policy", "anchor"}
    assert len(seen) == 12
    assert all((ratio == 1).all() and (clip == 0).all() for *_, ratio, clip in seen)
    assert [row["train/policy/ratio"] for row in rows] == [1.0] * 3
    assert [row["train/anchor/clip_fraction"] for row in rows] == [0.0] * 3


def test_one_update_per_window_of_anchored_sft(kit, spec):
    rows = kit.Rows()
    kit.fit(kit.make_module("sft", spec), kit.make_trainer(3, callbacks=[kit.make_anchor()], logger=rows))
    assert [row["train/anchor/ratio"] for _, row in rows.rows] == [1.0] * 3


@pytest.mark.parametrize("trainer", [{}, {"accumulate": 2}, {"precision": "bf16-mixed"}])
def test_several_passes_start_at_one_and_move(kit, spec, trainer):
    seen, rows = _ratios(kit, spec, "grpo", 6, trainer=trainer, updates_per_window=3)
    micro_steps = trainer.get("accumulate", 1)
    for _, micro_step, _, ratio, clip in seen:
        if micro_step < micro_steps:
            assert (ratio == 1).all()
            assert (clip == 0).all()
        else:
            assert (ratio != 1).any()
    assert [row["train/policy/ratio"] == 1.0 for row in rows] == [True, False, False] * 2
    assert max(row["train/policy/clip_fraction"] for row in rows) > 0


def test_rollouts_of_demonstrations_in_later_minibatches_are_old(kit, spec):
    """UniAPL: a window's rollouts to its demonstrations were drawn before the first of its steps, and are trained on once each."""
    rows, ratios = kit.Rows(), []
    module = kit.make_module("uniapl", spec, minibatches=2, updates_per_window=2)
    plain = module.sampled_anchor_term

    def watched(*args):
        term = plain(*args)
        ratios.append(term.outputs.metrics["ratio"][term.mask])
        return term

    module.sampled_anchor_term = watched
    kit.fit(module, kit.make_trainer(5, callbacks=[kit.make_anchor()], logger=rows))
    assert [bool((ratio == 1).all()) for ratio in ratios] == [True, False, False, False, True]


def test_first_minibatch_starts_at_one(kit, spec):
    seen, _ = _ratios(kit, spec, "grpo", 4, minibatches=2, updates_per_window=2)
    assert [bool((ratio == 1).all()) for *_, ratio, _ in seen] == [True, False, False, False]
