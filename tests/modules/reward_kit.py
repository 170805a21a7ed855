"""Builders of tiny reward-model runs, shared by their tests and the worker processes that these start."""

from __future__ import annotations

from functools import partial

import torch
from kit import make_records, make_trainer, strategy, weights

from aapa_lightning.data.datamodule import AapaDataModule
from aapa_lightning.modules.reward_model import RewardModelModule
from aapa_lightning.policy import PolicySpec
from aapa_lightning.types import Record

__all__ = ["fit", "make_golden", "make_records", "make_reward_model", "make_trainer", "strategy", "weights"]


def make_golden(count: int = 10, first: int = 0) -> list[Record]:
    """An expert's response over a sample each, of very different lengths."""
    return [
        Record(
            f"Name the harbor {i}",
            chosen=f"The gulls call {i}." * (1 + i % 3),
            rejected=f"No {i % 4}" * (1 + i % 4),
            source=f"golden.jsonl:{i + 1}",
        )
        for i in range(first, first + count)
    ]


def make_reward_model(spec: PolicySpec, *, sgd: bool = False, **options) -> RewardModelModule:
    """Four human and four golden pairs a step; ``sgd`` makes weights as smooth as gradients."""
    common = {
        "optimizer": partial(torch.optim.SGD, lr=0.5) if sgd else partial(torch.optim.AdamW, lr=1e-2),
        "lr_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.7),
        "max_tokens": 128,
        "batch_size": 4,
        "golden_batch_size": 4,
        "golden_weight": 0.5,
        "eval_batch_size": 3,
        "seed": 3,
    }
    return RewardModelModule(spec, **(common | options))


def fit(module: RewardModelModule, trainer, *, human=None, golden=None, val=None, golden_val=None, ckpt=None) -> RewardModelModule:
    """Train and return the module; human pairs are the kit's unless given."""
    human = make_records() if human is None else human
    trainer.fit(module, AapaDataModule(human, golden=golden, val=val, golden_val=golden_val), ckpt_path=ckpt)
    return module
