"""What every run keeps in its folder: checkpoints, the resolved configuration, metrics that survive a kill, responses."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from typing_extensions import override

from aapa_lightning.errors import COUNT, check_numbers
from aapa_lightning.files import atomic_write, write_text
from aapa_lightning.runs import KEPT, MetricsCSV, RunBoard


class RunCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``: every ``every_n_steps`` optimiser steps, at the end of every epoch and after the last step.

    A step's metrics are written before its checkpoint, and a validation that follows the step runs before it too, so that a run
    killed at any moment and resumed loses no row.

    Args:
        every_n_steps: optimiser steps between checkpoints.
        keep: ``last`` keeps one file, ``all`` also keeps ``step=N.ckpt`` of every save.
    """

    def __init__(self, every_n_steps: int = 100, keep: Literal["last", "all"] = "last") -> None:
        check_numbers(locals(), {"every_n_steps": COUNT}, "checkpoint.")
        super().__init__(
            filename="{step}",
            save_last=True,
            save_top_k=-1 if keep == "all" else 0,
            every_n_train_steps=every_n_steps,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.every_n_steps = every_n_steps

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = os.path.join(trainer.default_root_dir, "checkpoints")
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._due(trainer):
            return
        # Private, but the alternative is a copy of its rules: the loop itself asks this right after this hook.
        loop = trainer.fit_loop
        if loop.epoch_loop._should_check_val_fx(loop._data_fetcher):  # type: ignore[arg-type]
            self._defer_save_until_validation = True
        else:
            self._save(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._defer_save_until_validation:
            self._defer_save_until_validation = False
            self._save(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._last_global_step_saved:  # stopped early
            self._save(trainer)

    def _due(self, trainer: Trainer) -> bool:
        if self._should_skip_saving_checkpoint(trainer):
            return False
        progress = trainer.fit_loop.epoch_loop.batch_progress
        return trainer.global_step % self.every_n_steps == 0 or trainer.global_step == trainer.max_steps or progress.is_last_batch

    def _save(self, trainer: Trainer) -> None:
        if self._should_skip_saving_checkpoint(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)


class RunFolder(Callback):
    """Writes ``config.yaml`` once the run is accepted and keeps ``metrics.csv`` in step with the checkpoints.

    Nothing is written before models, data and checkpoint are loaded and checked, so that a start that is refused leaves the folder as it
    was.

    Args:
        run_dir: the run's folder.
        config: text of the resolved configuration.
    """

    def __init__(self, run_dir: str | os.PathLike[str], config: str) -> None:
        self.run_dir = Path(run_dir)
        self.config = config
        self._resumed = False
        self._patience: dict[int, int] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._patience = {id(callback): callback.patience for callback in _early_stopping(trainer)}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check = getattr(pl_module, "check_start", None)
        if callable(check):
            check()
        for callback in _early_stopping(trainer):  # a checkpoint gives it the old one back
            callback.patience = self._patience[id(callback)]
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.trim(trainer.global_step)
            elif isinstance(logger, RunBoard):
                logger.begin()
        if trainer.is_global_zero:
            write_text(self.run_dir / "config.yaml", self.config)
        self._resumed = trainer.global_step > 0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._resumed and pl_module.automatic_optimization:
            # Resumed from the end of a validation that is not due any more (a finished run with more steps), Lightning's own count of
            # logged steps is one behind, and the first row would overwrite the last.
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        self._resumed = False

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEPT] = self.config
        if trainer.training and trainer._results is not None and trainer._logger_connector._first_loop_iter is not None:
            # Lightning logs a step after its checkpoint; logged here first, and merged into the same row then.
            metrics = trainer._results.metrics(on_step=True)["log"]
            row = {key: value.item() for key, value in metrics.items()} | {"epoch": trainer.current_epoch}
            for logger in trainer.loggers:
                if metrics and isinstance(logger, MetricsCSV):
                    logger.log_metrics(row, step=trainer.global_step - 1)


def _early_stopping(trainer: Trainer) -> list[EarlyStopping]:
    callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]  # typed as Fabric's shim, too
    return [callback for callback in callbacks if isinstance(callback, EarlyStopping)]


class ResponseWriter(Callback):
    """Writes what ``predict_step`` returns, a list of rows, to a JSON-lines file.

    Every rank writes its part as it goes; rank 0 joins them in order of rank and removes the parts.

    Args:
        path: the response file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f".{self.path.name}.rank{rank}")

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part(trainer.global_rank).write_bytes(b"")

    @override
    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        rows: Sequence[Mapping[str, Any]] = outputs or ()
        with open(self._part(trainer.global_rank), "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            parts = [self._part(rank) for rank in range(trainer.world_size)]
            with atomic_write(self.path) as file:
                for part in parts:
                    file.write(part.read_bytes())
            for part in parts:
                part.unlink()
        trainer.strategy.barrier()
