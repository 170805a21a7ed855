"""Schedules of the anchor's weight lambda.

A schedule is a function of the optimiser step. ``Adaptive`` also looks at what happened: it is told once per window, the same numbers on
every rank, and saves what it remembers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from aapa_lightning.errors import COUNT, WEIGHT, ConfigError, check_numbers


class Schedule:
    """Base of the schedules: override ``weight``; one that learns from the run overrides the other three as well."""

    def weight(self, step: int) -> float:
        """Lambda at an optimiser step, counted from 0."""
        raise ConfigError(f"{type(self).__name__} does not say its weight: a schedule overrides weight(step)")

    @property
    def adapts(self) -> bool:
        """Whether ``observe`` changes later weights."""
        return False

    def observe(self, *, task_reward: float | None = None, tripped: bool = False) -> None:
        """Learn from a finished window; nothing by default.

        Args:
            task_reward: mean task reward of the window over all ranks, None where there is none.
            tripped: whether the guard tripped.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything that later weights depend on beside the step; primitives."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""


class Constant(Schedule):
    """The same weight at every step."""

    def __init__(self, value: float) -> None:
        self.value = _weight("value", value)

    def weight(self, step: int) -> float:
        """``value``."""
        return self.value


class Linear(Schedule):
    """From ``start`` at step 0 in a straight line to ``end`` at step ``steps``, then ``end``."""

    def __init__(self, start: float, end: float, steps: int) -> None:
        self.start, self.end, self.steps = _weight("start", start), _weight("end", end), _steps(steps)

    def weight(self, step: int) -> float:
        """``start + (end - start) * min(step / steps, 1)``."""
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


class Cosine(Schedule):
    """From ``start`` at step 0 along half a cosine to ``end`` at step ``steps``, then ``end``."""

    def __init__(self, start: float, end: float, steps: int) -> None:
        self.start, self.end, self.steps = _weight("start", start), _weight("end", end), _steps(steps)

    def weight(self, step: int) -> float:
        """``end + (start - end) * (1 + cos(pi * min(step / steps, 1))) / 2``."""
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * min(step / self.steps, 1.0))) / 2


class _Wrapper(Schedule):
    """Changes the weight of another schedule, which goes on as if alone."""

    def __init__(self, schedule: Schedule | float) -> None:
        self.schedule = as_schedule(schedule, "schedule")

    @property
    def adapts(self) -> bool:
        return self.schedule.adapts

    def observe(self, *, task_reward: float | None = None, tripped: bool = False) -> None:
        self.schedule.observe(task_reward=task_reward, tripped=tripped)

    def state_dict(self) -> dict[str, Any]:
        return {"schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.schedule.load_state_dict(state["schedule"])


class Warmup(_Wrapper):
    """Multiplies another schedule by a ramp from 0 at step 0 to 1 at step ``steps``."""

    def __init__(self, schedule: Schedule | float, steps: int) -> None:
        super().__init__(schedule)
        self.steps = _steps(steps)

    def weight(self, step: int) -> float:
        """``schedule(step) * min(step / steps, 1)``."""
        return self.schedule.weight(step) * min(step / self.steps, 1.0)


class Adaptive(_Wrapper):
    """Lowers another schedule while the task reward falls or the guard trips, and lets it recover afterwards.

    The task reward falls while its fast moving average is below its slow one by more than ``tolerance``. Each such observation multiplies a
    factor by ``decay``, each other one divides it by ``recovery``, within ``[minimum, 1]``. The weight is the schedule's times the factor.

    Args:
        schedule: the schedule to lower, or a constant.
        decay: between 0 and 1; 0.8 more than halves lambda in four bad observations.
        recovery: between ``decay`` and 1, closer to 1 so that lambda falls faster than it returns; 1 never recovers.
        minimum: least factor; 0.05 keeps the anchor measurable.
        tolerance: in units of the task reward. Window means that merely scatter by 0.05 move the averages 0.015 apart: the default
            ignores that, and a steady fall of 0.002 a window exceeds it.
        fast: memory of the fast average in observations.
        slow: memory of the slow average in observations.
    """

    def __init__(
        self,
        schedule: Schedule | float,
        *,
        decay: float = 0.8,
        recovery: float = 0.95,
        minimum: float = 0.05,
        tolerance: float = 0.03,
        fast: float = 5.0,
        slow: float = 25.0,
    ) -> None:
        super().__init__(schedule)
        options = ("decay", "recovery", "minimum", "tolerance", "fast", "slow")
        check_numbers(locals(), dict.fromkeys(options, WEIGHT), "Adaptive: ")
        if not (0 < decay < 1 and decay <= recovery <= 1 and 0 <= minimum <= 1 and 1 <= fast < slow):
            raise ConfigError(
                "Adaptive expects 0 < decay < 1, decay <= recovery <= 1, 0 <= minimum <= 1 and 1 <= fast < slow; "
                f"found decay={decay}, recovery={recovery}, minimum={minimum}, fast={fast}, slow={slow}"
            )
        self.decay, self.recovery, self.minimum, self.tolerance = decay, recovery, minimum, tolerance
        self.fast, self.slow = fast, slow
        self.factor = 1.0
        self._averages: list[float] | None = None

    @property
    def adapts(self) -> bool:
        """True."""
        return True

    def weight(self, step: int) -> float:
        """``schedule(step) * factor``."""
        return self.schedule.weight(step) * self.factor

    def observe(self, *, task_reward: float | None = None, tripped: bool = False) -> None:
        """Move the averages and the factor."""
        super().observe(task_reward=task_reward, tripped=tripped)
        if self._falls(task_reward) or tripped:
            self.factor = max(self.factor * self.decay, self.minimum)
        else:
            self.factor = min(self.factor / self.recovery, 1.0)

    def _falls(self, task_reward: float | None) -> bool:
        if task_reward is None or not math.isfinite(task_reward):
            return False
        before = self._averages or [task_reward, task_reward]
        memories = (self.fast, self.slow)
        self._averages = [old + (task_reward - old) / memory for old, memory in zip(before, memories, strict=True)]
        return self._averages[0] < self._averages[1] - self.tolerance

    def state_dict(self) -> dict[str, Any]:
        """The factor, the two averages and the inner schedule's state."""
        return {**super().state_dict(), "factor": self.factor, "averages": self._averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        super().load_state_dict(state)
        self.factor = float(state["factor"])
        self._averages = None if state["averages"] is None else [float(value) for value in state["averages"]]


def as_schedule(weight: Schedule | float, name: str = "weight") -> Schedule:
    """A number is a constant schedule; ``name`` is what messages call it."""
    return weight if isinstance(weight, Schedule) else Constant(_weight(name, weight))


def _weight(name: str, value: float) -> float:
    check_numbers({name: value}, {name: WEIGHT}, "the weight of a loss term (at 0 it is logged and not trained on): ")
    return float(value)


def _steps(steps: int) -> int:
    check_numbers({"steps": steps}, {"steps": COUNT}, "a schedule of a loss term's weight: ")
    return steps
