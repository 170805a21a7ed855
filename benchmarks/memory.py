"""Memory and time of token log-probs at large vocabularies: full logits, streamed, TRL's kernel, liger-kernel where it is installed.

Run: OMP_NUM_THREADS=1 python benchmarks/memory.py [--quick | --target] [--repeats 3] [--json] [--write]
From hidden states [M, H] and a head [V, H]: log-probs of M tokens, then gradients of both by random upstream gradients. The paths take
turns in one process. Memory on a CPU: the kernel's high-water mark of resident memory (VmHWM, reset before every run, after the allocator
has returned what it held) above what was resident, less the size of the two gradients; on CUDA the allocator's own peak. Time: seconds of
the process on a CPU (a share of a busy machine changes them little), of the wall around a synchronised device on CUDA. Linux. The target's
full path needs 6 GB.
--write replaces benchmarks/results/memory.json and docs/results/memory.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timing
import torch
from memory_report import report, write
from torch import Tensor

from aapa_lightning.logprobs.chunked import chunked_logprobs
from aapa_lightning.logprobs.tokens import token_logprobs

Path_ = Callable[[Tensor, Tensor, Tensor], Tensor]
TRL_CHUNK = 32_768  # of TRL's trainers, trl/trainer/utils.py


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison."""

    tokens: int
    vocabulary: int
    width: int


TARGET = Case(2048, 151_936, 1024)
CASES = [
    *(Case(512, vocabulary, 256) for vocabulary in (4096, 8192, 16_384, 32_768, 65_536, 151_936)),
    *(Case(tokens, 32_768, 256) for tokens in (128, 2048, 8192)),
    TARGET,
]
QUICK = Case(64, 4096, 32)


def full(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Logits of all tokens, then log-probs."""
    return token_logprobs(hidden @ weight.t(), ids)[0]


def chunked(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Ours."""
    return chunked_logprobs(hidden, weight, ids)[0]


def paths() -> dict[str, Path_]:
    """The rivals that are installed."""
    found: dict[str, Path_] = {"full": full, "chunked": chunked}
    if find_spec("trl"):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        found["trl"] = lambda hidden, weight, ids: ChunkedLogProbFunction.apply(hidden, weight, None, ids, 1.0, TRL_CHUNK, None, 1.0, ())[0]
    if find_spec("liger_kernel"):
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Liger

        found["liger"] = lambda hidden, weight, ids: -Liger.apply(hidden, weight, ids)
    return found


def inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, ids, upstream gradients; logits have a standard deviation of 1."""
    torch.manual_seed(0)
    hidden = torch.randn(case.tokens, case.width, dtype=dtype, device=device).requires_grad_()
    weight = (torch.randn(case.vocabulary, case.width, dtype=dtype, device=device) / case.width**0.5).requires_grad_()
    return hidden, weight, torch.randint(case.vocabulary, (case.tokens,), device=device), torch.randn(case.tokens, device=device)


def check(functions: dict[str, Path_]) -> dict[str, float]:
    """Largest difference of values and gradients from float64; no figures of a path that computes something else."""
    hidden, weight, ids, upstream = inputs(Case(40, 5000, 64), torch.float32, "cuda" if timing.cuda() else "cpu")

    def outputs(path: Path_, *leaves: Tensor) -> list[Tensor]:
        logprobs = path(*leaves, ids)
        return [logprobs, *torch.autograd.grad(logprobs, leaves, upstream.to(logprobs.dtype))]

    right = outputs(full, hidden.double(), weight.double())
    errors = {}
    for name, path in functions.items():
        made = outputs(path, hidden, weight)
        errors[name] = max(float((mine.double() - true).abs().max().detach()) for mine, true in zip(made, right, strict=True))
        if errors[name] > 1e-4:
            sys.exit(f"{name} differs from float64 by {errors[name]:.3g}, more than 1e-4: no figures")
    return errors


class Meter:
    """Peak memory above what is held before, bytes, and seconds."""

    def __enter__(self) -> Meter:
        gc.collect()
        if timing.cuda():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        if timing.cuda():
            torch.cuda.synchronize()
        self.wall = time.perf_counter() - self._wall
        self.seconds = self.wall if timing.cuda() else time.process_time() - self._cpu
        self.peak = (torch.cuda.max_memory_allocated() if timing.cuda() else _status("VmHWM")) - self._before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def measure(case: Case, functions: dict[str, Path_], repeats: int) -> dict[str, Any]:
    """All paths on one case, in turns, after a small warm-up of each."""
    dtype, device = (torch.bfloat16, "cuda") if timing.cuda() else (torch.float32, "cpu")
    hidden, weight, ids, upstream = inputs(case, dtype, device)
    gradients = hidden.nbytes + weight.nbytes
    for path in functions.values():
        path(hidden[:8], weight[:64], ids[:8] % 64).sum().backward()
    hidden.grad = weight.grad = None
    found: dict[str, list[Meter]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, path in functions.items():
            with Meter() as meter:
                logprobs = path(hidden, weight, ids)
                made = torch.autograd.grad(logprobs, (hidden, weight), upstream.to(logprobs.dtype))
            del made, logprobs
            found[name].append(meter)
    rows = {name: _row(meters, gradients) for name, meters in found.items()}
    ratios = {
        f"chunked_over_{name}_{key}": rows["chunked"][key] / rows[name][key]
        for name in rows
        for key in ("memory", "time")
        if name != "chunked"
    }
    return {**asdict(case), "dtype": str(dtype).removeprefix("torch."), "gradients_mib": gradients / 2**20, "paths": rows, **ratios}


def _row(meters: list[Meter], gradients: int) -> dict[str, Any]:
    peak = max(meter.peak for meter in meters)
    seconds = [meter.seconds for meter in meters]
    return {
        "memory": max(peak - gradients, 1) / 2**20,
        "peak_mib": peak / 2**20,
        "time": min(seconds),
        "median_time": statistics.median(seconds),
        "wall": min(meter.wall for meter in meters),
        "repeats": len(meters),
    }


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--target", action="store_true", help=f"only {TARGET}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--write", action="store_true", help="replace the kept figures and the table")
    args = parser.parse_args()
    functions = paths()
    found: dict[str, Any] = {"machine": timing.machine(), "errors": check(functions), "cases": []}
    for case in [QUICK] if args.quick else [TARGET] if args.target else CASES:
        found["cases"].append(measure(case, functions, args.repeats))
        print(report(found["cases"][-1]), flush=True)
    last = found["cases"][-1]
    found |= {"load_at_the_end": os.getloadavg()[0], "chunked_over_full_memory": last["chunked_over_full_memory"]}
    found["chunked_over_full_time"] = last["chunked_over_full_time"]
    if args.write:
        write(found)
    if args.json:
        print(json.dumps(timing.rounded(found)))


if __name__ == "__main__":
    main()
