"""What ``SampleWriter`` writes, and when."""

from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from aapa_lightning.callbacks.samples import SampleWriter
from aapa_lightning.errors import ConfigError
from aapa_lightning.loop.experience import Experience
from aapa_lightning.types import Record, Rollouts


def window(scores=None):
    """Two prompts with two responses each, of 1, 2, 3 and 0 tokens."""
    mask = torch.arange(3)[None] < torch.tensor([1, 2, 3, 0])[:, None]
    records = [
        Record(prompt="p"),
        Record(prompt="p"),
        *[Record(prompt=({"role": "system", "content": "s"}, {"role": "user", "content": "u"}))] * 2,
    ]
    rollouts = Rollouts(
        prompt_ids=torch.zeros(4, 1, dtype=torch.int64),
        prompt_mask=torch.ones(4, 1, dtype=torch.bool),
        response_ids=torch.zeros(4, 3, dtype=torch.int64),
        response_mask=mask,
        truncated=torch.tensor([False, False, True, False]),
        group_ids=torch.tensor([0, 0, 1, 1]),
        engine_logprobs=torch.zeros(4, 3),
        token_ends=torch.zeros(4, 3, dtype=torch.int64),
        texts=["a", "b b", "c c c", ""],
        records=records,
    )
    rewards = torch.tensor([[1.0, 0.5], [0.0, 0.5], [1.0, 0.25], [0.0, 0.0]])
    experience = Experience(rollouts, mask, rewards, torch.tensor([0.5, -0.5, 1.0, -1.0]), scores=scores)
    return SimpleNamespace(experience=experience, plan=SimpleNamespace(samples=2))


def run(writer, folder, steps, *, start=0, accumulate=1, rank=0, shown=None):
    """Calls the hooks as a Trainer does: ``global_step`` counts the steps that are done."""
    trainer = SimpleNamespace(global_step=start, is_global_zero=rank == 0, default_root_dir=str(folder))
    module = SimpleNamespace(window=shown or window())
    writer.on_train_start(trainer, module)
    for micro_step in range(1, (steps - start) * accumulate + 1):
        trainer.global_step = start + micro_step // accumulate
        writer.on_train_batch_end(trainer, module, None, None, micro_step)
    return sorted(path.name for path in folder.glob("samples.parquet/*"))


def test_rows_of_the_first_groups(tmp_path):
    run(SampleWriter(groups=2), tmp_path, 1, shown=window(scores=torch.tensor([-1.0, -2.0, -3.0, -4.0])))
    assert pq.read_table(tmp_path / "samples.parquet").to_pydict() == {
        "step": [1, 1, 1, 1],
        "prompt": ["p", "p", "u", "u"],
        "response": ["a", "b b", "c c c", ""],
        "tokens": [1, 2, 3, 0],
        "truncated": [False, False, True, False],
        "rewards": [[1.0, 0.5], [0.0, 0.5], [1.0, 0.25], [0.0, 0.0]],
        "advantage": [0.5, -0.5, 1.0, -1.0],
        "anchor_score": [-1.0, -2.0, -3.0, -4.0],
    }


def test_no_more_groups_than_asked_for_and_no_score_without_an_anchor(tmp_path):
    run(SampleWriter(groups=1), tmp_path, 1)
    table = pq.read_table(tmp_path / "samples.parquet")
    assert table.num_rows == 2
    assert "anchor_score" not in table.column_names


@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_n_steps_once_a_step(accumulate, tmp_path):
    written = run(SampleWriter(every_n_steps=2), tmp_path, 5, accumulate=accumulate)
    assert written == ["step-00000001.parquet", "step-00000003.parquet", "step-00000005.parquet"]


def test_a_resumed_run_leaves_the_step_before_it_alone(tmp_path):
    run(SampleWriter(every_n_steps=1), tmp_path, 2, accumulate=2)
    before = (tmp_path / "samples.parquet" / "step-00000002.parquet").read_bytes()
    later = window(scores=torch.zeros(4))
    assert len(run(SampleWriter(every_n_steps=1), tmp_path, 3, start=2, accumulate=2, shown=later)) == 3
    assert (tmp_path / "samples.parquet" / "step-00000002.parquet").read_bytes() == before


def test_nothing_from_other_ranks_or_without_rollouts(tmp_path):
    assert run(SampleWriter(), tmp_path, 1, rank=1) == []
    assert run(SampleWriter(), tmp_path, 1, shown=SimpleNamespace(experience=None)) == []


@pytest.mark.parametrize("wrong", [{"groups": 0}, {"every_n_steps": 0}])
def test_sizes_below_one_are_refused(wrong):
    with pytest.raises(ConfigError, match="at least 1, found"):
        SampleWriter(**wrong)
