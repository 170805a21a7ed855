"""Rollouts of the next window, drawn in the background while this one is scored and trained on. No Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

import torch

from aapa_lightning.loop.experience import restore_rollouts, rollouts_state
from aapa_lightning.rollout.base import RolloutRequest
from aapa_lightning.types import Rollouts


class RolloutsAhead:
    """Rollouts that are being drawn, or were and are not yet trained on, by the number of their window."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._drawn: dict[int, Future[Rollouts]] = {}
        self._saved: dict[int, dict[str, Any]] = {}

    def start(self, window: int, draw: Callable[[], Rollouts]) -> None:
        """Begin to draw a window's rollouts, unless they are here already."""
        if window in self._drawn or window in self._saved:
            return
        self._executor = self._executor or ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._drawn[window] = self._executor.submit(draw)

    def take(self, window: int, requests: Sequence[RolloutRequest], device: torch.device) -> Rollouts | None:
        """The rollouts of a window, waited for; None if they were never begun. Earlier ones are forgotten.

        They stay until the next window is taken: a checkpoint before the first optimiser step of this one goes back to its start.

        Args:
            window: its number.
            requests: what they answer; where they come from a checkpoint, their records.
            device: where those go.
        """
        self._drawn = {number: drawn for number, drawn in self._drawn.items() if number >= window}
        if window in self._saved:
            records = [request.record for request in requests for _ in range(request.samples)]
            self.keep(window, restore_rollouts(self._saved.pop(window), records, device))
        self._saved = {number: state for number, state in self._saved.items() if number > window}
        drawn = self._drawn.get(window)
        return None if drawn is None else drawn.result()

    def keep(self, window: int, rollouts: Rollouts) -> None:
        """Hold rollouts that were drawn otherwise."""
        self._drawn[window] = Future()
        self._drawn[window].set_result(rollouts)

    def wait(self) -> None:
        """Return when nothing is being drawn. An error waits for ``take``."""
        wait_for(self._drawn.values())

    def state(self) -> dict[int, dict[str, Any]]:
        """What a checkpoint needs, waited for: tensors on the CPU and primitives, by window."""
        # what failed is drawn again after a resume; here ``take`` tells of it
        drawn = {number: drawn for number, drawn in self._drawn.items() if drawn.exception() is None}
        return self._saved | {number: rollouts_state(drawn.result()) for number, drawn in drawn.items()}

    def restore(self, state: dict[int, dict[str, Any]]) -> None:
        """The inverse of ``state``; records come with ``take``."""
        self._drawn, self._saved = {}, dict(state)

    def clear(self) -> None:
        """Forget everything, when nothing is being drawn any more."""
        self.wait()
        self._drawn, self._saved = {}, {}

    def close(self) -> None:
        """Let the thread go, when it has drawn what it draws."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None
