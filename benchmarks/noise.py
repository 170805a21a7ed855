"""Flipped labels: what DPO, SimPO, Dr.DPO, rDPO and GAPO learn from preference pairs of which some are the wrong way round.

Run: [AAPA_DATA=path/to/data] python benchmarks/noise.py [--task world verdicts] [--seeds 1 2] [--seconds N] [--quick] [--json] [--write]
Every objective gets the same CPU seconds of training from the same start, so one that costs more a step takes fewer; its learning rate is
the best of three on clean labels of another seed. Judged on clean, held-out pairs. `world` needs nothing; `verdicts` builds its pairs from
AAPA_DATA (a response that follows all instructions over one that does not). --write replaces benchmarks/results/noise.json and
docs/results/noise.md. Finished runs are kept in --cache DIR. Set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import noise_report
import noise_tasks
import timing
import torch

from aapa_lightning.data.datamodule import AapaDataModule
from aapa_lightning.data.pairs import flip_pairs
from aapa_lightning.loop.preferences import responses_of
from aapa_lightning.loop.reference import response_sums
from aapa_lightning.modules.preference import PreferenceModule, StressOptions
from aapa_lightning.objectives.pairs import per_token
from aapa_lightning.policy import PolicySpec
from aapa_lightning.types import Record

OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "simpo": {},
    "dr_dpo": {},
    "rdpo": {},
    "gapo": {"options": {"beta": 2.5, "gamma_beta_ratio": 0.1}, "stress": StressOptions(rho=0.025)},
}
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
TUNING_SEED = 100
RATES = (0.0, 0.1, 0.2, 0.3, 0.4)
FLIPS = ("random", "length")
BATCH = 16


@dataclass(frozen=True)
class Run:
    """One training run: what was learnt from how noisy labels."""

    task: str
    objective: str
    flip: str
    rate: float
    seed: int
    seconds: float
    lr: float


class Budget(L.Callback):
    """Ends training when the process has spent its CPU seconds on it, and notes how many steps that were."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.steps, self._start = seconds, 0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Read it."""
        self.steps = trainer.global_step
        trainer.should_stop = time.process_time() - self._start >= self.seconds


class Weights:
    """Collects each pair's gradient weight with whether its label was flipped, as training goes."""

    def __init__(self, module: PreferenceModule) -> None:
        self.rows: list[tuple[int, float, bool]] = []
        plain = module.loss_terms

        def watched(window: Any, micro_step: int) -> Any:
            terms = plain(window, micro_step)
            weights = terms[0].outputs.metrics["weight"].flatten().tolist()
            flipped = [bool(row.record.extra.get("flipped")) for row in window.demonstrations_of(micro_step)[0]]
            self.rows += zip([window.number] * len(weights), weights, flipped, strict=True)
            return terms

        module.loss_terms = watched  # type: ignore[method-assign]

    def quintiles(self) -> list[float]:
        """Share of flipped pairs in each fifth of the weights, lowest first, over the second half of training; ranks within a step."""
        last = max(step for step, _, _ in self.rows)
        fifths: list[list[bool]] = [[] for _ in range(5)]
        for step in range(last // 2, last + 1):
            rows = sorted((weight, flipped) for number, weight, flipped in self.rows if number == step)
            for i, (_, flipped) in enumerate(rows):
                fifths[5 * i // len(rows)].append(flipped)
        return [sum(fifth) / max(len(fifth), 1) for fifth in fifths]


def train(run: Run, task: noise_tasks.Task) -> dict[str, Any]:
    """Train once and judge."""
    pairs = flip_pairs(task.train, run.rate, how=run.flip, seed=run.seed)
    module = PreferenceModule(
        PolicySpec(model=str(task.start)),
        objective=run.objective,
        batch_size=BATCH,
        seed=run.seed,
        prompt_format=task.prompt_format,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=run.lr, weight_decay=0.0),
        eval_samples=0,
        **OBJECTIVES[run.objective],
    )
    weights, budget = Weights(module), Budget(run.seconds)
    trainer = noise_tasks.quiet_trainer(100_000, budget)
    trainer.fit(module, AapaDataModule(pairs))
    module.eval()
    result = {"steps": budget.steps, "flipped": sum(p.extra["flipped"] for p in pairs)} | pair_figures(module, task)
    return result | task.judge(module) | {"quintiles": weights.quintiles() if run.rate else None}


def pair_figures(module: PreferenceModule, task: noise_tasks.Task) -> dict[str, float]:
    """Share of clean held-out pairs that the policy ranks rightly by log-prob per token, and of those that training moved the right way."""
    start = PreferenceModule(PolicySpec(model=str(task.start)), prompt_format=task.prompt_format, objective="simpo")
    start.configure_model()
    start.eval()
    after, before = margins(module, task.test), margins(start, task.test)
    return {"accuracy": share_above(after), "learnt": share_above(after - before)}


def share_above(values: torch.Tensor) -> float:
    """Share above 0, ties counting half."""
    return float((0.5 + 0.5 * values.sign()).mean())


@torch.no_grad()
def margins(module: PreferenceModule, pairs: Sequence[Record]) -> torch.Tensor:
    """Differences of mean log-probs per token, chosen less rejected, float32 ``[B]``."""
    found: list[torch.Tensor] = []
    for start in range(0, len(pairs), 32):
        rows = [module.encode(record) for record in pairs[start : start + 32]]
        sums, lengths, _ = response_sums(module.model, responses_of(rows), module.tokenizer.pad_token_id, module.device)
        chosen, rejected = per_token(sums, lengths).chunk(2)
        found.append(chosen - rejected)
    return torch.cat(found)


def tune(tasks: Sequence[str], seconds: dict[str, float], cache: Path) -> dict[tuple[str, str], float]:
    """The learning rate of every objective for every task: the best on clean labels of another seed."""
    found: dict[tuple[str, str], float] = {}
    for task in tasks:
        for name in OBJECTIVES:
            runs = [Run(task, name, FLIPS[0], 0.0, TUNING_SEED, seconds[task], lr) for lr in LEARNING_RATES]
            scores = {run.lr: kept(run, cache)["learnt"] for run in runs}
            found[task, name] = max(scores, key=lambda lr: scores[lr])
            print(f"{task} {name:7} {scores}", flush=True)
    return found


def grid(
    tasks: Sequence[str], seeds: Sequence[int], seconds: dict[str, float], rates_of: dict[tuple[str, str], float], *, quick: bool
) -> list[Run]:
    """All runs, seed by seed; clean labels once."""
    rates, names = ((0.0, 0.4), ("dpo", "gapo")) if quick else (RATES, tuple(OBJECTIVES))
    return [
        Run(task, name, flip, rate, seed, seconds[task], rates_of[task, name])
        for seed in seeds
        for task in tasks
        for rate in rates
        for flip in (FLIPS if rate else FLIPS[:1])
        for name in names
    ]


def main() -> None:
    """Run, keep, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="+", choices=noise_tasks.TASKS, default=[*noise_tasks.TASKS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, help="CPU seconds of training for each run (default: as the task says)")
    parser.add_argument("--cache", type=Path, default=Path("runs/noise"))
    parser.add_argument("--quick", action="store_true", help="two objectives, two rates")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    parser.add_argument("--write", action="store_true", help="replace the kept result and the page")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    results = []
    seconds = {task: args.seconds or noise_tasks.SECONDS[task] for task in args.task}
    rates_of = tune(args.task, seconds, args.cache)
    for run in grid(args.task, args.seeds, seconds, rates_of, quick=args.quick):
        results.append(asdict(run) | kept(run, args.cache))
        print(f"{run.task} {run.objective:7} {run.flip:6} {run.rate:.1f} seed {run.seed}: " + noise_report.line(results[-1]), flush=True)
    found = {
        "machine": timing.machine(),
        "batch": BATCH,
        "settings": noise_tasks.settings(),
        "learning_rates": [*LEARNING_RATES],
        "runs": results,
    }
    loaded = {task: noise_tasks.load(task, args.seeds[0], args.cache) for task in args.task}
    found["pairs"] = {name: {"train": len(task.train), "test": len(task.test)} for name, task in loaded.items()}
    if args.json:
        print(json.dumps(found))
    if args.write:
        noise_report.write(found)


def kept(run: Run, cache: Path) -> dict[str, Any]:
    """The result of a run, from the cache where it is there."""
    task = noise_tasks.load(run.task, run.seed, cache)
    fingerprint = json.dumps([asdict(run), noise_tasks.settings(), str(OBJECTIVES[run.objective]), BATCH])
    path = cache / f"{hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        result = train(run, task)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
    return json.loads(path.read_text())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
