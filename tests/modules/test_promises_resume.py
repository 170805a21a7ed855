"""Promise 3: interrupted and resumed equals uninterrupted, bit for bit, from any optimiser step."""

import pytest
import torch

from aapa_lightning.errors import ConfigError

#: Eight records and four a window: two windows an epoch; every run ends inside a later epoch.
RUNS = {
    "sft": ("sft", {}, {"accumulate": 2}, 5),
    "grpo": ("grpo", {"minibatches": 2, "updates_per_window": 2, "beta": 0.1}, {"accumulate": 2}, 10),
    "chord": ("chord", {"updates_per_window": 2, "mu_warmup_steps": 3}, {"accumulate": 1, "gradient_clip_val": 1.0}, 8),
    "one update": ("grpo", {}, {"accumulate": 1}, 5),
    "uniapl": ("uniapl", {"minibatches": 2, "updates_per_window": 2, "term_norms_every": 2}, {"accumulate": 2}, 6),
}


class Run:
    """Runs of one configuration."""

    def __init__(self, kit, spec, case, anchored):
        self.kit, self.spec, self.anchored = kit, spec, anchored
        self.name, self.options, self.trainer, self.steps = RUNS[case]

    def __call__(self, folder, ckpt=None, steps=None, batches=(), judge=0, trainer=None, at=None):
        callbacks = [self.kit.make_anchor(0.5, adaptive=True, judge=judge)] if self.anchored else []
        rows = self.kit.Rows()
        save = self.kit.SaveAt(folder, at, batches)
        module = self.kit.make_module(self.name, self.spec, **self.options)
        runner = self.kit.make_trainer(steps or self.steps, callbacks=[*callbacks, save], logger=rows, **(trainer or self.trainer))
        self.kit.fit(module, runner, data=self.kit.make_records(8), ckpt=ckpt)
        state = runner.strategy.optimizer_state(runner.optimizers[0])
        term = callbacks[0].term.state_dict() if callbacks else None
        return {"weights": self.kit.weights(module), "optimizer": state, "rows": rows.rows, "term": term, "trainer": runner}


def assert_equal(a, b, first_step=0):
    torch.testing.assert_close(a["weights"], b["weights"], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert a["term"] == b["term"]
    assert [row for row in a["rows"] if row[0] >= first_step] == b["rows"]


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("case", RUNS)
def test_resume_from_every_step(kit, spec, tmp_path, case, anchored):
    run = Run(kit, spec, case, anchored)
    whole = run(tmp_path / "whole")
    assert sorted({step for step, _ in whole["rows"]}) == list(range(run.steps))
    if anchored:
        assert whole["term"]["trips"] > 0
    steps = range(1, run.steps) if case != "grpo" or anchored else (1, 3, 4, 7, 8, 9)
    for step in steps:
        assert_equal(whole, run(tmp_path / "again", ckpt=tmp_path / "whole" / f"step={step}.ckpt"), first_step=step)


@pytest.mark.parametrize("anchored", [False, True])
def test_repeated_resumes(kit, spec, tmp_path, anchored):
    run = Run(kit, spec, "grpo", anchored)
    whole = run(tmp_path / "whole")
    rows, ckpt = [], None
    for step in (1, 3, 4, 6, 8, 9, 10):
        part = run(tmp_path / "parts", ckpt=ckpt, steps=step)
        rows += part["rows"]
        ckpt = tmp_path / "parts" / f"step={step}.ckpt"
    assert_equal(whole, part | {"rows": rows})


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("case", ["sft", "grpo"])
def test_checkpoint_in_the_middle_of_an_accumulation_rewinds(kit, spec, tmp_path, case, anchored):
    run = Run(kit, spec, case, anchored)
    whole = run(tmp_path / "whole", batches=(1, 3, 5, 7, 9, 11))
    files = sorted((tmp_path / "whole").glob("batch=*.ckpt"))
    assert len(files) >= 5
    for file in files:
        step = (int(file.stem.split("=")[1]) - 1) // 2
        assert torch.load(file, weights_only=True)["global_step"] == step
        assert_equal(whole, run(tmp_path / "again", ckpt=file), first_step=step)


def test_a_callback_may_save_before_the_anchor_has_learnt(kit, spec, tmp_path):
    def run(folder, ckpt=None):
        anchor = kit.make_anchor(0.5, adaptive=True)
        module = kit.make_module("grpo", spec, updates_per_window=2)
        kit.fit(module, kit.make_trainer(6, accumulate=2, callbacks=[kit.SaveAt(folder, batches=(3, 7)), anchor]), ckpt=ckpt)
        return kit.weights(module), anchor.term.state_dict()

    whole = run(tmp_path)
    for name in ["step=1", "step=2", "step=3", "step=4", "step=5", "batch=3", "batch=7"]:
        again = run(tmp_path / "again", ckpt=tmp_path / f"{name}.ckpt")
        torch.testing.assert_close(again[0], whole[0], rtol=0, atol=0)
        assert again[1] == whole[1]


def test_a_resume_in_the_middle_of_an_epoch_is_no_reason_to_warn(kit, spec, tmp_path, recwarn):
    run = Run(kit, spec, "one update", anchored=False)
    run(tmp_path, steps=1)
    run(tmp_path, ckpt=tmp_path / "step=1.ckpt", steps=2)
    assert not [warning for warning in recwarn if "not resumable" in str(warning.message)]


def test_another_discriminator_is_refused(kit, spec, tmp_path):
    run = Run(kit, spec, "one update", anchored=True)
    run(tmp_path, steps=1)
    with pytest.raises(ConfigError, match="another discriminator"):
        run(tmp_path, ckpt=tmp_path / "step=1.ckpt", judge=1)


def test_other_sizes_are_refused_inside_a_window_and_allowed_at_its_border(kit, spec, tmp_path):
    run = Run(kit, spec, "grpo", anchored=False)
    run(tmp_path, steps=5)
    with pytest.raises(ConfigError, match=r"inside a window.*accumulate 2 -> 1"):
        run(tmp_path, ckpt=tmp_path / "step=5.ckpt", trainer={"accumulate": 1})
    border = run(tmp_path / "border", ckpt=tmp_path / "step=4.ckpt", trainer={"accumulate": 1})
    assert [step for step, _ in border["rows"]] == list(range(4, 10))
    torch.testing.assert_close(border["weights"], run(tmp_path / "whole")["weights"], rtol=0, atol=1e-4)
    run.options = run.options | {"minibatches": 1}
    with pytest.raises(ConfigError, match=r"minibatches 2 -> 1"):
        run(tmp_path, ckpt=tmp_path / "step=4.ckpt")
