from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aapa_lightning.errors import ConfigError
from aapa_lightning.loop.plan import WindowPlan

sizes = st.integers(1, 4)


@st.composite
def plans(draw, accumulate=sizes, world_size=sizes) -> WindowPlan:
    accumulate, world_size, minibatches = draw(accumulate), draw(world_size), draw(sizes)
    return WindowPlan(
        prompts=draw(st.integers(1, 3)) * minibatches * accumulate * world_size,
        samples=draw(sizes),
        minibatches=minibatches,
        passes=draw(sizes),
        demonstrations=draw(st.integers(0, 3)) * accumulate * world_size,
        accumulate=accumulate,
        world_size=world_size,
    )


def trained(plan: WindowPlan, rank: int, micro_step: int) -> list[int]:
    return plan.prompt_slots(rank)[plan.prompt_slice(micro_step)]


def imitated(plan: WindowPlan, window: int, rank: int, micro_step: int) -> list[int]:
    first = window * plan.demonstrations * plan.steps_per_window
    return [first + place for place in plan.demonstration_places(rank)[plan.demonstration_slice(micro_step)]]


@given(plans())
def test_ranks_partition_a_window_and_a_pass_uses_every_slot_once(plan: WindowPlan) -> None:
    ranks = range(plan.world_size)
    assert sorted(slot for rank in ranks for slot in plan.prompt_slots(rank)) == list(range(plan.prompts))
    per_pass = plan.minibatches * plan.accumulate
    for number in range(plan.passes):
        steps = range(number * per_pass, (number + 1) * per_pass)
        assert sorted(slot for rank in ranks for m in steps for slot in trained(plan, rank, m)) == list(range(plan.prompts))
        for rank in ranks:
            assert [slot for m in steps for slot in trained(plan, rank, m)] == plan.prompt_slots(rank)


@given(plans())
def test_every_micro_step_has_its_share_and_its_place(plan: WindowPlan) -> None:
    assert plan.micro_steps_per_window == plan.minibatches * plan.passes * plan.accumulate
    for micro_step in range(plan.micro_steps_per_window):
        assert len(trained(plan, 0, micro_step)) == plan.prompts_per_slice
        assert len(imitated(plan, 0, 0, micro_step)) == plan.demonstrations_per_slice
        assert plan.step_of(micro_step) == micro_step // plan.accumulate
        assert plan.minibatch_of(micro_step) == (micro_step // plan.accumulate) % plan.minibatches
        # a minibatch is the same prompts in every pass and on every layout
        size = plan.prompts // plan.minibatches
        first = plan.minibatch_of(micro_step) * size
        assert set(trained(plan, plan.world_size - 1, micro_step)) <= set(range(first, first + size))
    assert plan.locate(3 * plan.micro_steps_per_window + 1) == divmod(3 * plan.micro_steps_per_window + 1, plan.micro_steps_per_window)


@given(plans(), st.booleans())
def test_rows_are_those_of_prompts_then_of_demonstrations(plan: WindowPlan, sampled: bool) -> None:
    """A rank's rollouts hold every row once: all prompts', in every pass anew, then each micro-step's demonstrations'."""
    plan = replace(plan, sample_demonstrations=sampled)
    micro_steps = range(plan.micro_steps_per_window)
    prompts = plan.samples * len(plan.prompt_slots(0))
    per_pass = plan.minibatches * plan.accumulate
    for number in range(plan.passes):
        rows = [i for m in micro_steps[number * per_pass :][:per_pass] for i in range(prompts)[plan.prompt_rows(m)]]
        assert rows == list(range(prompts))
    others = plan.samples * len(plan.demonstration_places(0))
    assert [i for m in micro_steps for i in range(prompts + others)[plan.demonstration_rows(m)]] == list(range(prompts, prompts + others))
    for m in micro_steps:
        slots = plan.prompt_slots(0)[plan.prompt_slice(m)]
        assert plan.prompt_rows(m).stop - plan.prompt_rows(m).start == plan.samples * len(slots)
        assert plan.demonstration_rows(m).stop - plan.demonstration_rows(m).start == plan.samples * plan.demonstrations_per_slice


@given(plans())
def test_places_of_ranks_partition_the_demonstrations_of_a_window(plan: WindowPlan) -> None:
    places = sorted(place for rank in range(plan.world_size) for place in plan.demonstration_places(rank))
    assert places == list(range(plan.demonstrations * plan.steps_per_window))


def test_what_generates() -> None:
    assert WindowPlan(demonstrations=2, sample_demonstrations=True).generates
    assert not WindowPlan(demonstrations=2).generates
    assert WindowPlan(prompts=2, sample_demonstrations=True).generates
    # four prompts of three samples; then three samples to each of the two demonstrations of every step
    plan = WindowPlan(prompts=4, samples=3, minibatches=2, demonstrations=2, sample_demonstrations=True, accumulate=2)
    assert [plan.demonstration_rows(m) for m in range(4)] == [slice(12, 15), slice(15, 18), slice(18, 21), slice(21, 24)]


@given(plans(), st.integers(0, 3))
def test_demonstrations_are_dealt_out_once_and_in_order_of_the_stream(plan: WindowPlan, windows: int) -> None:
    found = [
        (window * plan.steps_per_window + plan.step_of(m), i)
        for window in range(windows + 1)
        for rank in range(plan.world_size)
        for m in range(plan.micro_steps_per_window)
        for i in imitated(plan, window, rank, m)
    ]
    expected = (windows + 1) * plan.steps_per_window * plan.demonstrations
    assert sorted(i for _, i in found) == list(range(expected))
    assert all(step == i // plan.demonstrations for step, i in found)  # step s of the run imitates block s of the stream


@given(st.sampled_from([1, 2, 4]), st.integers(1, 3), sizes, sizes, st.integers(0, 2))
def test_an_optimiser_step_is_the_same_on_any_layout(
    shards: int, per_shard: int, minibatches: int, passes: int, demonstrations: int
) -> None:
    def steps(accumulate: int, world_size: int) -> list[tuple[list[int], list[int]]]:
        plan = WindowPlan(
            prompts=4 * per_shard * minibatches,
            minibatches=minibatches,
            passes=passes,
            demonstrations=4 * demonstrations,
            accumulate=accumulate,
            world_size=world_size,
        )
        pairs = [(rank, m) for rank in range(world_size) for m in range(plan.micro_steps_per_window)]
        return [
            (
                sorted(slot for rank, m in pairs if plan.step_of(m) == step for slot in trained(plan, rank, m)),
                sorted(i for rank, m in pairs if plan.step_of(m) == step for i in imitated(plan, 2, rank, m)),
            )
            for step in range(plan.steps_per_window)
        ]

    assert steps(4 // shards, shards) == steps(4, 1) == steps(1, 1)


@given(st.integers(0, 40), st.integers(0, 20), sizes, sizes, sizes)
def test_sizes_divide_or_are_refused_with_sizes_that_work(
    prompts: int, demonstrations: int, minibatches: int, accumulate: int, world_size: int
) -> None:
    def build(prompts: int, demonstrations: int) -> WindowPlan:
        return WindowPlan(
            prompts=prompts, demonstrations=demonstrations, minibatches=minibatches, accumulate=accumulate, world_size=world_size
        )

    shards = accumulate * world_size
    if (prompts or demonstrations) and prompts % (minibatches * shards) == 0 and demonstrations % shards == 0:
        build(prompts, demonstrations)
        return
    with pytest.raises(ConfigError) as error:
        build(prompts, demonstrations)
    message = str(error.value)
    if not prompts and not demonstrations:
        assert "found 0 of both" in message
        return
    assert f"devices={world_size}, accumulate_grad_batches={accumulate}" in message
    name, value = message.split(" ", 1)[0].split("=")
    assert value == str(prompts if name == "prompts_per_window" else demonstrations)
    suggestions = [int(number) for number in message.rsplit("use ", 1)[1].split(" or ")]
    assert len(set(suggestions)) == len(suggestions)
    for number in suggestions:
        assert number > 0
        assert build(number, 0) if name == "prompts_per_window" else build(0, number)


@pytest.mark.parametrize("name", ["samples", "minibatches", "passes", "accumulate", "world_size", "prompts", "demonstrations"])
def test_sizes_below_their_minimum_are_named(name: str) -> None:
    least = 0 if name in ("prompts", "demonstrations") else 1
    with pytest.raises(ConfigError, match=f"{name}: expected at least {least} in a window, found {least - 1}"):
        WindowPlan(**{"prompts": 4, "demonstrations": 4} | {name: least - 1})


def test_windows_of_a_pass() -> None:
    plan = WindowPlan(prompts=4, minibatches=2, passes=3, demonstrations=2)
    assert [plan.windows_per_pass(n, 99) for n in (3, 4, 7, 8)] == [1, 1, 1, 2]
    plan = WindowPlan(demonstrations=4)
    assert [plan.windows_per_pass(99, n) for n in (3, 4, 7, 8)] == [1, 1, 1, 2]


def test_the_fingerprint_holds_every_size() -> None:
    plan = WindowPlan(prompts=8, samples=3, minibatches=2, passes=2, demonstrations=4, accumulate=2, world_size=2)
    assert WindowPlan(**plan.fingerprint()) == plan
    assert len(set(map(str, (plan.fingerprint(), WindowPlan(prompts=8).fingerprint())))) == 2
