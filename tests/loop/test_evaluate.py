import pytest
from hypothesis import given
from hypothesis import strategies as st

from aapa_lightning.loop.evaluate import EvalLoader
from aapa_lightning.types import Record


@given(st.integers(0, 30), st.integers(1, 6), st.integers(1, 4))
def test_ranks_see_every_prompt_once_in_equally_many_batches(count: int, batch_size: int, world_size: int) -> None:
    records = [Record(str(i)) for i in range(count)]
    loaders = [EvalLoader(records, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    steps = [step for loader in loaders for step in loader]
    assert sorted(i for step in steps for i in step.indices) == list(range(count))
    assert all(records[i] is record for step in steps for i, record in zip(step.indices, step.records, strict=True))
    assert all(len(step.records) <= batch_size for step in steps)
    assert len({len(list(loader)) for loader in loaders}) == 1
    assert len(loaders[0]) == len(list(loaders[0]))


@pytest.mark.parametrize(("count", "batches"), [(0, 0), (1, 1), (4, 1), (5, 2), (9, 3)])
def test_number_of_batches(count: int, batches: int) -> None:
    assert len(EvalLoader([Record("x")] * count, 2, world_size=2)) == batches
