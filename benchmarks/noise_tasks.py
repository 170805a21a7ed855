"""The two preference tasks of ``noise.py``: pairs whose right order a checker knows, and a policy to start from."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch

from aapa_lightning.data.datamodule import AapaDataModule
from aapa_lightning.data.prompt_format import PromptFormat
from aapa_lightning.data.records import attach_experts, read_records, split_records
from aapa_lightning.data.responses import join_responses, read_responses
from aapa_lightning.data.synthetic import generate_records, judge, write_world
from aapa_lightning.data.tokenizer import train_tokenizer
from aapa_lightning.loop.evaluate import EvalStep
from aapa_lightning.modules.inference import InferenceModule
from aapa_lightning.modules.sft import SFTModule
from aapa_lightning.policy import PolicySpec
from aapa_lightning.rollout.base import SamplingParams
from aapa_lightning.types import Record

MODELS = ("gpt-4o", "claude-3.5-sonnet", "qwen2.5-7b", "qwen2.5-1.5b", "qwen2.5-0.5b")
CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
#: CPU seconds of training for each run.
SECONDS = {"world": 8.0, "verdicts": 20.0}
WORLD = {"train": 800, "test": 200, "samples": 4, "temperature": 1.2, "sft_steps": 250, "lr": 4e-3}
VERDICTS = {"vocab": 2048, "tokens": 128, "pairs_per_prompt": 6, "test": 0.25, "sft_steps": 120, "lr": 2e-3}


@dataclass
class Task:
    """Pairs with the right labels, by prompt in training and test, and the policy that training starts from.

    Args:
        start: folder of the policy.
        train: pairs.
        test: pairs of other prompts.
        prompt_format: limits.
        judge: further figures of a trained module.
    """

    start: Path
    train: list[Record]
    test: list[Record]
    prompt_format: PromptFormat
    judge: Callable[[InferenceModule], dict[str, float]]


def settings() -> dict[str, Any]:
    """What the figures depend on beside the runs themselves."""
    return {"world": WORLD, "verdicts": VERDICTS, "policy": CONFIG}


@cache
def load(name: str, seed: int, folder: Path) -> Task:
    """The task of a seed; its policy is trained once and kept in ``folder``."""
    return TASKS[name](seed, folder / f"{name}-{seed}")


def quiet_trainer(max_steps: int, *callbacks: L.Callback) -> L.Trainer:
    """A trainer on the CPU that prints and writes nothing."""
    return L.Trainer(
        max_steps=max_steps,
        callbacks=list(callbacks),
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
    )


def _sft(spec: PolicySpec, records: Sequence[Record], fmt: PromptFormat, out: Path, *, steps: int, lr: float, seed: int) -> None:
    """Train the policy that every run starts from."""
    if (out / "config.json").exists():
        return

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False)

    module = SFTModule(
        spec,
        batch_size=32,
        seed=seed,
        prompt_format=fmt,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
        lr_scheduler=schedule,
    )
    trainer = quiet_trainer(steps)
    trainer.fit(module, AapaDataModule(records))
    module.export(out)


def _world(seed: int, folder: Path) -> Task:
    """Sampled responses of true success over sampled ones without it; where no sample succeeds, the expert's over a sample."""
    if not (folder / "tokenizer").exists():
        write_world(folder, train=WORLD["train"], val=1, test=WORLD["test"], seed=seed)
    fmt = PromptFormat(chat_template="never", max_prompt_tokens=64, max_response_tokens=64)
    records = {split: generate_records(WORLD[split], seed, split) for split in ("train", "test")}
    spec = PolicySpec(config=CONFIG, tokenizer=str(folder / "tokenizer"), seed=seed)
    _sft(spec, records["train"], fmt, folder / "start", steps=WORLD["sft_steps"], lr=WORLD["lr"], seed=seed)
    module = InferenceModule(
        PolicySpec(model=str(folder / "start")), prompt_format=fmt, sampling=SamplingParams(max_new_tokens=64), seed=seed
    )
    module.configure_model()
    module.eval()
    pairs = {}
    for split, rows in records.items():
        texts = _samples(module, rows, WORLD["samples"], WORLD["temperature"])
        pairs[split] = [pair for record, found in zip(rows, texts, strict=True) if (pair := _world_pair(record, found)) is not None]

    def figures(trained: InferenceModule) -> dict[str, float]:
        texts = _samples(trained, records["test"], 1, 1.0)
        judged = [judge(record, found[0]) for record, found in zip(records["test"], texts, strict=True)]
        return {"true_success": sum(verdict.true_success for verdict in judged) / len(judged)}

    return Task(folder / "start", pairs["train"], pairs["test"], fmt, figures)


def _samples(module: InferenceModule, records: Sequence[Record], samples: int, temperature: float) -> list[list[str]]:
    texts: list[list[str]] = []
    with torch.no_grad():
        for start in range(0, len(records), 100):
            part = records[start : start + 100]
            rollouts = module.sample(EvalStep(range(start, start + len(part)), part), samples, temperature, "noise")
            texts += [rollouts.texts[i : i + samples] for i in range(0, len(rollouts.texts), samples)] if rollouts else []
    return texts


def _world_pair(record: Record, texts: Sequence[str]) -> Record | None:
    verdicts = [judge(record, text).true_success for text in texts]
    failed = [text for text, good in zip(texts, verdicts, strict=True) if not good and text.strip()]
    passed = [text for text, good in zip(texts, verdicts, strict=True) if good]
    return replace(record, chosen=(passed or list(record.experts))[0], rejected=failed[0]) if failed else None


def _verdicts(seed: int, folder: Path) -> Task:
    """A model's response to an IFEval prompt that follows all instructions over another model's that does not, both short."""
    data = Path(os.environ["AAPA_DATA"]) / "ifeval"
    records = read_records(str(data / "prompts.jsonl"))
    experts = [record for record in attach_experts(records, str(data / "responses/gpt-4o.jsonl")) if record.experts]
    if not (folder / "tokenizer").exists():
        texts = [text for record in experts for text in (str(record.prompt), *record.experts)]
        train_tokenizer(texts, VERDICTS["vocab"], chat_template=None).save_pretrained(folder / "tokenizer")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def short(text: str) -> bool:
        return bool(text.strip()) and len(tokenizer(text)["input_ids"]) < VERDICTS["tokens"]

    fmt = PromptFormat(chat_template="never", max_prompt_tokens=256, max_response_tokens=VERDICTS["tokens"], overlong="drop")
    train, test = split_records(experts, VERDICTS["test"], seed)
    spec = PolicySpec(config=CONFIG, tokenizer=str(folder / "tokenizer"), seed=seed)
    _sft(spec, train, fmt, folder / "start", steps=VERDICTS["sft_steps"], lr=VERDICTS["lr"], seed=seed)
    responses = [response for name in MODELS for response in read_responses(data / "responses" / f"{name}.jsonl")]
    pairs = []
    for split in (train, test):
        joined = zip(split, join_responses(split, responses), strict=True)
        rows = [
            (record, [(response.text, all(response.extra["strict"])) for response in found if short(response.text)])
            for record, found in joined
            if short(str(record.prompt))
        ]
        pairs.append([pair for record, found in rows for pair in _verdict_pairs(record, found, seed)])
    return Task(folder / "start", pairs[0], pairs[1], fmt, lambda module: {})


def _verdict_pairs(record: Record, found: Sequence[tuple[str, bool]], seed: int) -> list[Record]:
    both = [(good, bad) for good, followed in found if followed for bad, also in found if not also]
    random.Random(f"{seed}/{record.key}").shuffle(both)
    return [replace(record, chosen=good, rejected=bad) for good, bad in both[: VERDICTS["pairs_per_prompt"]]]


TASKS: dict[str, Callable[[int, Path], Task]] = {"world": _world, "verdicts": _verdicts}
