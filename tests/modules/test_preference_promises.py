"""The promises of a module in training, for preference objectives: anchor, padding and order, resume."""

from dataclasses import replace

import pytest
import torch

from aapa_lightning.loop import demonstrations
from aapa_lightning.loop.terms import total_loss
from aapa_lightning.modules.preference import StressOptions
from aapa_lightning.types import pad_right

STRESS = StressOptions(rho=0.2)
RUNS = {
    "dpo": ({"objective": "dpo"}, {"accumulate": 2}),
    "orpo": ({"objective": "orpo"}, {"accumulate": 2, "gradient_clip_val": 1.0}),
    "kto": ({"objective": "kto"}, {"accumulate": 2}),
    "gapo": ({"objective": "gapo", "stress": STRESS, "term_norms_every": 2}, {"accumulate": 2}),
    "gaussian": ({"objective": "gapo", "stress": StressOptions(direction="gaussian")}, {"accumulate": 2}),
    "amapo": ({"objective": "amapo"}, {"accumulate": 1, "precision": "bf16-mixed"}),
}


class Run:
    """Runs of one configuration: four pairs a step, two steps an epoch; every run ends inside a later epoch."""

    def __init__(self, kit, spec, case, anchored=False):
        self.kit, self.spec, self.anchored = kit, spec, anchored
        self.options, self.trainer = RUNS[case]

    def __call__(self, folder, ckpt=None, batches=(), steps=5, weight=0.5, adaptive=True, **extra):
        callbacks = [self.kit.make_anchor(weight, adaptive=adaptive)] if self.anchored else []
        rows = self.kit.Rows()
        module = self.kit.make_module("preference", self.spec, **self.options, **extra)
        trainer = self.kit.make_trainer(steps, callbacks=[*callbacks, self.kit.SaveAt(folder, None, batches)], logger=rows, **self.trainer)
        self.kit.fit(module, trainer, data=self.kit.make_records(8), ckpt=ckpt)
        term = callbacks[0].term.state_dict() if callbacks else None
        state = trainer.strategy.optimizer_state(trainer.optimizers[0])
        return {"weights": self.kit.weights(module), "optimizer": state["state"], "rows": rows.rows, "term": term}


def assert_equal(a, b, first_step):
    torch.testing.assert_close(a["weights"], b["weights"], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"], b["optimizer"], rtol=0, atol=0)
    assert a["term"] == b["term"]
    assert [row for row in a["rows"] if row[0] >= first_step] == b["rows"]


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("case", RUNS)
def test_resume_from_steps_and_from_inside_an_accumulation(kit, spec, tmp_path, case, anchored):
    run = Run(kit, spec, case, anchored)
    micro_steps = run.trainer["accumulate"]
    whole = run(tmp_path / "whole", batches=(3, 7) if micro_steps == 2 else ())
    assert [step for step, row in whole["rows"] if "train/loss" in row] == list(range(5))
    starts = {f"step={step}": step for step in (1, 2, 4)} | ({"batch=3": 1, "batch=7": 3} if micro_steps == 2 else {})
    for name, step in starts.items():
        assert_equal(whole, run(tmp_path / "again", ckpt=tmp_path / "whole" / f"{name}.ckpt"), first_step=step)


def test_a_resume_with_a_cache_and_a_reference_of_ones_own(kit, spec, tmp_path):
    """The reference is that of the start, not of the checkpoint."""
    run = Run(kit, spec, "dpo")
    options = {"reference_cache": str(tmp_path / "cache"), "reference": replace(spec)}
    whole = run(tmp_path / "whole", **options)
    for name in ("cache", "live"):
        more = options if name == "cache" else {}
        again = run(tmp_path / name, ckpt=tmp_path / "whole" / "step=3.ckpt", **more)
        torch.testing.assert_close(whole["weights"], again["weights"], rtol=0, atol=0 if name == "cache" else 1e-4)


@pytest.mark.parametrize("case", RUNS)
def test_an_anchor_of_weight_zero_is_the_bare_objective(kit, spec, same, tmp_path, case):
    bare = Run(kit, spec, case)(tmp_path)
    off = Run(kit, spec, case, anchored=True)(tmp_path, weight=0.0, adaptive=False)
    same(bare["weights"], off["weights"])
    assert {"train/anchor/score", "train/anchor/weight", "train/losses/anchor"} <= {name for _, row in off["rows"] for name in row}
    for (step, before), (step_off, after) in zip(bare["rows"], off["rows"], strict=True):
        assert step == step_off
        assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("case", RUNS)
def test_an_anchor_samples_to_the_prompts_of_the_pairs_and_moves_the_policy(kit, spec, differ, monkeypatch, case):
    asked = []
    options, trainer = RUNS[case]
    module = kit.make_module("preference", spec, **options)
    module.configure_model()
    plain = module.engine.generate
    monkeypatch.setattr(module.engine, "generate", lambda requests, *args, **kw: asked.extend(requests) or plain(requests, *args, **kw))
    anchor = kit.make_anchor(0.5)
    rows, before = kit.Rows(), anchor.discriminator.fingerprint()
    kit.fit(module, kit.make_trainer(3, callbacks=[anchor], logger=rows, **trainer))
    assert sorted(str(request.record.prompt) for request in asked) == sorted(str(record.prompt) for record in kit.make_records())
    logged = [row for _, row in rows.rows if "train/loss" in row]
    assert len(logged) == 3
    assert all(row["train/losses/anchor"] != 0 and row["train/anchor/ratio"] == 1.0 for row in logged)
    assert anchor.discriminator.fingerprint() == before
    bare = kit.fit(kit.make_module("preference", spec, **options), kit.make_trainer(3, **trainer))
    assert differ(kit.weights(bare), kit.weights(module))


def test_nothing_is_sampled_without_an_anchor(kit, spec, monkeypatch):
    module = kit.make_module("preference", spec)
    module.configure_model()
    monkeypatch.setattr(module.engine, "generate", lambda *args, **kw: pytest.fail("something was sampled"))
    kit.fit(module, kit.make_trainer(2))


@pytest.mark.parametrize("name", ["dpo", "orpo", "amapo", "dr_dpo", "kto", "gapo"])
def test_padding_and_order_of_pairs(kit, spec, monkeypatch, name):
    """More padding on every row; the pairs of a micro-step in another order (turned, which keeps KTO's mismatched prompts)."""
    module, kept = kit.make_module("preference", spec, objective=name, **({"stress": STRESS} if name == "gapo" else {})), []
    module.on_before_zero_grad = lambda optimizer: kept.append(module.window)
    kit.fit(module, kit.make_trainer(1))
    window = kept[-1]
    lengths = {len(row.chosen.input_ids) for row in window.demonstrations}
    assert max(lengths) > 1.5 * min(lengths)

    def loss_and_gradient(window):
        module.zero_grad()
        loss, values = total_loss(module.loss_terms(window, 0), 1.0)
        loss.backward()
        return loss.detach(), values, torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

    loss, values, gradient = loss_and_gradient(window)
    assert float(gradient.abs().max()) > 1e-4
    turned = loss_and_gradient(replace(window, demonstrations=window.demonstrations[1:] + window.demonstrations[:1]))
    absurd = [[7] * 9]
    monkeypatch.setattr(demonstrations, "pad_right", lambda rows, value: _wider(rows, value, absurd))
    padded = loss_and_gradient(window)
    for again, values_again, gradient_again in (turned, padded):
        torch.testing.assert_close(again, loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values_again, values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient_again, gradient, rtol=1e-3, atol=2e-4)


def _wider(rows, value, absurd):
    """Rows padded by nine columns more than they need; tokens there are absurd, masks are not."""
    padded = pad_right(rows, value)
    extra = torch.tensor(absurd if padded.max() > 1 else [[0] * 9]).expand(len(padded), -1)
    return torch.cat([padded, extra], 1)
