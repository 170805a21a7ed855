"""Trains and evaluates reward models as one rank of several; jobs and results are files, as in ``ddp_worker``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import reward_kit as rewards
import torch

from aapa_lightning.data.datamodule import AapaDataModule
from aapa_lightning.policy import PolicySpec


def run(job: dict, rank: int, world_size: int) -> None:
    """Two steps of training, then the test figures."""
    module = rewards.make_reward_model(PolicySpec(job["base"]), sgd=True, batch_size=8, **job["options"])
    trainer = rewards.make_trainer(
        2,
        accumulate=job["accumulate"],
        devices=world_size,
        strategy=rewards.strategy(world_size),
        use_distributed_sampler=False,
    )
    # eleven and seven pairs: ranks have unequal shares, and one of them runs out of golden pairs first
    data = AapaDataModule(
        rewards.make_records(16),
        golden=rewards.make_golden(),
        val=rewards.make_records(11),
        golden_val=rewards.make_golden(7, 30),
    )
    trainer.fit(module, data)
    trained = {name: float(value) for name, value in trainer.callback_metrics.items()}
    (figures, *_) = trainer.test(module, data, verbose=False)
    result = {"weights": rewards.weights(module), "trained": trained, "figures": {name: float(value) for name, value in figures.items()}}
    torch.save(result, f"{job['out']}.rank{rank}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
