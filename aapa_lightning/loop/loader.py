"""The window loader: a sized, plain iterable whose position is read, never stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from aapa_lightning.loop.plan import WindowPlan
from aapa_lightning.loop.stream import RecordStream
from aapa_lightning.types import Record


class WindowStep:
    """What one micro-step of one rank gets: the whole window's records of that rank, and which micro-step this is.

    A plain class, not a dataclass: Lightning walks into dataclasses to move tensors, and there are none here.

    Args:
        window: number of the window.
        micro_step: number inside the window; 0 generates.
        prompts: (slot, record) of the rank's groups.
        demonstrations: (slot, record) of what is imitated, for all micro-steps of the window; their slots follow those of the prompts.
    """

    def __init__(
        self,
        window: int,
        micro_step: int,
        prompts: Sequence[tuple[int, Record]] = (),
        demonstrations: Sequence[tuple[int, Record]] = (),
    ) -> None:
        self.window = window
        self.micro_step = micro_step
        self.prompts = prompts
        self.demonstrations = demonstrations


class WindowLoader:
    """Yields a ``WindowStep`` for every micro-step of one epoch's length, from the run's position on.

    Args:
        plan: sizes.
        rank: this process.
        prompts: stream of prompts; needed when ``plan.prompts``.
        demonstrations: stream of demonstrations; needed when ``plan.demonstrations``.
        position: number of micro-steps of the run that are done; read when an iteration starts.
    """

    def __init__(
        self,
        plan: WindowPlan,
        rank: int,
        *,
        prompts: RecordStream | None = None,
        demonstrations: RecordStream | None = None,
        position: Callable[[], int] = lambda: 0,
    ) -> None:
        self.plan = plan
        self.rank = rank
        self.prompts = prompts
        self.demonstrations = demonstrations
        self.position = position
        self._slots = plan.prompt_slots(rank)
        self._places = plan.demonstration_places(rank)

    def __len__(self) -> int:
        """Micro-steps of one epoch."""
        windows = self.plan.windows_per_pass(len(self.prompts or ()), len(self.demonstrations or ()))
        return windows * self.plan.micro_steps_per_window

    def __iter__(self) -> Iterator[WindowStep]:
        start = self.position()
        window, step = -1, WindowStep(-1, 0)
        for position in range(start, start + len(self)):
            number, micro_step = self.plan.locate(position)
            if number != window:
                window, step = number, self.window(number)
            yield WindowStep(number, micro_step, step.prompts, step.demonstrations)

    def state_dict(self) -> dict[str, int]:
        """Nothing, since the position is read. A Trainer warns that loaders without this method do not resume."""
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Nothing to do."""

    def demonstration_before(self, number: int) -> Record:
        """The record before this rank's first demonstration of a window, in the window's order; the last one before the first."""
        if self.demonstrations is None:
            raise RuntimeError("this loader has no demonstrations")
        places = self.plan.demonstrations * self.plan.steps_per_window
        return self.demonstrations[number * places + (self._places[0] - 1) % places]

    def window(self, number: int) -> WindowStep:
        """Micro-step 0 of a window: this rank's records, a pure function of the streams' seeds and ``number``."""
        plan, prompts, demonstrations = self.plan, self.prompts, self.demonstrations
        base, first = number * plan.prompts, number * plan.demonstrations * plan.steps_per_window
        return WindowStep(
            window=number,
            micro_step=0,
            prompts=[(slot, prompts[base + slot]) for slot in self._slots] if prompts is not None else [],
            demonstrations=[(plan.prompts + place, demonstrations[first + place]) for place in self._places]
            if demonstrations is not None
            else [],
        )
