"""Reward models on two ranks: the same weights, training metrics and held-out figures as one process; and figures by hand."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from aapa_lightning.data.datamodule import AapaDataModule

WORKER = Path(__file__).with_name("reward_worker.py")
OPTIONS = {"ranking": {}, "diff": {"golden_loss": "diff", "golden_weight": 0.05, "golden_batch_size": 8}}


@pytest.fixture(scope="module")
def worker():
    source = importlib.util.spec_from_file_location("reward_worker", WORKER)
    module = importlib.util.module_from_spec(source)
    sys.path.insert(0, str(WORKER.parent))  # as it is when the worker runs by itself
    source.loader.exec_module(module)
    yield module
    sys.path.remove(str(WORKER.parent))


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def two_ranks(request, tmp_path_factory, tiny_model_dir):
    """What two ranks with two micro-steps each wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = [
        {"base": str(tiny_model_dir), "options": options, "accumulate": 2, "out": str(folder / key)} for key, options in OPTIONS.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = run_ranks(WORKER, folder / "jobs.json", AAPA_TEST_STRATEGY=request.param)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return folder


@pytest.mark.parametrize("key", OPTIONS)
def test_ranks_and_accumulation_change_nothing(two_ranks, worker, tmp_path, tiny_model_dir, key):
    first, second = (torch.load(two_ranks / f"{key}.rank{rank}", weights_only=True) for rank in (0, 1))
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert first["figures"] == second["figures"]
    for accumulate in (1, 4):
        worker.run({"base": str(tiny_model_dir), "options": OPTIONS[key], "accumulate": accumulate, "out": str(tmp_path / "one")}, 0, 1)
        one = torch.load(tmp_path / "one.rank0", weights_only=True)
        torch.testing.assert_close(one["weights"], first["weights"], rtol=0, atol=1e-5)
        assert one["figures"] == pytest.approx(first["figures"], abs=1e-5)
        assert one["trained"] == pytest.approx(first["trained"], rel=1e-3, abs=1e-4)


def test_figures_by_hand(worker, tiny_model_dir):
    rewards = worker.rewards
    module = rewards.make_reward_model(worker.PolicySpec(str(tiny_model_dir)))
    human, golden = rewards.make_records(11), rewards.make_golden(7, 30)
    (figures, *_) = rewards.make_trainer(2).validate(module, AapaDataModule(val=human, golden_val=golden), verbose=False)
    module.eval()
    for prefix, records in (("", human), ("golden_", golden)):
        with torch.no_grad():
            chosen, rejected = module._scores([module.pairs.encode(record) for record in records])
        margin = (chosen - rejected).double()
        confidence, right = margin.abs().sigmoid(), (margin > 0).double()
        bins = (confidence * 20).long().clamp(max=19)
        gaps = [abs(float((right - confidence)[bins == b].sum())) / len(records) for b in range(10, 20)]
        assert figures[f"val/{prefix}accuracy"] == pytest.approx(float(right.mean()))
        assert figures[f"val/{prefix}ece"] == pytest.approx(sum(gaps), abs=1e-5)
        assert 0 < float(right.mean()) < 1
