"""Promise 6 of the loop: a step that is not finite is left out, counted and logged; many in a row stop the run."""

from itertools import pairwise

import lightning as L
import pytest
import torch

CASES = [("sft", {}), ("grpo", {}), ("grpo", {"minibatches": 2, "updates_per_window": 2}), ("chord", {}), ("uniapl", {})]
CASES += [("preference", {}), ("preference", {"objective": "gapo"})]


class Poison(L.Callback):
    """Spoils the loss of micro-step 1, or a gradient, in some optimiser steps, and remembers weights and optimiser state after each."""

    def __init__(self, kind, steps):
        self.kind, self.steps, self.states = kind, steps, []

    def setup(self, trainer, pl_module, stage):
        plain = pl_module.loss_terms

        def poisoned(window, micro_step):
            terms = plain(window, micro_step)
            if self.kind != "gradient" and trainer.global_step in self.steps and micro_step % 2 == 1:
                terms[0].outputs.losses = terms[0].outputs.losses + float(self.kind)
            return terms

        pl_module.loss_terms = poisoned

    def on_after_backward(self, trainer, pl_module):
        if self.kind == "gradient" and trainer.global_step in self.steps:
            next(pl_module.parameters()).grad[0, 0] = float("nan")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            optimizer = trainer.optimizers[0]
            state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in pl_module.parameters() if p in optimizer.state]
            self.states.append(({k: v.clone() for k, v in pl_module.model.state_dict().items()}, state))


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_a_bad_step_is_left_out(kit, spec, name, options, kind):
    poison, rows = Poison(kind, {0, 2}), kit.Rows()
    module = kit.make_module(name, spec, **options)
    kit.fit(module, kit.make_trainer(4, accumulate=2, callbacks=[poison], logger=rows, gradient_clip_val=1.0))
    module_start = kit.make_module(name, spec)
    module_start.configure_model()
    states = [(module_start.model.state_dict(), []), *poison.states]
    for step, (before, after) in enumerate(pairwise(states)):
        changed = [key for key in before[0] if not torch.equal(before[0][key], after[0][key])]
        assert bool(changed) == (step not in (0, 2))
        if step == 2:
            torch.testing.assert_close(before[1], after[1], rtol=0, atol=0)
    assert all(torch.isfinite(value).all() for value in states[-1][0].values())
    assert [row["train/skipped_steps"] for _, row in rows.rows] == [1.0, 1.0, 2.0, 2.0]


def test_many_in_a_row_stop_the_run_and_name_the_step(kit, spec):
    module = kit.make_module("grpo", spec, max_skipped_steps=3)
    with pytest.raises(RuntimeError, match=r"3 optimiser steps in a row .* the last was step 5 \(window 5\)"):
        kit.fit(module, kit.make_trainer(9, accumulate=2, callbacks=[Poison("nan", {1, 3, 4, 5, 6})]))


def test_skipped_steps_are_counted_across_a_resume(kit, spec, tmp_path):
    kit.fit(
        kit.make_module("grpo", spec, max_skipped_steps=3),
        kit.make_trainer(3, accumulate=2, callbacks=[Poison("nan", {1, 2}), kit.SaveAt(tmp_path)]),
    )
    with pytest.raises(RuntimeError, match="the last was step 3"):
        kit.fit(
            kit.make_module("grpo", spec, max_skipped_steps=3),
            kit.make_trainer(5, accumulate=2, callbacks=[Poison("nan", {3})]),
            ckpt=tmp_path / "step=3.ckpt",
        )
