"""Metrics against brute force, over batches and over two real processes, one of them without data."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aapa_lightning.metrics.expert_logprob import ExpertLogProb
from aapa_lightning.metrics.functional.expert_logprob import expert_logprob
from aapa_lightning.metrics.functional.length_distance import length_distance
from aapa_lightning.metrics.length_distance import LengthDistance

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(ours=lengths, theirs=lengths)
def test_length_distance_equals_matching_sorted_copies(ours, theirs):
    # With every length copied until both sides have N * M of them, the distance is the mean gap of the sorted lists.
    left, right = sorted(ours * len(theirs)), sorted(theirs * len(ours))
    expected = sum(abs(a - b) for a, b in zip(left, right, strict=True)) / len(left)
    assert length_distance(torch.tensor(ours), torch.tensor(theirs)).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_length_distance_over_batches_is_that_of_all_lengths():
    metric = LengthDistance()
    metric.update(torch.tensor([3, 50]), torch.tensor([10]))
    metric.update(torch.tensor([7]), torch.tensor([12, 90, 11]))
    whole = length_distance(torch.tensor([3, 50, 7]), torch.tensor([10, 12, 90, 11]))
    assert metric.compute() == whole
    assert whole > 0


def test_expert_logprob_weighs_tokens_not_batches():
    torch.manual_seed(0)
    logprobs, mask = -torch.rand(6, 4), torch.rand(6, 4) > 0.4
    metric = ExpertLogProb()
    for rows in (slice(0, 1), slice(1, 6)):
        metric.update(logprobs[rows].masked_fill(~mask[rows], float("nan")), mask[rows])
    torch.testing.assert_close(metric.compute(), logprobs[mask].mean())
    torch.testing.assert_close(expert_logprob(logprobs, mask), logprobs[mask].mean())


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_nothing_is_zero():
    assert ExpertLogProb().compute() == 0
    assert LengthDistance().compute() == 0
    assert expert_logprob(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)) == 0
    assert length_distance(torch.tensor([], dtype=torch.long), torch.tensor([4])) == 0


WORKER = """
import json, sys, warnings
import torch
from aapa_lightning.metrics.expert_logprob import ExpertLogProb
from aapa_lightning.metrics.length_distance import LengthDistance
warnings.simplefilter("ignore")
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
logprob, distance, lonely = ExpertLogProb(), LengthDistance(), LengthDistance()
batch = [torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-10.0]])][rank]
logprob.update(batch, torch.ones_like(batch).bool())
distance.update([torch.tensor([3, 50]), torch.tensor([7])][rank], [torch.tensor([10]), torch.tensor([12, 90, 11])][rank])
if rank == 0:
    lonely.update(torch.tensor([4]), torch.tensor([9]))
print(json.dumps([logprob.compute().item(), distance.compute().item(), lonely.compute().item()]))
torch.distributed.destroy_process_group()
"""


def test_two_processes_see_one_set(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, env=environment, text=True)
        for rank in range(2)
    ]
    whole = length_distance(torch.tensor([3, 50, 7]), torch.tensor([10, 12, 90, 11])).item()
    for worker in workers:
        output, _ = worker.communicate(timeout=60)
        assert worker.returncode == 0
        assert json.loads(output) == pytest.approx([-4.0, whole, 5.0])
