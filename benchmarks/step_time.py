"""A GRPO step beside TRL's, and the anchored step beside the bare one. Ratios first.

Run: python benchmarks/step_time.py [--quick] [--rounds 3] [--steps 6] [--json] [--write]   (needs the `test` extra: TRL)
One model (Qwen3; on a CPU hidden 256, 4 layers, vocabulary 1,024 and 4 prompts x 8 responses of exactly 64 tokens; on CUDA the shape of
Qwen3-0.6B and 32 x 8 responses of 512), the same prompts, optimiser, clipping and reward. Every run is a process of its own; the kinds take
turns, so that a slow spell of the machine touches them alike. The first steps of a run warm up; the figure is the median of all others.
No EOS ends a response: TRL is given none, ours an engine without. TRL runs without activation checkpointing, as ours does.
The anchor is a perceptron on the hidden states of the frozen initial policy. The breakdown is of the anchored step, exclusive seconds.
--write replaces benchmarks/results/step_time_{cpu,cuda}.json and docs/results/step_time.md. One thread on a CPU unless OMP_NUM_THREADS
says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timing
from step_time_report import report, write
from step_time_run import WARM_UP, prepare

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("trl", "bare", "anchored")


def run(kind: str, folder: Path, steps: int, quick: bool) -> dict[str, Any]:
    """One process: milliseconds of its steps after the first, their parts, and what it generated."""
    command = [sys.executable, str(ROOT / "benchmarks" / "step_time_run.py"), kind, str(folder), str(steps + WARM_UP), *["--quick"] * quick]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    with tempfile.TemporaryDirectory(dir=folder) as cwd:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    found["ms"] = found["ms"][WARM_UP:]
    return found


def measure(folder: Path, rounds: int, steps: int, quick: bool) -> dict[str, Any]:
    """All kinds in turn."""
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            runs[kind].append(run(kind, folder, steps, quick))
    times = {kind: [ms for one in found for ms in one["ms"]] for kind, found in runs.items()}
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    rows = {kind: sorted({tuple(one["generated"]) for one in found}) for kind, found in runs.items()}
    if len({tuple(found) for found in rows.values()}) > 1:
        raise SystemExit(f"the kinds did not generate alike: {rows}")
    return {
        "speedup_over_trl": medians["trl"] / medians["bare"],
        "anchored_over_bare": medians["anchored"] / medians["bare"],
        "ms": medians,
        "lowest_ms": {kind: min(values) for kind, values in times.items()},
        "breakdown_ms": {part: statistics.median(one["parts"][part] for one in runs["anchored"]) for part in runs["anchored"][0]["parts"]},
        "generated": rows["bare"][0],
        "rounds": rounds,
        "steps": steps,
    }


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="a model of two layers and short responses: does it run at all")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        shape = prepare(Path(name), args.quick)
        result = measure(Path(name), args.rounds, args.steps, args.quick)
    packages = {package: version(package) for package in ("lightning", "transformers", "trl")}
    result = timing.rounded(result | {"shape": shape, "machine": timing.machine(), "packages": packages})
    print(report(result))
    if args.write:
        write(result)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
