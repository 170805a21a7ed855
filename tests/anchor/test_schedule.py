"""Weights by hand, and an adaptive schedule that ends the same after a restart."""

import math
import random

import pytest

from aapa_lightning.anchor.schedule import Adaptive, Constant, Cosine, Linear, Schedule, Warmup, as_schedule
from aapa_lightning.errors import ConfigError


def weights(schedule, steps):
    return [schedule.weight(step) for step in steps]


def test_plain_schedules():
    assert weights(as_schedule(0.3), [0, 7, 10**6]) == [0.3] * 3
    assert weights(Linear(1.0, 0.2, 4), [0, 1, 4, 9]) == pytest.approx([1.0, 0.8, 0.2, 0.2])
    assert weights(Cosine(1.0, 0.0, 4), [0, 1, 2, 4, 9]) == pytest.approx([1.0, (1 + math.sqrt(0.5)) / 2, 0.5, 0.0, 0.0])
    assert weights(Warmup(0.4, 4), [0, 1, 2, 4, 9]) == pytest.approx([0.0, 0.1, 0.2, 0.4, 0.4])
    assert weights(Warmup(Linear(1.0, 0.0, 10), 2), [0, 1, 5]) == pytest.approx([0.0, 0.45, 0.5])
    assert not any(schedule.adapts for schedule in (Constant(0.1), Warmup(1, 3), Linear(0, 1, 2)))


def test_adaptive_lowers_on_a_trip_and_recovers():
    schedule = Adaptive(0.4, decay=0.5, recovery=0.8, minimum=0.2)
    seen = []
    for tripped in (True, True, True, True, False, False):
        schedule.observe(task_reward=1.0, tripped=tripped)
        seen.append(schedule.weight(0))
    assert seen == pytest.approx([0.2, 0.1, 0.08, 0.08, 0.1, 0.125])
    for _ in range(50):
        schedule.observe(task_reward=1.0)
    assert schedule.weight(0) == pytest.approx(0.4)


def test_adaptive_lowers_while_the_reward_falls_only():
    schedule = Adaptive(1.0)
    for step in range(60):
        schedule.observe(task_reward=0.01 * step)
    assert schedule.weight(0) == 1.0
    for step in range(20):
        schedule.observe(task_reward=0.6 - 0.03 * step)
    assert schedule.weight(0) < 0.5
    low = schedule.weight(0)
    for _ in range(150):
        schedule.observe(task_reward=0.0)
    assert schedule.weight(0) > low


def test_scatter_is_no_fall_but_a_slow_fall_is():
    noise = random.Random(0)
    schedule, seen = Adaptive(1.0), []
    for _ in range(300):
        schedule.observe(task_reward=0.5 + noise.gauss(0, 0.05))
        seen.append(schedule.weight(0))
    assert sum(seen) / len(seen) > 0.9
    for step in range(100):
        schedule.observe(task_reward=0.5 - 0.002 * step)
    assert schedule.weight(0) == pytest.approx(0.05)


def test_without_a_reward_only_the_guard_counts():
    schedule = Adaptive(1.0)
    for reward in (None, math.nan, None):
        schedule.observe(task_reward=reward)
    assert schedule.weight(0) == 1.0
    assert schedule.state_dict()["averages"] is None


def test_adaptive_resumes_where_it_was():
    rewards = [0.1, 0.5, 0.4, 0.3, 0.1, 0.2, 0.05, 0.0, 0.3]
    whole = Warmup(Adaptive(Cosine(1.0, 0.1, 8)), 2)
    half = Warmup(Adaptive(Cosine(1.0, 0.1, 8)), 2)
    for i, reward in enumerate(rewards):
        whole.observe(task_reward=reward, tripped=i % 4 == 0)
        half.observe(task_reward=reward, tripped=i % 4 == 0)
        resumed = Warmup(Adaptive(Cosine(1.0, 0.1, 8)), 2)
        resumed.load_state_dict(half.state_dict())
        half = resumed
        assert half.weight(i) == whole.weight(i)
    assert whole.adapts
    assert whole.weight(5) < Warmup(Cosine(1.0, 0.1, 8), 2).weight(5)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Constant(-0.1),
        lambda: Constant(math.nan),
        lambda: Linear(1.0, 0.0, 0),
        lambda: Cosine(1.0, -1.0, 5),
        lambda: Adaptive(0.3, decay=1.5),
        lambda: Adaptive(0.3, fast=30.0),
        lambda: Schedule().weight(0),
    ],
)
def test_bad_numbers_are_refused(build):
    with pytest.raises(ConfigError):
        build()
