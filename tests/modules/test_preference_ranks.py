"""Preference objectives on two ranks: the gradients of one process, statistics of the whole batch, one cache, one figure."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

WORKER = Path(__file__).with_name("preference_worker.py")
#: Sums over pairs and tokens, and over the whole step (KTO's z0): ranks and accumulation cut the step as they like.
PLAIN = {
    "dpo": {"options": {"objective": "dpo", "options": {"beta": 0.05}}},
    "dpo anchored": {"options": {"objective": "dpo"}, "anchored": True},
    "dpo cached": {"options": {"objective": "dpo", "options": {"beta": 0.05}}, "cached": True, "moved": True},
    "simpo": {"options": {"objective": "simpo"}},
    "orpo": {"options": {"objective": "orpo"}},
    "rpo": {"options": {"objective": "rpo", "sft_weight": 0.5}},
    "kto": {"options": {"objective": "kto", "options": {"beta": 1.0}}, "moved": True},
    "kto labels": {"options": {"objective": "kto", "options": {"beta": 1.0}, "sft_weight": 0.1}, "labels": True, "moved": True},
}
#: Statistics of a micro-step over all ranks: only the ranks may cut it.
BATCH = {
    "amapo": {"options": {"objective": "amapo"}},
    "dr_dpo": {"options": {"objective": "dr_dpo", "options": {"beta": 0.05, "beta_prime": 0.3}}, "moved": True},
    "gapo": {"options": {"objective": "gapo"}, "stress": {"rho": 0.2}},
    "gapo layers": {"options": {"objective": "gapo"}, "stress": {"rho": 0.2, "start_layer": 1}},
    "gapo noise": {"options": {"objective": "gapo"}, "stress": {"rho": 0.2, "direction": "gaussian"}},
}


def _job(key, folder, policy, accumulate):
    job = {**(PLAIN | BATCH)[key], "policy": policy, "accumulate": accumulate, "out": str(folder / f"{key}-{accumulate}")}
    if job.pop("cached", False):
        job["options"] = job["options"] | {"reference_cache": str(folder / f"cache-{accumulate}")}
    return job | ({"reference": f"{policy}-moved"} if job.pop("moved", False) else {})


@pytest.fixture(scope="module")
def worker(kit):
    return kit.load_worker(WORKER)


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    """The policy; beside it, with ``-moved``, one with sharper distributions: a reference whose KL to the policy is above 0."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.25)
    model.save_pretrained(f"{tiny_model_dir}-moved")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(f"{tiny_model_dir}-moved")
    return str(tiny_model_dir)


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def two_ranks(request, tmp_path_factory, policy):
    """Two processes: every job of both tables."""
    folder = tmp_path_factory.mktemp("preference-ranks")
    jobs = [_job(key, folder, policy, 2) for key in PLAIN] + [_job(key, folder, policy, 1) for key in BATCH]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = run_ranks(WORKER, folder / "jobs.json", AAPA_TEST_STRATEGY=request.param)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(one, two):
    torch.testing.assert_close(one["weights"], two["weights"], rtol=0, atol=2e-5)
    for row, other in zip(one["rows"], two["rows"], strict=True):
        assert row == pytest.approx(other, rel=2e-3, abs=2e-4)
    assert one["val"] == pytest.approx(two["val"], rel=1e-3, abs=1e-4)
    assert {"val/pair_accuracy", "val/chosen_logprob", "val/rejected_logprob"} <= two["val"].keys()
    assert 5 * two["val"]["val/pair_accuracy"] == pytest.approx(3)


def assert_ranks_agree(folder, name):
    first, second = load(folder / f"{name}.rank0"), load(folder / f"{name}.rank1")
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert first["val"] == second["val"]
    return first


@pytest.mark.parametrize("key", PLAIN)
def test_ranks_and_accumulation_do_not_change_the_gradient(two_ranks, worker, policy, tmp_path, key):
    two = assert_ranks_agree(two_ranks, f"{key}-2")
    for accumulate in (1, 4):
        worker.run(_job(key, tmp_path, policy, accumulate), 0, 1)
        assert_same(load(tmp_path / f"{key}-{accumulate}.rank0"), two)
    assert abs(two["rows"][-1]["train/preference/margin"]) > 1e-3
    if "kto" in key:
        assert two["rows"][0]["train/preference/kl"] > 0.1


@pytest.mark.parametrize("key", BATCH)
def test_ranks_share_the_statistics_of_a_micro_step(two_ranks, worker, policy, tmp_path, key):
    two = assert_ranks_agree(two_ranks, f"{key}-1")
    worker.run(_job(key, tmp_path, policy, 1), 0, 1)
    assert_same(load(tmp_path / f"{key}-1.rank0"), two)
    if "gapo" in key:
        assert two["rows"][0]["train/preference/anchor_gap"] != 0


def test_batch_statistics_are_no_sums(worker, policy, tmp_path):
    """What the table above says of them: accumulation is another objective."""
    for accumulate in (1, 4):
        worker.run(_job("dr_dpo", tmp_path, policy, accumulate), 0, 1)
    one, four = (load(tmp_path / f"dr_dpo-{accumulate}.rank0")["weights"] for accumulate in (1, 4))
    assert max(float((one[name] - four[name]).abs().max()) for name in one) > 1e-3


def test_a_cache_that_two_ranks_filled(two_ranks, worker, policy, tmp_path):
    """Micro-steps of the same size: the same batches, so the same file."""
    worker.run(_job("dpo cached", tmp_path, policy, 4), 0, 1)
    names = ("reference.json", "reference.safetensors")
    ours, theirs = ([(folder / name).read_bytes() for name in names] for folder in (tmp_path / "cache-4", two_ranks / "cache-2"))
    assert ours == theirs
    assert json.loads(ours[0])["responses"] == len(
        {(r.prompt, text) for r in worker.kit.make_records(16) for text in (r.chosen, r.rejected)}
    )
