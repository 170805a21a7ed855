"""DeepSpeed's ZeRO stages on two CPU ranks: the run of DDP, with checkpoints that continue and are exported."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from aapa_lightning.export import export_policy
from aapa_lightning.sharding.files import read_step

WORKER = Path(__file__).with_name("deepspeed_worker.py")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_dir):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; pip install deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    done = run_ranks(WORKER, folder, tiny_model_dir, timeout=600, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def load(folder, name, rank=0):
    return torch.load(folder / f"{name}.rank{rank}", weights_only=True)


def same(one, other, atol=0.0):
    torch.testing.assert_close(one["weights"], other["weights"], rtol=0, atol=atol)


@pytest.mark.parametrize(("name", "plain"), [("zero1", "ddp"), ("zero2", "ddp"), ("poisoned", "poisoned-ddp")])
def test_a_run_is_that_of_ddp(folder, name, plain):
    zero, ddp = load(folder, name), load(folder, plain)
    same(zero, ddp, atol=1e-6)
    for mine, theirs in zip(zero["rows"], ddp["rows"], strict=True):
        left_out = theirs["train/grad_norm"] != theirs["train/grad_norm"]
        if left_out:
            assert mine.pop("train/grad_norm") == float("inf")
            theirs.pop("train/grad_norm")
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6, nan_ok=True)
    assert ddp["rows"][-1]["train/skipped_steps"] == (name == "poisoned")


@pytest.mark.parametrize("name", ["zero1", "zero2", "poisoned", "half", "resumed"])
def test_ranks_hold_the_same_model(folder, name):
    same(load(folder, name), load(folder, name, 1))


def test_a_run_that_is_resumed_inside_a_window_goes_on_bit_for_bit(folder):
    whole, resumed = load(folder, "zero2"), load(folder, "resumed")
    same(whole, resumed)
    assert whole["rows"][2:] == resumed["rows"]


def test_the_reference_is_rounded_as_the_policy_is_and_buffers_are_not(folder):
    half = load(folder, "half")
    assert {value.dtype for value in half["weights"].values()} == {torch.bfloat16}
    assert half["buffers"] == {"torch.float32"}
    first = half["rows"][0]
    assert first["train/policy/kl"] == 0
    assert first["train/policy/ratio"] == 1


def test_a_checkpoint_is_exported(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    last = folder / "whole" / "checkpoints" / "last.ckpt"
    assert last.is_symlink()
    assert read_step(last) == 4
    exported = AutoModelForCausalLM.from_pretrained(export_policy(last, tmp_path / "out")).state_dict()
    torch.testing.assert_close(exported, load(folder, "zero2")["weights"], rtol=0, atol=0)


def test_other_strategies_do_not_continue_a_run(folder):
    assert "no optimiser state that this strategy reads" in load(folder, "from-zero")["error"]
    assert "expected a checkpoint of DeepSpeed's stages 1 or 2" in load(folder, "from-ddp")["error"]
