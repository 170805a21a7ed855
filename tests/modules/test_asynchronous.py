"""Rollouts that are drawn one window ahead: how old they are, what corrects for it, and that a run can be left and taken up anywhere."""

import threading

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from aapa_lightning.errors import ConfigError
from aapa_lightning.objectives.correction import CorrectionOptions
from aapa_lightning.rollout.replica import ReplicaEngine

TRUNCATE = CorrectionOptions(mode="truncate")


class Watched(ReplicaEngine):
    """Remembers which weights drew which window, and on which thread."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.drawn: list[tuple[int, int, bool]] = []
        self.fail_at = self.step = -1

    def sync(self, step):
        self.step = step
        super().sync(step)

    def generate(self, requests, params, *, seed, window):
        self.drawn.append((window, self.step, threading.current_thread() is threading.main_thread()))
        if window == self.fail_at:
            raise RuntimeError("the engine broke")
        return super().generate(requests, params, seed=seed, window=window)


def asynchronous(kit, spec, name="grpo", **options):
    return kit.make_module(name, spec, asynchronous=True, correction=TRUNCATE, **({"engine": "replica"} | options))


def test_a_replica_draws_what_the_policy_draws(kit, spec) -> None:
    plain = kit.fit(kit.make_module("grpo", spec), kit.make_trainer(5))
    copied = kit.fit(kit.make_module("grpo", spec, engine="replica"), kit.make_trainer(5))
    torch.testing.assert_close(kit.weights(copied), kit.weights(plain), rtol=0, atol=0)


def assert_no_thread_is_left() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("rollouts"):
            thread.join(60)  # it has been told to end
            assert not thread.is_alive()


class Keyed(ReplicaEngine):
    """Takes weights once a step, and notes whether what it draws with are the policy's."""

    step = None
    drawn: list[bool]

    def sync(self, step):
        if step != self.step:
            super().sync(step)
        self.step = step

    def forget(self):
        self.step = None

    def generate(self, requests, params, *, seed, window):
        pairs = zip(self._engine.model.parameters(), self._source.parameters(), strict=True)
        self.drawn.append(all(torch.equal(mine, current) for mine, current in pairs))
        return super().generate(requests, params, seed=seed, window=window)


def test_averaged_weights_of_a_validation_draw_no_window(kit, spec) -> None:
    Keyed.drawn = []
    module = kit.make_module("grpo", spec, engine=Keyed)
    averaging = EMAWeightAveraging(decay=0.5)
    trainer = kit.make_trainer(4, callbacks=[averaging], val_check_interval=1)
    kit.fit(module, trainer, val=kit.make_records(2))
    assert len(Keyed.drawn) >= 8  # four windows, four validations
    assert all(Keyed.drawn)


def test_every_window_but_the_first_is_drawn_in_the_background_by_weights_one_window_old(kit, spec) -> None:
    module = asynchronous(kit, spec, minibatches=2, engine=Watched, engine_tolerance=None)  # two optimiser steps a window
    engines = []
    rows = kit.Rows()

    class Keep(kit.L.Callback):
        def on_train_start(self, trainer, pl_module):
            engines.append(pl_module.engine)

    kit.fit(module, kit.make_trainer(8, callbacks=[Keep()], logger=rows))
    assert engines[0].drawn == [(0, 0, True), (1, 0, False), (2, 2, False), (3, 4, False), (4, 6, False)]
    assert_no_thread_is_left()
    drift = [abs(row["train/policy/engine_kl"]) for _, row in rows.rows if "train/policy/engine_kl" in row]
    assert max(drift[:2]) < 1e-6
    assert min(drift[2:]) > 1e-6  # the policy has moved on


def test_asynchronous_and_on_policy_runs_part_after_the_first_window(kit, spec) -> None:
    plain = kit.weights(kit.fit(kit.make_module("grpo", spec, sgd=True, correction=TRUNCATE), kit.make_trainer(1)))
    ahead = kit.weights(kit.fit(asynchronous(kit, spec, sgd=True), kit.make_trainer(1)))
    # a copy of the weights lies elsewhere in memory, and products round by alignment, which AdamW would make large
    torch.testing.assert_close(ahead, plain, rtol=1e-4, atol=1e-5)
    plain = kit.weights(kit.fit(kit.make_module("grpo", spec, correction=TRUNCATE), kit.make_trainer(3)))
    ahead = kit.weights(kit.fit(asynchronous(kit, spec), kit.make_trainer(3)))
    assert max(float((plain[name] - ahead[name]).abs().max()) for name in plain) > 1e-3


@pytest.mark.parametrize(
    ("name", "options", "accumulate"),
    [("grpo", {"minibatches": 2, "updates_per_window": 2}, 2), ("grpo", {}, 1), ("uniapl", {}, 1)],
    ids=["windows of steps", "one update", "uniapl"],
)
def test_resume_from_every_step_and_from_inside_an_accumulation(kit, spec, tmp_path, name, options, accumulate) -> None:
    def run(folder, ckpt=None):
        rows = kit.Rows()
        trainer = kit.make_trainer(6, accumulate=accumulate, callbacks=[kit.SaveAt(folder, batches=(3, 5, 9))], logger=rows)
        module = kit.fit(asynchronous(kit, spec, name, **options), trainer, data=kit.make_records(8), ckpt=ckpt)
        return kit.weights(module), rows.rows

    whole, logged = run(tmp_path / "whole")
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"))
    assert len(checkpoints) >= 7
    for path in checkpoints:
        step = torch.load(path, weights_only=True)["global_step"]
        found, rows = run(tmp_path / "again", ckpt=path)
        torch.testing.assert_close(found, whole, rtol=0, atol=0)
        assert rows == [row for row in logged if row[0] >= step]


def test_validation_waits_for_the_engine_and_changes_nothing(kit, spec) -> None:
    expected = kit.weights(kit.fit(asynchronous(kit, spec), kit.make_trainer(4)))
    validated = kit.fit(asynchronous(kit, spec), kit.make_trainer(4, val_check_interval=1), val=kit.make_records(2))
    torch.testing.assert_close(kit.weights(validated), expected, rtol=0, atol=0)


def test_an_error_in_the_background_ends_the_run(kit, spec) -> None:
    module = asynchronous(kit, spec, engine=Watched, engine_tolerance=None)
    trainer = kit.make_trainer(5)

    class Break(kit.L.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.engine.fail_at = 2

    trainer.callbacks.append(Break())
    with pytest.raises(RuntimeError, match="the engine broke"):
        kit.fit(module, trainer)
    assert trainer.global_step == 2


def test_what_cannot_be_asynchronous_is_refused_before_training(kit, spec) -> None:
    with pytest.raises(ConfigError, match="weights of its own, found TransformersEngine"):
        kit.fit(kit.make_module("grpo", spec, asynchronous=True, correction=TRUNCATE), kit.make_trainer(2))
    for correction in (None, CorrectionOptions()):
        with pytest.raises(ConfigError, match="expected a correction, found none"):
            kit.fit(kit.make_module("grpo", spec, asynchronous=True, engine="replica", correction=correction), kit.make_trainer(2))


def test_a_second_fit_draws_anew(kit, spec) -> None:
    module = asynchronous(kit, spec, engine=Watched, engine_tolerance=None)
    kit.fit(module, kit.make_trainer(2))
    module.engine.drawn.clear()
    kit.fit(module, kit.make_trainer(3), data=kit.make_records(8))
    assert [window for window, *_ in module.engine.drawn] == [0, 1, 2, 3]


def test_a_draw_that_fails_costs_no_checkpoint_and_leaves_no_thread(kit, spec, tmp_path) -> None:
    module = asynchronous(kit, spec, engine=Watched, engine_tolerance=None)

    class Break(kit.L.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.engine.fail_at = 2

    with pytest.raises(RuntimeError, match="the engine broke"):
        kit.fit(module, kit.make_trainer(5, callbacks=[Break(), kit.SaveAt(tmp_path)]))
    assert torch.load(tmp_path / "step=2.ckpt", weights_only=True)["aapa"]["ahead"][0].keys() == {1}
    assert_no_thread_is_left()


@pytest.mark.parametrize("options", [{"rollout_rows": 0}, {"eval_batch_size": 0}])
def test_sizes_of_nothing_are_refused(kit, spec, options) -> None:
    with pytest.raises(ConfigError, match="expected a whole number, at least 1, found 0"):
        kit.make_module("grpo", spec, **options)
