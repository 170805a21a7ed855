"""What the anchor costs against responses, tokens, group size and experts; over one and two processes; and within a GRPO step.

Run: OMP_NUM_THREADS=1 python benchmarks/scaling.py [--quick] [--only PART ...] [--json] [--write]   (about 10 minutes)
Every part runs in a process of its own (scaling_runs.py), on a tiny Qwen3 (hidden 256, 4 layers, vocabulary 1,024) whose initial weights
are the anchor's frozen encoder. Curves are seconds of the process, the least of several calls; a fitted exponent is the slope of the
logarithms, 1 is linear. Steps and weak scaling are on the wall, in turns. Weak scaling gives every process the same share: alone, two that
do not talk (what the machine allows), two gloo ranks that sum as training does. `precision` needs AAPA_DATA and the `test` extra.
--write replaces benchmarks/results/scaling.json and docs/results/scaling.md (with --only: those parts, the others stay as they are).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import timing

ROOT = timing.ROOT
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
import scaling_report  # noqa: E402 - after the path

CURVES = ("signal", "advantages", "text")
PARTS = (*CURVES, "step", "batching", "weak", "precision")
#: An exponent up to this counts as linear: the spread of runs of linear code on a shared machine, and the encoder's attention, quadratic
#: in the length but for its small share.
LIMIT = 1.15


def start(part: str, policy: str, quick: bool, **environment: str) -> subprocess.Popen[str]:
    """A part in a process of its own."""
    script = "scaling_precision.py" if part == "precision" else "scaling_runs.py"
    command = [sys.executable, str(ROOT / "benchmarks" / script), *([] if part == "precision" else [part, policy]), *["--quick"] * quick]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What it found."""
    out, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args} failed:\n{errors[-3000:]}")
    return json.loads(out.splitlines()[-1])


def exponent(points: list[dict[str, Any]], key: str) -> float:
    """Slope of the logarithms, by least squares."""
    x, y = ([math.log(point[name]) for point in points] for name in ("size", key))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def last_exponent(points: list[dict[str, Any]], key: str) -> float:
    """Slope between the two largest sizes, where fixed costs hide least."""
    return exponent(points[-2:], key)


def curves_of(part: str, policy: str, quick: bool) -> dict[str, Any]:
    """Curves with their exponents."""
    found = finish(start(part, policy, quick))
    return {
        name: {"exponent": exponent(p, "seconds"), "last_exponent": last_exponent(p, "seconds"), "points": p} for name, p in found.items()
    }


def weak(policy: str, quick: bool) -> dict[str, Any]:
    """One rank, two that do not talk, two that sum: the slower rank's best call, the best of two goes that take turns."""
    found: dict[str, dict[str, float]] = {}
    for _ in range(1 if quick else 2):
        for name, world, coupled in (("one", 1, "0"), ("two apart", 2, "0"), ("two together", 2, "1")):
            with tempfile.TemporaryDirectory() as folder:
                shared = {"WORLD_SIZE": str(world), "COUPLED": coupled, "STORE": str(Path(folder) / "store")}
                ranks = [start("weak", policy, quick, RANK=str(rank), **shared) for rank in range(world)]
                results = [finish(process) for process in ranks]
            slowest = {call: max(one[call] for one in results) for call in results[0]}
            found[name] = {call: min(value, found.get(name, slowest)[call]) for call, value in slowest.items()}
    one, apart, together = (found[name] for name in ("one", "two apart", "two together"))
    ratios = {}
    for call in ("signal", "step"):
        ratios[f"{call}_work"] = together[f"{call}, work"] / one[f"{call}, work"]
        ratios[f"{call}_efficiency"] = one[call] / together[call]
        ratios[f"{call}_of_what_the_machine_allows"] = apart[call] / together[call]
    return {**ratios, "seconds": found, "load": round(os.getloadavg()[0], 1)}


def measure(parts: list[str], quick: bool) -> dict[str, Any]:
    """Some parts, one after the other."""
    from anchor_case import write_policy

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        policy = write_policy(Path(folder) / "policy")
        for part in parts:
            if part in CURVES:
                new: dict[str, Any] = {"curves": curves_of(part, policy, quick)}
                found.setdefault("curves", {}).update(new["curves"])
            else:
                new = {part: weak(policy, quick) if part == "weak" else finish(start(part, policy, quick))}
                found |= new
            print("\n".join(scaling_report.lines(new, LIMIT)), flush=True)
    return found


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--write", action="store_true", help="replace the kept result and its page")
    args = parser.parse_args()
    if args.quick and args.write:
        parser.error("--write keeps a full run: leave out --quick")
    found = timing.rounded(measure(args.only, args.quick)) | {"limit": LIMIT, "machine": timing.machine()}
    curves = found.get("curves", {})
    found["largest_exponent"] = max((curve["exponent"] for curve in curves.values()), default=None)
    worse = [name for name, curve in curves.items() if curve["exponent"] > LIMIT]
    print(f"worse than linear (exponent above {LIMIT}): {', '.join(worse) or 'nothing'}")
    if args.write:
        found = scaling_report.write(found)
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
