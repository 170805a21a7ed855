import pytest
from hypothesis import given
from hypothesis import strategies as st

from aapa_lightning.errors import DataError
from aapa_lightning.loop.stream import RecordStream
from aapa_lightning.types import Record


def stream(count: int, seed: int = 0) -> RecordStream:
    return RecordStream([Record(str(i)) for i in range(count)], seed)


@given(st.integers(1, 30), st.integers(0, 5), st.integers(0, 4))
def test_every_pass_is_a_permutation(count: int, seed: int, number: int) -> None:
    records = stream(count, seed)
    passed = [records[number * count + i].prompt for i in range(count)]
    assert sorted(passed, key=int) == [str(i) for i in range(count)]
    assert len(records) == count


@given(st.integers(1, 12), st.lists(st.integers(0, 60), max_size=20))
def test_a_record_depends_on_seed_and_index_alone(count: int, indices: list[int]) -> None:
    visited = stream(count, 3)
    assert [visited[i].prompt for i in indices] == [stream(count, 3)[i].prompt for i in indices]


def test_passes_and_seeds_differ() -> None:
    first, other = stream(50), stream(50, 1)
    orders = [[s[p * 50 + i].prompt for i in range(50)] for s in (first, other) for p in range(3)]
    assert len(set(map(tuple, orders))) == 6


def test_equal_seeds_align_two_datasets_of_equal_length() -> None:
    prompts, experts = stream(20, 5), RecordStream([Record(str(i), ("expert",)) for i in range(20)], 5)
    assert [prompts[i].prompt for i in range(50)] == [experts[i].prompt for i in range(50)]


def test_few_permutations_are_kept() -> None:
    records = stream(4)
    for i in range(400):
        records[i]
    assert len(records._passes) <= 2


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(DataError, match=r"^data\.train: expected at least one record .* empty dataset"):
        RecordStream([], 0, "data.train")
