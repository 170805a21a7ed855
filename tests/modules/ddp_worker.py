"""Runs jobs of a JSON file, one fit after another, alone or as one rank of several; the promise tests start it as a process of its own.

Each job names a module and its options, the trainer's, and where its results go (``<out>.rank<r>``). Several ranks run under the job's
strategy, else under that of the environment, else under DDP.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import kit
import lightning as L
import torch

from aapa_lightning import strategies
from aapa_lightning.adapters import LoraSpec
from aapa_lightning.callbacks.run_folder import RunCheckpoint, RunFolder
from aapa_lightning.checkpoint_io import AtomicCheckpointIO
from aapa_lightning.errors import AapaError
from aapa_lightning.policy import PolicySpec
from aapa_lightning.runs import MetricsCSV
from aapa_lightning.sharding import WholeTensors


class KillAt(L.Callback):
    """Kills its own process the hard way before the optimiser step ``step`` on rank ``rank``."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


class DieWriting(L.Callback):
    """Kills its own process the hard way in the middle of writing the last checkpoint of step ``step`` on rank ``rank``."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def setup(self, trainer, pl_module, stage):
        plain = strategies.write_folder

        def dying(checkpoint, folder, rank, barrier):
            if trainer.global_step == self.step and rank == self.rank and folder.name.startswith(".last"):
                folder.mkdir(exist_ok=True)
                (folder / f"rank{rank}.pt").write_bytes(b"half a fi")
                os.kill(os.getpid(), signal.SIGKILL)
            plain(checkpoint, folder, rank, barrier)

        strategies.write_folder = dying


class PoisonAt(L.Callback):
    """Makes the loss of rank ``rank`` NaN in optimiser step ``step``."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def setup(self, trainer, pl_module, stage):
        plain = pl_module.loss_terms

        def poisoned(window, micro_step):
            terms = plain(window, micro_step)
            if trainer.global_step == self.step and trainer.global_rank == self.rank:
                terms[0].outputs.losses = terms[0].outputs.losses * float("nan")
            return terms

        pl_module.loss_terms = poisoned


def run(job: dict, rank: int, world_size: int) -> None:
    """One fit; saves weights, optimiser state, rollouts and callback metrics, or the error."""
    folder = Path(job["run"]) if "run" in job else None
    callbacks = [kit.make_anchor(**job["anchor"])] if "anchor" in job else []
    callbacks += [KillAt(*job["kill"])] if "kill" in job else []
    callbacks += [PoisonAt(*job["poison"])] if "poison" in job else []
    callbacks += [DieWriting(*job["dies_writing"])] if "dies_writing" in job else []
    rows = kit.Rows()
    options = {"logger": rows} | job.get("trainer", {})
    if folder is not None:
        callbacks += [RunFolder(folder, "a: 1\n"), RunCheckpoint(every_n_steps=1, keep="all")]
        options |= {
            "enable_checkpointing": True,
            "logger": [MetricsCSV(folder)],
            "plugins": [AtomicCheckpointIO()],
            "default_root_dir": str(folder),
        }
    trainer = kit.make_trainer(
        callbacks=callbacks,
        devices=world_size,
        strategy=kit.strategy(world_size, job.get("strategy")),
        use_distributed_sampler=False,
        **options,
    )
    spec = PolicySpec(job["policy"], **job.get("spec", {}), lora=LoraSpec(**job["lora"]) if "lora" in job else None)
    module = kit.make_module(job["module"], spec, **job.get("options", {}))
    val = kit.make_records(3) if job.get("val") else None
    demonstrations = kit.make_records(19)[12:] if job.get("demonstrations") else None
    try:
        kit.fit(module, trainer, demonstrations=demonstrations, val=val, ckpt=job.get("ckpt"))
    except AapaError as error:
        result = {"error": str(error)}
    else:
        result = {
            "weights": kit.weights(module),
            "optimizer": {i: dict(WholeTensors(state)) for i, state in trainer.optimizers[0].state_dict()["state"].items()},
            "seen": module.rewards.rewards[0].seen if module.rewards else [],
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "rows": [row for _, row in rows.rows],
            "norms": [row for _, row in rows.rows if "train/grad_norms/sft" in row],
            "judge": callbacks[0].discriminator.fingerprint() if "anchor" in job else "",
        }
    if "export" in job:
        module.export(job["export"])
    torch.save(result, f"{job['out']}.rank{rank}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
