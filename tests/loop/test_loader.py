from hypothesis import given
from hypothesis import strategies as st

from aapa_lightning.loop.loader import WindowLoader, WindowStep
from aapa_lightning.loop.plan import WindowPlan
from aapa_lightning.loop.stream import RecordStream
from aapa_lightning.types import Record

RECORDS = [Record(str(i)) for i in range(11)]


def loader(plan: WindowPlan, rank: int = 0, position: int = 0, demonstrations: int = 7) -> WindowLoader:
    return WindowLoader(
        plan,
        rank,
        prompts=RecordStream(RECORDS, 1) if plan.prompts else None,
        demonstrations=RecordStream([Record(f"d{i}") for i in range(demonstrations)], 2) if plan.demonstrations else None,
        position=lambda: position,
    )


def content(step: WindowStep) -> tuple:
    return (
        step.window,
        step.micro_step,
        tuple((slot, record.prompt) for slot, record in step.prompts),
        tuple((slot, record.prompt) for slot, record in step.demonstrations),
    )


def run(plan: WindowPlan, epochs: int) -> list[tuple]:
    """An uninterrupted run: the loader is built anew for every epoch, as a Trainer does."""
    steps: list[tuple] = []
    for _ in range(epochs):
        steps += [content(step) for step in loader(plan, position=len(steps))]
    return steps


@st.composite
def plans(draw) -> WindowPlan:
    minibatches, accumulate = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    prompts = draw(st.integers(0, 2)) * minibatches * accumulate
    demonstrations = draw(st.integers(0 if prompts else 1, 2)) * accumulate
    return WindowPlan(
        prompts=prompts, minibatches=minibatches, passes=draw(st.integers(1, 2)), demonstrations=demonstrations, accumulate=accumulate
    )


@given(plans(), st.data())
def test_resumed_anywhere_it_yields_what_follows(plan: WindowPlan, data) -> None:
    length = len(loader(plan))
    whole = run(plan, 3)
    assert len(whole) == 3 * length
    assert [step[:2] for step in whole] == [divmod(i, plan.micro_steps_per_window) for i in range(3 * length)]
    position = data.draw(st.integers(0, 2 * length))
    # an epoch's length from wherever it starts: a trainer that limits its epochs starts them anywhere
    assert [content(step) for step in loader(plan, position=position)] == whole[position : position + length]
    assert len(loader(plan, position=position)) == length


def test_iterating_has_no_side_effects_and_reads_the_position_when_it_starts() -> None:
    plan = WindowPlan(prompts=2, passes=2)
    done = 0
    built = WindowLoader(plan, 0, prompts=RecordStream(RECORDS), position=lambda: done)
    first = [content(step) for step in built]
    assert [content(step) for step in built] == first
    next(iter(built))
    assert [content(step) for step in built] == first
    done = 3
    assert [content(step) for step in built][: len(first) - 3] == first[3:]


def test_windows_walk_the_stream_and_straddle_passes() -> None:
    plan = WindowPlan(prompts=4)
    built, stream = loader(plan), RecordStream(RECORDS, 1)
    found = [record.prompt for number in range(11) for _, record in built.window(number).prompts]
    assert found == [stream[i].prompt for i in range(44)]
    assert sorted(found, key=int) == sorted([record.prompt for record in RECORDS] * 4, key=int)  # four passes, exactly
    assert len(built) == 2


def test_ranks_share_a_window() -> None:
    def union(accumulate: int, world_size: int, number: int) -> set[tuple]:
        plan = WindowPlan(prompts=8, minibatches=2, demonstrations=4, accumulate=accumulate, world_size=world_size)
        steps = [loader(plan, rank).window(number) for rank in range(world_size)]
        prompts = [(slot, record.prompt) for step in steps for slot, record in step.prompts]
        demonstrations = [(slot, record.prompt) for step in steps for slot, record in step.demonstrations]
        assert len(prompts) == 8
        assert len(demonstrations) == 8
        assert sorted(slot for slot, _ in prompts + demonstrations) == list(range(16))
        return set(prompts + demonstrations)

    for number in range(4):
        assert union(4, 1, number) == union(2, 2, number) == union(1, 4, number)


def test_demonstrations_alone() -> None:
    plan = WindowPlan(demonstrations=3)
    steps = list(loader(plan))
    assert len(steps) == len(loader(plan)) == 2
    assert all(step.prompts == [] and len(step.demonstrations) == 3 for step in steps)


def test_a_dataset_smaller_than_a_window_repeats() -> None:
    plan = WindowPlan(prompts=24)
    steps = list(loader(plan))
    assert len(steps) == 1
    assert {record.prompt for _, record in steps[0].prompts} == {record.prompt for record in RECORDS}
