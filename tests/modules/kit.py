"""Builders of tiny runs, shared by the promise tests and by the worker processes that they start."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from ranks import run_ranks
from torch import nn

from aapa_lightning.anchor.guard import Guard
from aapa_lightning.anchor.schedule import Adaptive
from aapa_lightning.callbacks.anchor import AnchorCallback
from aapa_lightning.data.datamodule import AapaDataModule
from aapa_lightning.logprobs import sequence_logprobs
from aapa_lightning.modules.chord import CHORDModule
from aapa_lightning.modules.grpo import GRPOModule
from aapa_lightning.modules.preference import PreferenceModule
from aapa_lightning.modules.sft import SFTModule
from aapa_lightning.modules.uniapl import UniAPLModule
from aapa_lightning.objectives.correction import CorrectionOptions
from aapa_lightning.policy import PolicySpec
from aapa_lightning.rewards.base import Reward
from aapa_lightning.rollout.base import SamplingParams
from aapa_lightning.sharding import WholeTensors
from aapa_lightning.strategies import FSDP2Strategy
from aapa_lightning.types import Record

warnings.filterwarnings("ignore", module="lightning")
STRATEGIES = {
    "ddp": lambda: "ddp",
    "fsdp2": lambda: "fsdp2",
    "fsdp2 full": lambda: FSDP2Strategy(save_distributed_checkpoint=False),
}
MODULES = {"sft": SFTModule, "grpo": GRPOModule, "chord": CHORDModule, "uniapl": UniAPLModule, "preference": PreferenceModule}


def make_records(count: int = 12) -> list[Record]:
    """Prompts of very different lengths with one expert and a pair each."""
    return [
        Record(
            "Describe the harbor " * (1 + 3 * (i % 3)) + str(i),
            experts=(f"The boats rest {i}." * (1 + i % 2),),
            chosen=f"Boats rest {i}." * (1 + i % 2),
            rejected=f"No {i % 5}" * (1 + i % 3),
            source=f"data.jsonl:{i + 1}",
        )
        for i in range(count)
    ]


class TextReward(Reward):
    """A deterministic number in [0, 1) that differs between texts, and remembers what it saw."""

    name = "text"

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def __call__(self, responses, records):
        self.seen += [(str(record.prompt), str(text)) for text, record in zip(responses, records, strict=True)]
        return [(sum(map(ord, text)) % 17) / 17 for text in responses]


class ByteJudge(nn.Module):
    """A discriminator with weights: the logit of a sentence is a linear function of its mean byte embedding."""

    needs_experts = False
    whole_response = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Embedding.from_pretrained(torch.randn(256, 8, generator=generator), freeze=False)
        self.head = nn.Linear(8, 1)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(1, 8, generator=generator))
            self.head.bias.zero_()
        self.dropout = nn.Dropout(0.5)

    def score(self, responses, records, spans):
        rows = [text[a:b].encode() or b" " for text, row in zip(responses, spans.char_spans, strict=True) for a, b in row]
        means = torch.stack([self.embedding(torch.tensor(list(row))).mean(0) for row in rows])
        return self.head(self.dropout(means)).squeeze(-1).detach()

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for value in self.state_dict().values():
            digest.update(value.numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        raise AssertionError("a policy run never saves its discriminator")


class Rows(Logger):
    """Keeps what Lightning logs: (step, metrics)."""

    name = version = "rows"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class SaveAt(L.Callback):
    """Saves ``step=N.ckpt`` after the optimiser steps named, or ``batch=N.ckpt`` after the micro-steps named."""

    def __init__(self, folder, steps=None, batches=()) -> None:
        self.folder, self.steps, self.batches, self._last = Path(folder), steps, batches, 0
        self._batch = 0

    def on_train_start(self, trainer, pl_module):
        self._last = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._batch += 1
        if self._batch in self.batches:
            trainer.save_checkpoint(self.folder / f"batch={self._batch}.ckpt")
        if trainer.global_step != self._last:
            self._last = trainer.global_step
            if self.steps is None or self._last in self.steps:
                trainer.save_checkpoint(self.folder / f"step={self._last}.ckpt")


def make_module(name: str, spec: PolicySpec, *, sgd: bool = False, **options):
    """A module of four prompts (or demonstrations) a step, two or three responses each; ``sgd`` makes weights as smooth as gradients."""
    common = {
        "optimizer": partial(torch.optim.SGD, lr=0.5) if sgd else partial(torch.optim.AdamW, lr=1e-2),
        "lr_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.7),
        "sampling": SamplingParams(6, temperature=1.2, stop=("a", "e", "s")),  # lengths differ
        "seed": 3,
    }
    own = {
        "sft": {"batch_size": 4, "anchor_group_size": 2},
        "preference": {"batch_size": 4, "anchor_group_size": 2},
        "grpo": {"prompts_per_window": 4, "group_size": 3, "rewards": [TextReward()]},
        "chord": {"prompts_per_window": 4, "group_size": 3, "rewards": [TextReward()], "expert_batch_size": 4, "mu_peak": 0.4},
        "uniapl": {"prompts_per_window": 4, "group_size": 3, "rewards": [TextReward()], "demonstrations_per_step": 4},
    }
    if isinstance(options.get("correction"), dict):
        options |= {"correction": CorrectionOptions(**options["correction"])}
    return MODULES[name](spec, **(common | own[name] | options))


def make_anchor(weight=0.5, *, judge: int = 0, adaptive: bool = False, **options) -> AnchorCallback:
    """An anchor callback; ``adaptive`` makes schedule and guard stateful."""
    if adaptive:
        options |= {"guard": Guard(max_length_growth=1.01, min_entropy_ratio=0.999, patience=1)}
        weight = Adaptive(weight, decay=0.5, fast=1.0, slow=3.0, tolerance=0.0)
    return AnchorCallback(ByteJudge(judge), weight=weight, **options)


def strategy(world_size: int, name: str | None = None):
    """Of one rank: none; of several: ``name``, or what the environment says."""
    return STRATEGIES[name or os.environ.get("AAPA_TEST_STRATEGY", "ddp")]() if world_size > 1 else "auto"


def make_trainer(max_steps: int = -1, *, accumulate: int = 1, callbacks=(), logger=False, **options) -> L.Trainer:
    """A quiet trainer, on the CPU unless told otherwise, that logs every step."""
    options = {"num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_checkpointing": False, "accelerator": "cpu"} | options
    return L.Trainer(
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        callbacks=list(callbacks),
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(module, trainer: L.Trainer, data=None, *, demonstrations=None, val=None, ckpt=None):
    """Train and return the module."""
    trainer.fit(module, AapaDataModule(make_records() if data is None else data, demonstrations=demonstrations, val=val), ckpt_path=ckpt)
    return module


def weights(module) -> dict[str, torch.Tensor]:
    """A copy of the policy's weights."""
    return {name: value.clone() for name, value in WholeTensors(module.model.state_dict()).items()}


def load_worker(path: Path):
    """A worker's module, for running its jobs in this process."""
    source = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(source)
    sys.path.insert(0, str(path.parent))  # as it is when the worker runs by itself
    source.loader.exec_module(module)
    sys.path.remove(str(path.parent))
    return module


def launch(worker: Path, jobs: list, file: Path, *, ranks: int = 2, strategy: str = "ddp") -> tuple[int, str]:
    """Run the jobs of a worker in processes of their own; the exit code and what they printed."""
    file.write_text(json.dumps(jobs))
    done = run_ranks(worker, file, ranks=ranks, AAPA_TEST_STRATEGY=strategy)
    return done.returncode, done.stdout + done.stderr


def separable(count=8):
    """One word is better than another to every prompt."""
    words = ("calm sea.", "a storm!")
    return [Record(f"Describe the harbor {i}.", chosen=words[0], rejected=words[1], source=f"data.jsonl:{i + 1}") for i in range(count)]


def run_preference(spec, steps, data=None, callbacks=(), trainer=None, **options):
    """A fit of PreferenceModule: the module, and what it logged at each step."""
    rows = Rows()
    module = make_module("preference", spec, **options)
    fit(module, make_trainer(steps, callbacks=callbacks, logger=rows, **(trainer or {})), data=data)
    return module, [row for _, row in rows.rows]


def response_sum(model, module, record, text):
    """Log-prob of a response under a model, without padding."""
    row = module.encode(replace(record, chosen=text, rejected=None)).chosen
    ids, learned = torch.tensor([row.input_ids]), torch.tensor([row.response_mask])
    with torch.no_grad():
        return float(sequence_logprobs(model, ids, torch.ones_like(learned), learned).sum())
