"""The promises of training under FSDP2 on two ranks; ``test_promises_ranks`` has the long tables."""

from pathlib import Path

import pytest
import torch

from aapa_lightning.sharding.files import read_checkpoint

WORKER = Path(__file__).with_name("ddp_worker.py")
PLAIN = {"grpo": {"prompts_per_window": 8, "beta": 0.1}, "sft": {"batch_size": 8}}
VALIDATED = {"max_steps": 7, "val_check_interval": 3, "check_val_every_n_epoch": None}
CLIPPED = {"accumulate": 2, "max_steps": 2, "gradient_clip_val": 0.3}


def load(path):
    return torch.load(path, weights_only=True)


def _jobs(folder, policy):
    """Runs whose weights are as smooth as their gradients, so that ranks and one process compare."""

    def job(out, module, trainer=CLIPPED, **extra):
        options = PLAIN[module] | {"sgd": True} | extra.pop("options", {})
        return {"module": module, "options": options, "policy": policy, "trainer": trainer, "out": str(folder / out), **extra}

    return {
        "bare": job("bare", "grpo"),
        "off": job("off", "grpo", anchor={"weight": 0.0}),
        "anchored": job("anchored", "sft", anchor={"weight": 0.7, "scale": "batch"}),
        "checkpointed": job("checkpointed", "sft", anchor={"weight": 0.7, "scale": "batch"}, spec={"activation_checkpointing": True}),
        "measured": job("measured", "sft", anchor={"weight": 0.7, "scale": "batch"}, options={"term_norms_every": 1}),
        "half": job("half", "grpo", CLIPPED | {"precision": "bf16-mixed"}, options={"updates_per_window": 2}),
        "first step": job("first step", "grpo", trainer=CLIPPED | {"max_steps": 1}),
        "poisoned": job("poisoned", "grpo", poison=[1, 1]),
    }


def _run(folder, name, policy, **extra):
    """A stateful run in a run folder: windows of four optimiser steps, validation of three records on two ranks."""
    job = {"module": "grpo", "options": {"updates_per_window": 2, "minibatches": 2}, "policy": policy, "run": str(folder / name)}
    job |= {"trainer": VALIDATED, "val": True}
    return job | {"anchor": {"weight": 0.5, "adaptive": True}, "out": str(folder / f"{name}.out")} | extra


@pytest.fixture(scope="module")
def worker(kit):
    return kit.load_worker(WORKER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_dir, kit):
    """Two ranks: the short runs, a whole one, one that loses rank 1 in step 5, and one that loses it while writing step 6."""
    folder, policy = tmp_path_factory.mktemp("sharded"), str(tiny_model_dir)
    jobs = [*_jobs(folder, policy).values(), _run(folder, "whole", policy)]
    jobs.append(_run(folder, "files", policy, strategy="fsdp2 full", trainer=VALIDATED | {"max_steps": 2}))
    code, output = kit.launch(WORKER, [*jobs, _run(folder, "dying", policy, dies_writing=[6, 1])], folder / "first.json", strategy="fsdp2")
    assert code != 0, output
    assert (folder / "files.out.rank1").exists(), output[-5000:]
    assert not (folder / "dying.out.rank0").exists()
    return folder


def same(one, other, atol=0.0):
    torch.testing.assert_close(one["weights"], other["weights"], rtol=0, atol=atol)


def test_ranks_hold_the_same_model(folder, tiny_model_dir):
    for name in _jobs(folder, ""):
        same(load(folder / f"{name}.rank0"), load(folder / f"{name}.rank1"))


@pytest.mark.parametrize("name", ["bare", "anchored"])
def test_two_ranks_are_one_process(folder, worker, tmp_path, tiny_model_dir, name):
    two = load(folder / f"{name}.rank0")
    worker.run(_jobs(tmp_path, str(tiny_model_dir))[name], 0, 1)
    one = load(tmp_path / f"{name}.rank0")
    same(one, two, atol=1e-5)
    for key in ("train/loss", "train/grad_norm"):
        assert [row[key] for row in one["rows"]] == pytest.approx([row[key] for row in two["rows"]], rel=1e-4)
        assert min(row["train/grad_norm"] for row in one["rows"]) > CLIPPED["gradient_clip_val"]  # so every step was clipped


def test_an_anchor_of_weight_zero_is_none(folder):
    bare, off = (load(folder / f"{name}.rank0") for name in ("bare", "off"))
    same(bare, off)
    assert [{key: row[key] for key in bare["rows"][0]} for row in off["rows"]] == bare["rows"]


def test_one_update_has_ratio_one(folder):
    assert [row["train/policy/ratio"] for row in load(folder / "bare.rank0")["rows"]] == [1.0, 1.0]
    assert [row["train/anchor/ratio"] for row in load(folder / "anchored.rank0")["rows"]] == [1.0, 1.0]


def test_half_precision_computes_with_float32_weights(folder, worker, tmp_path, tiny_model_dir):
    """Old and new log-probs are the same forward; the second pass moves away; losses are those of autocast on one process."""
    half = load(folder / "half.rank0")
    ratios = [row["train/policy/ratio"] for row in half["rows"]]
    assert ratios[0] == 1.0
    assert ratios[1] != 1.0
    assert {value.dtype for value in half["weights"].values()} == {torch.float32}
    worker.run(_jobs(tmp_path, str(tiny_model_dir))["half"], 0, 1)
    one = load(tmp_path / "half.rank0")
    norms, others = ([row["train/grad_norm"] for row in found["rows"]] for found in (half, one))
    assert norms == pytest.approx(others, rel=0.25)  # a few of these rollouts differ, by rounding to 8 bits


def test_the_discriminator_stays_as_it_is(folder, kit):
    assert load(folder / "anchored.rank0")["judge"] == kit.ByteJudge(0).fingerprint()


def test_activation_checkpointing_changes_nothing(folder):
    one, other = load(folder / "anchored.rank0"), load(folder / "checkpointed.rank0")
    same(one, other, atol=1e-6)  # products of recomputed activations may be summed in another order
    for row, again in zip(one["rows"], other["rows"], strict=True):
        assert again == pytest.approx(row, rel=1e-5)


def test_measuring_the_terms_changes_nothing(folder):
    plain, measured = load(folder / "anchored.rank0"), load(folder / "measured.rank0")
    same(plain, measured)
    assert len(measured["norms"]) == 2
    assert all(row[f"train/grad_norms/{name}"] > 0 for row in measured["norms"] for name in ("sft", "anchor"))


def test_ranks_skip_together(folder):
    """Step 2 is NaN on rank 1 alone."""
    one, other = load(folder / "first step.rank0"), load(folder / "poisoned.rank0")
    same(one, other)
    assert other["metrics"]["train/skipped_steps"] == 1.0


def test_a_rank_lost_while_writing_costs_one_step(folder, worker, tiny_model_dir):
    """The last good checkpoint is whole, lies inside a window, and leads to the very same end; so do a file, one process, and copies."""
    policy, last = str(tiny_model_dir), folder / "dying" / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == 5
    assert len(list(last.parent.glob(".last.ckpt.*"))) == 2
    jobs = [_run(folder, "dying", policy, ckpt=str(last))]
    jobs.append(_run(folder, "files", policy, ckpt=str(folder / "files" / "checkpoints" / "last.ckpt"), strategy="fsdp2 full"))
    jobs.append(_run(folder, "copied", policy, ckpt=str(folder / "whole" / "checkpoints" / "step=5.ckpt"), strategy="ddp"))
    code, output = worker.kit.launch(WORKER, jobs, folder / "second.json", strategy="fsdp2")
    assert code == 0, output[-5000:]
    assert len(list(last.parent.glob(".last.ckpt.*"))) == 1
    whole = load(folder / "whole.out.rank0")
    for name in ("dying", "files"):
        for rank in (0, 1):
            again = load(folder / f"{name}.out.rank{rank}")
            same(whole, again)
            torch.testing.assert_close(whole["optimizer"], again["optimizer"], rtol=0, atol=0)
        assert (folder / name / "metrics.csv").read_text() == (folder / "whole" / "metrics.csv").read_text()
    worker.run(_run(folder, "one", policy, ckpt=str(folder / "whole" / "checkpoints" / "step=4.ckpt")), 0, 1)
    for name in ("one", "copied"):
        same(whole, load(folder / f"{name}.out.rank0"), atol=1e-3)


def test_other_ranks_are_refused_inside_a_window(folder, worker, tiny_model_dir):
    worker.run(_run(folder, "inside", str(tiny_model_dir), ckpt=str(folder / "whole" / "checkpoints" / "step=5.ckpt")), 0, 1)
    assert "inside a window with other sizes: world_size 2 -> 1" in load(folder / "inside.out.rank0")["error"]
