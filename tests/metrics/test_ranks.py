"""Every metric over two real processes gives what one process with all the data gives, also where one of the two has none."""

import json
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from aapa_lightning.metrics.anchor_score import AnchorScore, ExpertGap
from aapa_lightning.metrics.discrimination import AUROC, CalibrationError
from aapa_lightning.metrics.expert_logprob import ExpertLogProb
from aapa_lightning.metrics.instruction_accuracy import InstructionAccuracy
from aapa_lightning.metrics.length_distance import LengthDistance
from aapa_lightning.metrics.logprob_distance import LogProbDistance

LOGITS, LABELS = torch.tensor([2.0, -1.0, 0.5, 30.0, 0.25]), torch.tensor([True, False, True, False, True])
ROWS, MASK = -torch.arange(12.0).reshape(4, 3), torch.arange(12).reshape(4, 3) % 4 != 1
GROUPS = torch.tensor([0, 0, 4, 5, 5])


def parts():
    """Each metric with its updates; the ranks take them in turn."""
    return {
        "expert_logprob": (ExpertLogProb(), [(ROWS[:1], MASK[:1]), (ROWS[1:], MASK[1:])]),
        "length_distance": (
            LengthDistance(),
            [(torch.tensor([3, 50]), torch.tensor([10])), (torch.tensor([7]), torch.tensor([12, 90, 11]))],
        ),
        "logprob_distance": (LogProbDistance(), [(ROWS[:1], MASK[:1], ROWS[3:], MASK[3:]), (ROWS[1:2], MASK[1:2], ROWS[2:3], MASK[2:3])]),
        "auroc": (AUROC(), [(LOGITS[:2], LABELS[:2]), (LOGITS[2:], LABELS[2:])]),
        "calibration": (CalibrationError(bins=5), [(LOGITS[:2], LABELS[:2]), (LOGITS[2:], LABELS[2:])]),
        "accuracy": (
            InstructionAccuracy(),
            [([[True, False]], [[True, True]]), ([[True], [False, False, True]], [[True], [True, False, True]])],
        ),
        "score": (AnchorScore(), [(LOGITS[:2], torch.tensor([0, 2])), (LOGITS[2:], torch.tensor([0, 1, 3]))]),
        "gap": (
            ExpertGap(),
            [(LOGITS[:2], GROUPS[:2], LOGITS[1:2] + 4, GROUPS[1:2]), (LOGITS[2:], GROUPS[2:], LOGITS[2:] * 2, GROUPS[2:])],
        ),
        **{
            f"{name} on one rank": (metric, [update])
            for name, metric, update in (
                ("length_distance", LengthDistance(), (torch.tensor([4]), torch.tensor([9]))),
                ("auroc", AUROC(), (LOGITS, LABELS)),
                ("accuracy", InstructionAccuracy(), ([[True, False]], [[True, True]])),
                ("score", AnchorScore(), (LOGITS, torch.tensor([0, 5]))),
            )
        },
    }


def values(rank=0, world_size=1):
    found = {}
    for name, (metric, updates) in parts().items():
        for update in updates[rank::world_size]:
            metric.update(*update)
        value = metric.compute()
        found[name] = [float(part) for part in value.values()] if isinstance(value, dict) else float(value)
    return found


def work(folder):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(values(rank, 2)))
    torch.distributed.destroy_process_group()


def test_two_processes_see_one_set(tmp_path):
    done = run_ranks(__file__, tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr[-5000:]
    whole = values()
    assert whole["expert_logprob"] < 0 < min(whole["length_distance"], whole["logprob_distance"], whole["calibration"])
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found.keys() == whole.keys()
        for name, value in found.items():
            assert value == pytest.approx(whole[name], rel=1e-6), name


if __name__ == "__main__":
    work(sys.argv[1])
