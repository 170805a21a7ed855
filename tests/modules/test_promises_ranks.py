"""Promises 3, 4 and 6 on two ranks: the same rollouts and gradients, kills and resumes, skips that ranks agree on."""

from pathlib import Path

import pytest
import torch

from aapa_lightning.sharding.files import read_checkpoint

WORKER = Path(__file__).with_name("ddp_worker.py")

#: One optimiser step holds eight prompts (demonstrations): 1 x 1, 1 x 4 micro-steps and 2 ranks x 2 micro-steps share them.
SIZES = {
    "sft": {"batch_size": 8},
    "grpo": {"prompts_per_window": 8},
    "chord": {"prompts_per_window": 8, "expert_batch_size": 8},
    "uniapl": {"prompts_per_window": 8, "demonstrations_per_step": 8},
}
EQUAL = {
    "sft": ("sft", {}, None),
    "sft anchored": ("sft", {}, {"scale": "batch"}),
    "grpo dapo": ("grpo", {"correction": {"mode": "truncate", "high": 1.01}}, None),
    "grpo grpo": ("grpo", {"aggregation": "grpo", "mask_truncated": True}, None),
    "grpo dr_grpo kl": ("grpo", {"aggregation": "dr_grpo", "beta": 0.2, "reward_kl": 0.1, "scale_advantages": "batch"}, None),
    "gspo": ("grpo", {"aggregation": "grpo", "ratio_level": "sequence", "entropy_coef": 0.01}, None),
    "grpo passes": ("grpo", {"updates_per_window": 2, "minibatches": 2}, {"scale": "batch", "granularity": "sentence"}),
    "chord": ("chord", {}, {"scale": "batch", "combine": "advantage"}),
    "uniapl": ("uniapl", {"rl_weight": 0.6, "term_norms_every": 1}, {"scale": "batch"}),
    "uniapl grpo": ("uniapl", {"aggregation": "grpo", "mask_truncated": True}, {"granularity": "sentence"}),
    "grpo rewards": (
        "grpo",
        {"reward_aggregation": "normalize_then_sum", "reward_weights": [0.7]},
        {"truncated": "drop", "scale": "group"},
    ),
}
#: Two minibatches leave each micro-step half the prompts.
WIDE = {"grpo passes": {"prompts_per_window": 16}}


def _job(key, folder, policy, steps=2, **trainer):
    name, options, anchor = EQUAL[key]
    job = {"module": name, "options": SIZES[name] | options | {"sgd": True} | WIDE.get(key, {}), "policy": policy}
    validate = {"val_check_interval": steps * trainer.get("accumulate", 1), "check_val_every_n_epoch": None}
    job |= {
        "trainer": {"max_steps": steps, **trainer, **validate},
        "out": str(folder / key),
        "demonstrations": name == "uniapl",
        "val": True,
    }
    return job | ({"anchor": {"weight": 0.7, **anchor}} if anchor else {})


@pytest.fixture(scope="module")
def worker(kit):
    return kit.load_worker(WORKER)


def load(path):
    return torch.load(path, weights_only=True)


def _run_job(folder, name, policy, *, ckpt=None, **extra):
    """A stateful GRPO run in a run folder: five optimiser steps of windows that hold four."""
    job = {"module": "grpo", "options": {"updates_per_window": 2, "minibatches": 2}, "policy": policy, "run": str(folder / name)}
    job |= {"trainer": {"max_steps": 7, "val_check_interval": 3, "check_val_every_n_epoch": None}, "val": True}
    job |= {"anchor": {"weight": 0.5, "adaptive": True}, "out": str(folder / f"{name}.out")}
    return job | ({"ckpt": str(ckpt)} if ckpt else {}) | extra


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def strategy(request):
    """How two ranks share the model."""
    return request.param


@pytest.fixture(scope="module")
def first_launch(tmp_path_factory, tiny_model_dir, kit, strategy):
    """Two ranks: every module, an uninterrupted run, poisoned steps, and at last a run that loses rank 1 in step 5."""
    folder, policy = tmp_path_factory.mktemp("ranks"), str(tiny_model_dir)
    jobs = [_job(key, folder, policy, accumulate=2) for key in EQUAL]
    jobs.append(_run_job(folder, "whole", policy))
    jobs.append({**_job("chord", folder, policy, steps=1), "out": str(folder / "clean")})
    jobs.append({**_job("chord", folder, policy, steps=2), "out": str(folder / "poisoned"), "poison": [1, 1]})
    jobs.append(_run_job(folder, "killed", policy, kill=[5, 1]))
    code, output = kit.launch(WORKER, jobs, folder / "first.json", strategy=strategy)
    assert code != 0, output
    assert not (folder / "killed.out.rank0").exists()
    assert (folder / "poisoned.rank1").exists(), output[-5000:]
    return folder


@pytest.mark.parametrize("key", EQUAL)
def test_ranks_and_accumulation_do_not_change_the_gradient(first_launch, worker, tmp_path, tiny_model_dir, key):
    two = load(first_launch / f"{key}.rank0")
    torch.testing.assert_close(two["weights"], load(first_launch / f"{key}.rank1")["weights"], rtol=0, atol=0)
    assert len(two["norms"]) == (2 if "term_norms_every" in EQUAL[key][1] else 0)
    seen = two["seen"] + load(first_launch / f"{key}.rank1")["seen"]
    for accumulate in (1, 4):
        worker.run(_job(key, tmp_path, str(tiny_model_dir), accumulate=accumulate), 0, 1)
        one = load(tmp_path / f"{key}.rank0")
        assert sorted(one["seen"]) == sorted(seen)
        torch.testing.assert_close(one["weights"], two["weights"], rtol=0, atol=1e-5)
        assert one["norms"] == [pytest.approx(row, rel=1e-3, abs=1e-5) for row in two["norms"]]
        # every figure there is, so that a new one is covered by itself
        assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-3, abs=1e-4)
        assert one["rows"] == [pytest.approx(row, rel=1e-3, abs=1e-4) for row in two["rows"]]
        assert {"train/loss", "val/response_length"} <= one["metrics"].keys()
    start = worker.kit.make_module(EQUAL[key][0], worker.PolicySpec(str(tiny_model_dir)))
    start.configure_model()
    moved = max(float((value - two["weights"][name]).abs().max()) for name, value in start.model.state_dict().items())
    assert moved > 1e-3


def test_ranks_skip_together(first_launch):
    """Step 2 is NaN on rank 1 alone: both leave it out, weights and momentum stay as after step 1."""
    clean = load(first_launch / "clean.rank0")
    for rank in (0, 1):
        poisoned = load(first_launch / f"poisoned.rank{rank}")
        torch.testing.assert_close(poisoned["weights"], clean["weights"], rtol=0, atol=0)
        assert poisoned["metrics"]["train/skipped_steps"] == 1.0
    assert clean["metrics"]["train/skipped_steps"] == 0.0


def test_a_lost_rank_resumes_bit_for_bit(first_launch, worker, tiny_model_dir, strategy):
    """A killed rank takes the run down; both resume from the last checkpoint, inside a window."""
    folder, policy = first_launch, str(tiny_model_dir)
    last = folder / "killed" / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == 5
    assert last.is_dir() == (strategy == "fsdp2")
    jobs = [_run_job(folder, "killed", policy, ckpt=last), _run_job(folder, "moved", policy, ckpt=folder / "one" / "step4.ckpt")]
    worker.run(_run_job(folder, "one", policy, trainer={"max_steps": 4}), 0, 1)
    (folder / "one" / "checkpoints" / "last.ckpt").rename(folder / "one" / "step4.ckpt")
    code, output = worker.kit.launch(WORKER, jobs, folder / "second.json", strategy=strategy)
    assert code == 0, output[-5000:]
    _assert_same_run(folder, "whole", "killed", ranks=2)
    # one process stopped at a window's border, two went on
    weights = load(folder / "moved.out.rank0")["weights"]
    torch.testing.assert_close(weights, load(folder / "whole.out.rank0")["weights"], rtol=0, atol=1e-3)
    # two processes were killed inside a window, one may not go on
    worker.run(_run_job(folder, "killed", policy, ckpt=folder / "killed" / "checkpoints" / "step=5.ckpt"), 0, 1)
    assert "inside a window with other sizes: world_size 2 -> 1" in load(folder / "killed.out.rank0")["error"]


def test_killed_process_resumes_bit_for_bit(worker, tmp_path, tiny_model_dir):
    policy = str(tiny_model_dir)
    code, output = worker.kit.launch(WORKER, [_run_job(tmp_path, "killed", policy, kill=[3, 0])], tmp_path / "jobs.json", ranks=1)
    assert code == -9, output[-5000:]
    worker.run(_run_job(tmp_path, "whole", policy), 0, 1)
    worker.run(_run_job(tmp_path, "killed", policy, ckpt=tmp_path / "killed" / "checkpoints" / "last.ckpt"), 0, 1)
    _assert_same_run(tmp_path, "whole", "killed", ranks=1)


def test_resume_of_a_validated_run_from_every_step(worker, tmp_path, tiny_model_dir):
    policy = str(tiny_model_dir)
    worker.run(_run_job(tmp_path, "whole", policy), 0, 1)
    for step in range(1, 7):
        ckpt = tmp_path / "whole" / "checkpoints" / f"step={step}.ckpt"
        (tmp_path / f"again{step}").mkdir()
        rows = (tmp_path / "whole" / "metrics.csv").read_text()
        (tmp_path / f"again{step}" / "metrics.csv").write_text(rows + "9,half a li")
        worker.run(_run_job(tmp_path, f"again{step}", policy, ckpt=ckpt), 0, 1)
        _assert_same_run(tmp_path, "whole", f"again{step}", ranks=1)


def _assert_same_run(folder, a, b, ranks):
    for rank in range(ranks):
        one, other = load(folder / f"{a}.out.rank{rank}"), load(folder / f"{b}.out.rank{rank}")
        assert "weights" in other, other
        torch.testing.assert_close(one["weights"], other["weights"], rtol=0, atol=0)
        torch.testing.assert_close(one["optimizer"], other["optimizer"], rtol=0, atol=0)
        assert one["judge"] == other["judge"]
    rows = [(folder / name / "metrics.csv").read_text() for name in (a, b)]
    assert len(rows[0].splitlines()) == 8
    assert "val/reward" in rows[0]
    assert rows[0] == rows[1]
