"""Fits one run under DDP and under DeepSpeed's ZeRO stages, on CPU; ``test_deepspeed`` starts it on two ranks."""

from __future__ import annotations

import os
import sys
from collections import ChainMap
from functools import partial
from pathlib import Path

import deepspeed
import kit
import lightning.pytorch.strategies.deepspeed as lightnings
import torch
from ddp_worker import PoisonAt
from lightning.pytorch.strategies import DDPStrategy

from aapa_lightning.callbacks.run_folder import RunCheckpoint, RunFolder
from aapa_lightning.checkpoint_io import AtomicCheckpointIO
from aapa_lightning.errors import AapaError
from aapa_lightning.policy import PolicySpec
from aapa_lightning.strategies import ZeROStrategy

STRATEGIES = {"ddp": DDPStrategy, "zero1": partial(ZeROStrategy, stage=1), "zero2": partial(ZeROStrategy, stage=2)}


def allow_cpu() -> None:
    """DeepSpeed runs on CPU; Lightning's strategy looks for CUDA devices."""
    plain = deepspeed.initialize
    ZeROStrategy.setup_environment = DDPStrategy.setup_environment
    lightnings._validate_device_index_selection = lambda devices: None
    deepspeed.initialize = lambda args, **options: plain(**options)  # args are the device's index


def run(policy: str, out: Path, strategy: str, *, steps=4, precision="32-true", folder=None, ckpt=None, poison=None) -> None:
    """GRPO with everything that a strategy could disturb: windows of four steps, a reference, an anchor, a schedule, clipping."""
    callbacks = [kit.make_anchor(0.5, adaptive=True)] + ([PoisonAt(*poison)] if poison else [])
    options = {"gradient_clip_val": 0.3, "precision": precision, "plugins": [AtomicCheckpointIO()]}
    if folder is not None:
        callbacks += [RunFolder(folder, "a: 1\n"), RunCheckpoint(every_n_steps=2, keep="all")]
        options |= {"enable_checkpointing": True, "default_root_dir": str(folder)}
    rows = kit.Rows()
    trainer = kit.make_trainer(
        steps, callbacks=callbacks, logger=rows, devices=2, strategy=STRATEGIES[strategy](), use_distributed_sampler=False, **options
    )
    module = kit.make_module("grpo", PolicySpec(policy), beta=0.1, minibatches=2, updates_per_window=2, term_norms_every=1)
    try:
        kit.fit(module, trainer, ckpt=ckpt)
    except AapaError as error:
        result = {"error": str(error)}
    else:
        done = sorted({step for step, _ in rows.rows})
        kept = {"weights": kit.weights(module), "buffers": {str(value.dtype) for value in module.model.buffers()}}
        result = kept | {"rows": [dict(ChainMap(*[row for at, row in rows.rows if at == step])) for step in done]}
    torch.save(result, f"{out}.rank{os.environ['RANK']}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    allow_cpu()
    folder, policy = Path(sys.argv[1]), sys.argv[2]
    run(policy, folder / "ddp", "ddp", folder=folder / "ddp-run")
    run(policy, folder / "zero1", "zero1")
    run(policy, folder / "zero2", "zero2", folder=folder / "whole")
    last = folder / "whole" / "checkpoints" / "step=2.ckpt"
    run(policy, folder / "resumed", "zero2", ckpt=str(last))
    run(policy, folder / "poisoned-ddp", "ddp", poison=(1, 1))
    run(policy, folder / "poisoned", "zero2", poison=(1, 1))
    run(policy, folder / "half", "zero2", precision="bf16-mixed")
    run(policy, folder / "from-zero", "ddp", ckpt=str(last))
    run(policy, folder / "from-ddp", "zero2", ckpt=str(folder / "ddp-run" / "checkpoints" / "last.ckpt"))
