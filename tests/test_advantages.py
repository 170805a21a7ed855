"""Task advantages against hand-computed values and plain Python in float64."""

import threading
from statistics import mean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aapa_lightning.advantages import batch_statistics, task_advantages
from aapa_lightning.errors import ConfigError

EPSILON = 1e-4


def run_ranks(calls):
    """Run one function a rank in threads; each gets a sum over all of them, as an all-reduce would give."""
    barrier = threading.Barrier(len(calls), timeout=20)
    slots, results = [None] * len(calls), [None] * len(calls)

    def work(rank):
        def sum_over_ranks(value):
            slots[rank] = value
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        results[rank] = calls[rank](sum_over_ranks)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def deviation(values):
    return stdev(values) if len(values) > 1 else 0.0


def reference(rewards, weights, ids, scale, aggregation):
    """Lists in, list out; nothing shared with the implementation."""
    groups = [[j for j in range(len(ids)) if ids[j] == ids[i]] for i in range(len(ids))]
    if aggregation == "normalize_then_sum":
        scores = []
        for i, group in enumerate(groups):
            columns = [[rewards[j][k] for j in group] for k in range(len(weights))]
            scores.append(sum(w * (rewards[i][k] - mean(columns[k])) / (deviation(columns[k]) + EPSILON) for k, w in enumerate(weights)))
        return [(s - mean(scores)) / (deviation(scores) + EPSILON) for s in scores]
    totals = [sum(w * r for w, r in zip(weights, row, strict=True)) for row in rewards]
    out = []
    for i, group in enumerate(groups):
        members = [totals[j] for j in group]
        divisor = {"group": deviation(members) + EPSILON, "batch": deviation(totals) + EPSILON, "none": 1.0}[scale]
        out.append((totals[i] - mean(members)) / divisor)
    return out


MODES = [(s, "sum_then_normalize") for s in ("group", "batch", "none")] + [("group", "normalize_then_sum")]


@pytest.mark.parametrize(("scale", "aggregation"), MODES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_equals_plain_python(scale, aggregation, data):
    n = data.draw(st.integers(1, 12))
    reward = st.sampled_from([0.0, 0.25, 0.5, 1.0, -2.0])
    rewards = data.draw(st.lists(st.tuples(reward, reward), min_size=n, max_size=n))
    ids = data.draw(st.lists(st.sampled_from([5, -1, 40]), min_size=n, max_size=n))
    advantages, _ = task_advantages(
        torch.tensor(rewards), torch.tensor([1.0, 0.5]), torch.tensor(ids), scale=scale, aggregation=aggregation
    )
    expected = torch.tensor(reference(rewards, [1.0, 0.5], ids, scale, aggregation))
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=1e-6)


def test_group_scale_by_hand():
    rewards = torch.tensor([[1.0], [4.0], [0.0], [4.0], [1.0], [4.0]])
    ids = torch.tensor([0, 1, 0, 1, 0, 1])
    advantages, metrics = task_advantages(rewards, torch.ones(1), ids)
    std = (1 / 3) ** 0.5
    expected = torch.tensor([1 / 3, 0.0, -2 / 3, 0.0, 1 / 3, 0.0]) / (std + EPSILON)
    torch.testing.assert_close(advantages, expected)
    assert metrics["zero_variance_groups"] == pytest.approx(0.5)
    assert metrics["group_reward_std"] == pytest.approx(std / 2)
    assert metrics["reward"] == pytest.approx(14 / 6)
    assert metrics["reward_std"] == pytest.approx(stdev([1, 4, 0, 4, 1, 4]))


@pytest.mark.parametrize(("scale", "aggregation"), MODES)
def test_no_variance_and_groups_of_one_are_exactly_zero(scale, aggregation):
    # 0.1 has no exact float; row 3 and 4 have equal sums from different parts; row 5 is alone; rows 6 and 7 vary.
    rewards = torch.tensor([[0.1, 0.7], [0.1, 0.7], [0.1, 0.7], [0.25, 0.5], [0.5, 0.25], [9.0, 3.0], [0.0, 0.0], [1.0, 1.0]])
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    advantages, metrics = task_advantages(rewards, torch.ones(2), ids, scale=scale, aggregation=aggregation)
    assert advantages[[0, 1, 2, 5]].tolist() == [0, 0, 0, 0]
    assert advantages[6] < 0 < advantages[7]
    if aggregation == "sum_then_normalize":
        assert advantages[[3, 4]].tolist() == [0, 0]
        assert metrics["zero_variance_groups"] == pytest.approx(0.75)
    else:
        # z-scores of +1 and -1 cancel here too, but each part has a signal.
        torch.testing.assert_close(advantages[[3, 4]], torch.zeros(2))
        assert metrics["zero_variance_groups"] == pytest.approx(0.5)


@pytest.mark.parametrize(("scale", "aggregation"), MODES)
def test_ranks_agree_with_one_process(scale, aggregation):
    torch.manual_seed(0)
    rewards, weights, ids = torch.rand(10, 2), torch.tensor([1.0, 2.0]), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    options = {"scale": scale, "aggregation": aggregation}
    whole, metrics = task_advantages(rewards, weights, ids, **options)
    parts = [slice(0, 6), slice(6, 10), slice(10, 10)]  # the last rank has nothing
    results = run_ranks([lambda total, p=p: task_advantages(rewards[p], weights, ids[p], sum_over_ranks=total, **options) for p in parts])
    torch.testing.assert_close(torch.cat([advantages for advantages, _ in results]), whole)
    for _, part_metrics in results:
        assert part_metrics == pytest.approx(metrics)


@settings(max_examples=50, deadline=None)
@given(reward=st.floats(-5, 5, width=32), weight=st.floats(0.01, 3), n=st.integers(2, 9))
def test_rounding_never_makes_an_advantage(reward, weight, n):
    rewards = torch.tensor([[reward, 0.3]] * n + [[0.0, 0.0], [1.0, 1.0], [0.1, 0.35]])
    ids = torch.tensor([0] * n + [1, 1, 1])
    for scale, aggregation in MODES:
        advantages, _ = task_advantages(rewards, torch.tensor([weight, 0.7]), ids, scale=scale, aggregation=aggregation)
        assert not advantages[:n].any()
        assert advantages[n:].all()


def test_row_order_does_not_matter():
    torch.manual_seed(1)
    rewards, ids, order = torch.rand(9, 1), torch.tensor([3, 3, 3, 1, 1, 1, 2, 2, 2]), torch.randperm(9)
    straight, _ = task_advantages(rewards, torch.ones(1), ids)
    shuffled, _ = task_advantages(rewards[order], torch.ones(1), ids[order])
    torch.testing.assert_close(shuffled, straight[order])


def test_batch_statistics_keep_a_small_variance_beside_a_large_mean():
    values = 1e9 + torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    average, std = batch_statistics(values)
    assert (average.item(), std.item()) == (1e9 + 1, 1.0)
    assert [s.item() for s in batch_statistics(torch.zeros(0, dtype=torch.float64))] == [0, 0]


def test_nothing_carries_a_gradient():
    rewards = torch.rand(4, 1, requires_grad=True)
    advantages, _ = task_advantages(rewards, torch.ones(1), torch.tensor([0, 0, 1, 1]))
    assert advantages.dtype == torch.float32
    assert not advantages.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "std"}, "advantage_scale: expected one of group, batch, none; found 'std'"),
        ({"aggregation": "sum"}, "reward_aggregation: expected one of"),
        ({"aggregation": "normalize_then_sum", "scale": "batch"}, "expected advantage_scale 'group', found 'batch'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        task_advantages(torch.rand(2, 1), torch.ones(1), torch.tensor([0, 0]), **options)


def _by_hand(rows, weights, scale):
    """Advantages of one group in plain Python: rows of numbers or None."""
    totals = [None if all(v is None for v in row) else sum(w * (v or 0.0) for v, w in zip(row, weights, strict=True)) for row in rows]
    known = [total for total in totals if total is not None]
    spread = stdev(known) + 1e-4 if scale == "group" else 1.0
    return [0.0 if total is None else (total - sum(known) / len(known)) / spread for total in totals]


@pytest.mark.parametrize("scale", ["group", "none"])
def test_what_no_reward_could_score_leaves_its_groups_baseline(scale):
    nan, weights = float("nan"), [1.0, 0.5]
    rows = [[None, None], [1.0, None], [0.0, 4.0], [None, 2.0]]
    rewards = torch.tensor([[nan if value is None else value for value in row] for row in rows] + [[nan, nan]] * 2)
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    advantages, metrics = task_advantages(rewards, torch.tensor(weights), groups, scale=scale)
    assert advantages[:4].tolist() == pytest.approx(_by_hand(rows, weights, scale), abs=1e-6)
    assert advantages[4:].tolist() == [0.0, 0.0]  # a group that nothing could score
    assert metrics["reward"] == pytest.approx((1 + 2 + 1) / 3)
    assert metrics["reward_std"] == pytest.approx(stdev([1, 2, 1]))
    assert metrics["zero_variance_groups"] == pytest.approx(0.5)


def test_three_equal_rewards_and_one_unknown_are_no_signal():
    rewards = torch.tensor([[float("nan")], [1.0], [1.0], [1.0]])
    for options in ({}, {"scale": "batch"}, {"scale": "none"}, {"aggregation": "normalize_then_sum"}):
        advantages, _ = task_advantages(rewards, torch.ones(1), torch.zeros(4, dtype=torch.int64), **options)
        assert advantages.tolist() == [0.0] * 4, options


def test_normalised_rewards_leave_out_what_each_could_not_score():
    nan = float("nan")
    rewards = torch.tensor([[1.0, nan], [3.0, 2.0], [nan, nan], [5.0, 6.0]])
    advantages, _ = task_advantages(rewards, torch.ones(2), torch.zeros(4, dtype=torch.int64), aggregation="normalize_then_sum")
    first = [(value - 3) / (stdev([1, 3, 5]) + 1e-4) for value in (1, 3, 5)]
    second = [0.0] + [(value - 4) / (stdev([2, 6]) + 1e-4) for value in (2, 6)]
    sums = [a + b for a, b in zip(first, second, strict=True)]
    expected = [(value - sum(sums) / 3) / (stdev(sums) + 1e-4) for value in sums]
    assert advantages[[0, 1, 3]].tolist() == pytest.approx(expected, abs=1e-6)
    assert advantages[2] == 0


def test_an_appended_reward_brings_no_row_back():
    from aapa_lightning.advantages import append_reward

    appended = append_reward(torch.tensor([[float("nan")], [1.0]]), torch.tensor([7.0, 2.0]))
    assert appended[0].isnan().all()
    assert appended[1].tolist() == [1.0, 2.0]


def test_a_reward_without_weight_is_no_signal():
    rewards = torch.tensor([[1.0, 0.0], [1.0, 5.0], [2.0, 1.0], [3.0, 1.0]])
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        advantages, metrics = task_advantages(rewards, torch.tensor([0.7, 0.0]), torch.tensor([0, 0, 1, 1]), aggregation=aggregation)
        assert advantages[:2].tolist() == [0, 0]
        assert metrics["zero_variance_groups"] == 0.5
        assert metrics["reward"] == pytest.approx(0.7 * 1.75)
