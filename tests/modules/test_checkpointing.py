import copy

import pytest

from aapa_lightning.errors import ConfigError
from aapa_lightning.loop.plan import WindowPlan
from aapa_lightning.modules.checkpointing import check_plan, gather_over_ranks, rescale_progress, rewind_progress


def checkpoint(ready: int, processed: int, completed: int, total: int, *, last: bool = False) -> dict:
    """The loop state of Lightning after ``processed`` batches of an epoch that began at batch ``total - ready`` of the run."""
    counts = {"ready": ready, "started": ready, "processed": processed, "completed": completed}
    progress = {
        "total": {name: value + total - ready for name, value in counts.items()},
        "current": counts,
        "is_last_batch": last,
    }
    return {
        "loops": {
            "fit_loop": {"epoch_loop.batch_progress": progress, "epoch_loop.state_dict": {"_batches_that_stepped": 7}, "state_dict": {}}
        }
    }


def counters(state: dict, part: str) -> dict:
    return state["loops"]["fit_loop"]["epoch_loop.batch_progress"][part]


@pytest.mark.parametrize(("processed", "accumulate"), [(6, 1), (6, 3), (6, 2)])
def test_on_an_optimiser_step_nothing_moves(processed: int, accumulate: int) -> None:
    state = checkpoint(processed, processed, processed - 1, 20)
    before = copy.deepcopy(state)
    rewind_progress(state, accumulate)
    assert state == before


def test_inside_an_accumulation_the_counters_go_back_to_the_step() -> None:
    state = checkpoint(8, 8, 7, 20, last=True)
    rewind_progress(state, 3)
    assert counters(state, "current") == {"ready": 6, "started": 6, "processed": 6, "completed": 5}
    assert counters(state, "total") == {"ready": 18, "started": 18, "processed": 18, "completed": 17}
    assert counters(state, "is_last_batch") is False


def test_a_batch_that_was_begun_and_not_finished_is_repeated() -> None:
    state = checkpoint(7, 6, 6, 7)
    rewind_progress(state, 3)
    assert counters(state, "current")["ready"] == counters(state, "current")["processed"] == 6


def test_another_accumulation_counts_the_same_position_in_its_own_micro_steps() -> None:
    state = checkpoint(8, 8, 7, 16)
    rescale_progress(state, 4, 2)
    assert counters(state, "current") == {"ready": 4, "started": 4, "processed": 4, "completed": 3}
    assert counters(state, "total") == {"ready": 8, "started": 8, "processed": 8, "completed": 7}
    rescale_progress(state, 2, 4)
    assert state == checkpoint(8, 8, 7, 16)


def test_a_checkpoint_of_weights_alone_is_left_alone() -> None:
    for state in ({}, {"loops": {}}, {"state_dict": {}}):
        before = copy.deepcopy(state)
        rewind_progress(state, 4)
        rescale_progress(state, 4, 2)
        assert state == before


def test_without_ranks_there_is_one_state() -> None:
    state = {"x": 1}
    assert gather_over_ranks(state) == [state]


SAVED = WindowPlan(prompts=8, samples=4, minibatches=2, accumulate=2)


def test_ranks_and_accumulation_may_change_at_a_window_boundary_only() -> None:
    moved = WindowPlan(prompts=8, samples=4, minibatches=2, accumulate=1, world_size=4)
    check_plan(SAVED.fingerprint(), moved, inside_window=False)
    check_plan(SAVED.fingerprint(), SAVED, inside_window=True)
    with pytest.raises(ConfigError, match="inside a window with other sizes: accumulate 2 -> 1, world_size 1 -> 4; use the old sizes"):
        check_plan(SAVED.fingerprint(), moved, inside_window=True)


@pytest.mark.parametrize(
    "change", [{"prompts": 16}, {"samples": 5}, {"minibatches": 1}, {"passes": 2}, {"demonstrations": 2}], ids=lambda c: next(iter(c))
)
def test_sizes_of_a_window_may_never_change(change: dict[str, int]) -> None:
    (name, value), old = next(iter(change.items())), SAVED.fingerprint()
    for inside in (True, False):
        with pytest.raises(ConfigError, match=f"{name} {old[name]} -> {value}"):
            check_plan(old, WindowPlan(**old | change), inside_window=inside)


def test_a_checkpoint_from_before_a_size_was_known_is_read() -> None:
    plan = WindowPlan(demonstrations=4)
    saved = {name: value for name, value in plan.fingerprint().items() if name != "sample_demonstrations"}
    check_plan(saved, plan, inside_window=False)
    with pytest.raises(ConfigError, match="sample_demonstrations False -> True"):
        check_plan(saved, WindowPlan(demonstrations=4, sample_demonstrations=True), inside_window=False)
