"""What a checkpoint holds beyond Lightning's: the open window, and a loop position that lies on an optimiser step."""

from __future__ import annotations

from typing import Any

import torch

from aapa_lightning.errors import ConfigError
from aapa_lightning.loop.plan import WindowPlan


def rewind_progress(checkpoint: dict[str, Any], accumulate: int, epoch: float | None = None) -> None:
    """Move the saved loop counters back to the last optimiser step.

    A checkpoint taken in the middle of an accumulation (or of a step, by an exception) holds the weights of the last optimiser step, but
    not the gradients gathered since; its micro-steps must be repeated, or they would be lost.

    Args:
        checkpoint: what is being saved.
        accumulate: micro-steps of an optimiser step.
        epoch: micro-steps of an epoch, where ``accumulate`` need not divide them: the last one ends with a step.
    """
    epoch_loop = _epoch_loop(checkpoint)
    if epoch_loop is None:
        return
    progress, current = epoch_loop["batch_progress"], epoch_loop["batch_progress"]["current"]
    extra = 0 if current["processed"] == epoch else current["processed"] % accumulate
    if not extra and current["ready"] == current["processed"]:
        return
    for counts in (progress["total"], current):
        done = counts["processed"] - extra
        # what a checkpoint at the end of that step's last batch holds, hence the two that lag behind by one
        counts |= {"ready": done, "started": done, "processed": done, "completed": done - 1}
    progress["is_last_batch"] = False
    epoch_loop["state_dict"]["_batches_that_stepped"] -= 1


def rescale_progress(checkpoint: dict[str, Any], saved: int, accumulate: int) -> None:
    """Count the position of a checkpoint that lies on an optimiser step in micro-steps of another number per step."""
    epoch_loop = _epoch_loop(checkpoint)
    if epoch_loop is None or saved == accumulate:
        return
    for counts in (epoch_loop["batch_progress"][part] for part in ("total", "current")):
        shift = counts["processed"] * accumulate // saved - counts["processed"]
        counts |= {name: value + shift for name, value in counts.items()}


def _epoch_loop(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The parts of the training epoch loop's state by their short names, or None in a checkpoint of weights alone."""
    prefix = "epoch_loop."
    fit_loop = checkpoint.get("loops", {}).get("fit_loop")
    return fit_loop and {name.removeprefix(prefix): part for name, part in fit_loop.items() if name.startswith(prefix)}


def gather_over_ranks(state: Any) -> list[Any]:
    """Every rank's ``state`` on every rank; a list of one in a single process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def check_optimizer(checkpoint: dict[str, Any], trainer: Any) -> None:
    """Refuse to train on without the optimiser's state.

    Raises:
        ConfigError: DeepSpeed wrote the checkpoint and another strategy shall continue it, or it holds weights alone.
    """
    if trainer.training and "optimizer_states" not in checkpoint and not trainer.strategy.handles_gradient_accumulation:
        raise ConfigError(
            "resume: the checkpoint holds no optimiser state that this strategy reads; resume with the strategy that wrote it "
            "(deepspeed_stage_1 or deepspeed_stage_2?), or start from its weights: aapa export writes a folder for policy.model"
        )


def check_plan(saved: dict[str, int], plan: WindowPlan, inside_window: bool) -> None:
    """Refuse to resume where another plan would shift or lose prompts.

    Raises:
        ConfigError: window sizes changed, or ranks or accumulation changed inside a window.
    """
    now = plan.fingerprint()
    free = set() if inside_window else {"accumulate", "world_size"}
    before = {"sample_demonstrations": False} | saved  # of checkpoints from before there was such a number
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now if before[name] != now[name] and name not in free]
    if changed:
        where = "inside a window" if inside_window else "at a window boundary (where devices and accumulation may change)"
        raise ConfigError(f"resume: the checkpoint was taken {where} with other sizes: {', '.join(changed)}; use the old sizes")
