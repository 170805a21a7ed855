"""Preference runs of a JSON file, one after another, alone or as one rank of several; ``test_preference_ranks.py`` starts it.

Each job names options of the module and the trainer, and where its results go (``<out>.rank<r>``).
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import kit
import torch

from aapa_lightning.modules.preference import StressOptions
from aapa_lightning.policy import PolicySpec


def records(labels: bool):
    """Pairs; or responses of which some have no counterpart, so that ranks hold different numbers of them."""
    pairs = kit.make_records(16)
    if not labels:
        return pairs
    return [replace(row, **({"rejected": None} if i % 4 == 1 else {"chosen": None} if i % 4 > 1 else {})) for i, row in enumerate(pairs)]


def held_out():
    """Five pairs, of which two are the wrong way round: an odd number for two ranks, and no accuracy of 1."""
    pairs = kit.make_records(5)
    return [replace(row, chosen=row.rejected, rejected=row.chosen) if i % 2 else row for i, row in enumerate(pairs)]


def run(job: dict, rank: int, world_size: int) -> None:
    """One fit; saves weights, logged rows and figures of validation."""
    options = {"batch_size": 8, "sgd": True, "eval_samples": 0, **job["options"]}
    options |= {"stress": StressOptions(**job["stress"])} if "stress" in job else {}
    options |= {"reference": PolicySpec(job["reference"])} if "reference" in job else {}
    rows = kit.Rows()
    trainer = kit.make_trainer(
        job.get("steps", 3),
        accumulate=job["accumulate"],
        callbacks=[kit.make_anchor(0.7, scale="batch")] if job.get("anchored") else [],
        logger=rows,
        devices=world_size,
        strategy=kit.strategy(world_size),
        use_distributed_sampler=False,
    )
    module = kit.make_module("preference", PolicySpec(job["policy"]), **options)
    kit.fit(module, trainer, data=records(job.get("labels", False)), val=held_out())
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    logged = [row for _, row in rows.rows if "train/loss" in row]
    torch.save({"weights": kit.weights(module), "rows": logged, "val": figures}, f"{job['out']}.rank{rank}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in json.loads(Path(sys.argv[1]).read_text()):
        run(each, int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
