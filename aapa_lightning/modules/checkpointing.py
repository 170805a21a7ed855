"""What a checkpoint holds beyond Lightning's: the open window, and a loop position that lies on an optimiser step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from aapa_lightning.data.fingerprint import check_data
from aapa_lightning.errors import ConfigError
from aapa_lightning.loop.plan import WindowPlan

NO_ROLLOUTS = (
    "resume: the checkpoint lies inside a window but does not hold its rollouts (it was saved while an exception was under way); resume "
    "from an earlier checkpoint"
)


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


def check_resume(saved: Mapping[str, Any], plan: WindowPlan, step: int, seed: int, data: Mapping[str, Sequence[Any]]) -> None:
    """Refuse to resume with other sizes, another seed or other data: the steps that follow would be those of another run.

    Args:
        saved: what ``WindowedModule`` keeps in a checkpoint; one of an earlier version says nothing of seed and data.
        plan: of this run.
        step: optimiser steps done.
        seed: of this run.
        data: its rows by name.

    Raises:
        ConfigError: one of them is another, or the checkpoint lies inside a window without its rollouts.
    """
    inside = plan.locate(step * plan.accumulate)[1] != 0
    check_plan(saved["plan"], plan, inside_window=inside)
    if saved.get("seed", seed) != seed:
        raise ConfigError(f"resume: the run began with seed {saved['seed']}, and this one has {seed}; set model.init_args.seed as it was")
    check_data(saved.get("data", {}), data, may_grow=not inside)
    if inside and saved["window"] is None:
        raise ConfigError(NO_ROLLOUTS)


def check_trainer(trainer: Any, plan: WindowPlan, epoch: int) -> None:
    """Raise ConfigError for settings of the Trainer that do not go with windows; ``epoch`` is the micro-steps of an epoch."""
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
        raise ConfigError("GradientAccumulationScheduler changes the window plan during the run; set accumulate_grad_batches instead")
    limit = trainer.limit_train_batches
    batches = min(limit, epoch) if isinstance(limit, int) else int(limit * epoch)
    if batches % plan.accumulate and not trainer.fast_dev_run:
        raise ConfigError(
            f"limit_train_batches={limit} does not divide by accumulate_grad_batches={plan.accumulate}: it leaves {batches} "
            "micro-steps an epoch"
        )
    interval = trainer.val_check_interval
    if isinstance(interval, int) and interval > batches and trainer.check_val_every_n_epoch is not None:
        raise ConfigError(
            f"val_check_interval={interval} micro-steps is more than the {batches} of an epoch; lower it, or set "
            "check_val_every_n_epoch to null to count over epochs"
        )
