"""Rollouts to read: what the policy wrote, what it was given for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from aapa_lightning.errors import COUNT, check_numbers
from aapa_lightning.files import atomic_write
from aapa_lightning.loop.experience import Experience


class SampleWriter(Callback):
    """Writes rollouts of rank 0 to ``samples.parquet``, a folder of one file per step that pandas, pyarrow and datasets read as one table.

    A step that is repeated after a resume overwrites its own file. Columns: ``step``, ``prompt``, ``response``, ``tokens``, ``truncated``,
    ``rewards`` (in the order of the module's rewards), ``advantage``, and ``anchor_score`` when anchored.

    Args:
        every_n_steps: optimiser steps between samples.
        groups: prompts of a sample, all responses each.
    """

    def __init__(self, every_n_steps: int = 10, groups: int = 2) -> None:
        check_numbers(locals(), {"every_n_steps": COUNT, "groups": COUNT}, "samples.")
        self.every_n_steps = every_n_steps
        self.groups = groups
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where the run starts: its first micro-steps belong to a step that is not done yet."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write when an optimiser step is done that is due."""
        step = trainer.global_step
        if step == self._step or not trainer.is_global_zero:
            return
        self._step = step
        window = getattr(pl_module, "window", None)
        if window is None or window.experience is None or (step - 1) % self.every_n_steps:
            return
        rows = self.groups * window.plan.samples
        write_samples(Path(trainer.default_root_dir) / "samples.parquet" / f"step-{step:08d}.parquet", step, window.experience, rows)


def write_samples(path: Path, step: int, experience: Experience, rows: int) -> None:
    """Write the first ``rows`` responses as one Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rollouts = experience.rollouts
    prompts = [record.prompt if isinstance(record.prompt, str) else record.prompt[-1]["content"] for record in rollouts.records[:rows]]
    columns: dict[str, Any] = {
        "step": [step] * len(prompts),
        "prompt": prompts,
        "response": rollouts.texts[:rows],
        "tokens": rollouts.lengths[:rows].tolist(),
        "truncated": rollouts.truncated[:rows].tolist(),
        "rewards": experience.rewards[:rows].tolist(),
        "advantage": experience.advantages[:rows].tolist(),
    }
    if experience.scores is not None:
        columns["anchor_score"] = experience.scores[:rows].tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        pq.write_table(pa.table(columns), temporary)
