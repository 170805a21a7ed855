"""What a checkpoint holds beyond Lightning's: the open window, and a loop position that lies on an optimiser step."""

from __future__ import annotations

from typing import Any

import torch

from aapa_lightning.errors import ConfigError
from aapa_lightning.loop.plan import WindowPlan


def rewind_progress(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Move the saved batch counters back to the last optimiser step.

    A checkpoint taken in the middle of an accumulation holds the weights of the last optimiser step, but not the gradients gathered since;
    its micro-steps must be repeated, or they would be lost.
    """
    if accumulate == 1 or "loops" not in checkpoint:
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    extra = progress["current"]["ready"] % accumulate
    for part in ("total", "current"):
        done = progress[part]["ready"] - extra
        if extra:
            for counter in progress[part]:
                progress[part][counter] = done
    if extra:
        progress["is_last_batch"] = False


def gather_over_ranks(state: Any) -> list[Any]:
    """Every rank's ``state`` on every rank; a list of one in a single process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def check_plan(saved: dict[str, int], plan: WindowPlan, inside_window: bool) -> None:
    """Refuse to resume where another plan would shift or lose prompts.

    Raises:
        ConfigError: window sizes changed, or ranks or accumulation changed inside a window.
    """
    now = plan.fingerprint()
    free = set() if inside_window else {"accumulate", "world_size"}
    changed = [f"{name} {saved[name]} -> {now[name]}" for name in now if saved[name] != now[name] and name not in free]
    if changed:
        where = "inside a window" if inside_window else "at a window boundary (where devices and accumulation may change)"
        raise ConfigError(f"resume: the checkpoint was taken {where} with other sizes: {', '.join(changed)}; use the old sizes")
