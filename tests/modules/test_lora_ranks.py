"""Adapters on two ranks, copied (ddp) and sharded (fsdp2): the gradient of one process, kills and resumes, merged exports."""

from pathlib import Path

import pytest
import torch

from aapa_lightning.adapters import LoraSpec, adapter_names, base_state
from aapa_lightning.policy import PolicySpec, load_policy
from aapa_lightning.sharding.files import read_checkpoint

WORKER = Path(__file__).with_name("ddp_worker.py")
LORA = {"r": 4, "modules_to_save": ["norm"]}
JOBS = {
    "sft": {"module": "sft", "options": {"batch_size": 8}, "anchor": {"weight": 0.7}},
    "grpo kl": {"module": "grpo", "options": {"prompts_per_window": 8, "beta": 0.2, "reward_kl": 0.1}},
    "dora": {"module": "grpo", "options": {"prompts_per_window": 8}, "lora": {"r": 2, "dora": True}},
    "half": {
        "module": "grpo",
        "options": {"prompts_per_window": 8, "beta": 0.2},
        "spec": {"dtype": "bfloat16", "activation_checkpointing": True},
    },
}


@pytest.fixture(scope="module")
def worker(kit):
    return kit.load_worker(WORKER)


def job(key, folder, policy, accumulate):
    own = {"lora": LORA} | JOBS[key]
    own["options"] = own["options"] | {"sgd": True}
    return own | {"policy": policy, "trainer": {"max_steps": 2, "accumulate": accumulate}, "out": str(folder / key)}


def stateful(folder, name, policy, steps=5, **extra):
    """GRPO with a reference: two optimiser steps a window, so that odd steps lie inside one."""
    own = {"module": "grpo", "options": {"updates_per_window": 2, "beta": 0.2, "reward_kl": 0.1}, "lora": LORA, "policy": policy}
    paths = {"run": str(folder / name), "out": str(folder / f"{name}.out"), "export": str(folder / f"{name}.export")}
    return own | paths | {"trainer": {"max_steps": steps}, "anchor": {"weight": 0.5, "adaptive": True}} | extra


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def strategy(request):
    return request.param


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_model_dir, strategy, kit):
    """Every kind, an uninterrupted run, and one that loses rank 1 before its fourth step, inside a window."""
    folder, policy = tmp_path_factory.mktemp("ranks"), str(tiny_model_dir)
    jobs = [job(key, folder, policy, accumulate=2) for key in JOBS]
    jobs += [stateful(folder, "whole", policy), stateful(folder, "killed", policy, kill=[3, 1])]
    code, output = kit.launch(WORKER, jobs, folder / "first.json", strategy=strategy)
    assert code != 0
    assert not (folder / "killed.out.rank0").exists()
    assert (folder / "whole.out.rank1").exists(), output[-5000:]
    return folder


@pytest.mark.parametrize("key", JOBS)
def test_ranks_do_not_change_the_gradient(first, worker, tmp_path, tiny_model_dir, key, strategy):
    two = load(first / f"{key}.rank0")
    torch.testing.assert_close(two["weights"], load(first / f"{key}.rank1")["weights"], rtol=0, atol=0)
    worker.run(job(key, tmp_path, str(tiny_model_dir), accumulate=4), 0, 1)
    one = load(tmp_path / f"{key}.rank0")
    # sums of 16-bit activations depend on how rows are batched
    torch.testing.assert_close(one["weights"], two["weights"], rtol=0, atol=1e-5 if key != "half" else 2e-2)
    options = JOBS[key].get("spec", {})
    start, _ = load_policy(PolicySpec(str(tiny_model_dir), **options, lora=LoraSpec(**JOBS[key].get("lora", LORA))))
    moved = {name for name, value in start.state_dict().items() if not torch.equal(value, two["weights"][name])}
    assert moved == adapter_names(start)


@pytest.mark.slow
def test_a_lost_rank_resumes_bit_for_bit(kit, first, tiny_model_dir, strategy):
    last = first / "killed" / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(last)
    assert checkpoint["global_step"] == 3
    start, _ = load_policy(PolicySpec(str(tiny_model_dir), lora=LoraSpec(**LORA)))
    assert set(checkpoint["state_dict"]) == {f"model.{name}" for name in adapter_names(start)}
    code, output = kit.launch(
        WORKER, [stateful(first, "killed", str(tiny_model_dir), ckpt=str(last))], first / "second.json", strategy=strategy
    )
    assert code == 0, output[-5000:]
    for rank in (0, 1):
        whole, again = load(first / f"whole.out.rank{rank}"), load(first / f"killed.out.rank{rank}")
        torch.testing.assert_close(again["weights"], whole["weights"], rtol=0, atol=0)
        torch.testing.assert_close(again["optimizer"], whole["optimizer"], rtol=0, atol=0)
    assert (first / "whole" / "metrics.csv").read_text() == (first / "killed" / "metrics.csv").read_text()


def test_ranks_export_merged(first, tiny_model_dir):
    """What two ranks wrote is what one process writes of the same weights."""
    from transformers import AutoModelForCausalLM

    trained, _ = load_policy(PolicySpec(str(tiny_model_dir), lora=LoraSpec(**LORA)))
    trained.load_state_dict(load(first / "whole.out.rank0")["weights"])
    merged = AutoModelForCausalLM.from_pretrained(first / "whole.export")
    with torch.no_grad():
        ids = torch.arange(3, 40)[None]
        torch.testing.assert_close(merged(ids).logits, trained.eval()(ids).logits, rtol=0, atol=2e-4)
    assert any(not torch.equal(value, base_state(trained)[name]) for name, value in merged.state_dict().items())
