"""The quickstart over several seeds: runs the recipe for each, keeps the figures as JSON, and writes the README's table.

Run: python benchmarks/quickstart_seeds.py [--seeds 1 2 3] [--jobs 2]
The README shows the first seed's row with the lowest and highest of all seeds below it. `--table` only writes the table again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quickstart.json"
MARKS = ("<!-- quickstart table: python benchmarks/quickstart_seeds.py -->", "<!-- end -->")
ROWS = {"sft": "SFT (the start)", "grpo": "GRPO", "grpo_kl": "GRPO + KL", "aapa_grpo": "**AAPA-GRPO**"}
COLUMNS = {
    "constraint_accuracy": ("constraint accuracy", 3),
    "well_formedness": ("well-formedness", 3),
    "true_success": ("**true success**", 3),
    "expert_logprob": ("expert log-prob, nats per token", 2),
    "length_distance": ("length distance, tokens", 1),
    "seconds": ("seconds", 0),
}
Summary = dict[str, dict[str, float]]


def run(seed: int, jobs: int) -> Summary:
    """One seed, in a folder of its own; finished stages are not repeated."""
    folder = ROOT / "runs" / f"quickstart-seed{seed}"
    command = [sys.executable, "-m", "aapa_lightning.cli", "recipe", str(ROOT / "configs/recipes/quickstart.yaml")]
    command += ["--set", f"run_dir={folder}", "--set", f"vars.seed={seed}"]
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // jobs, 1))}
    with open(ROOT / "runs" / f"quickstart-seed{seed}.log", "w", encoding="utf-8") as log:
        subprocess.run(command, cwd=ROOT, env=os.environ | threads, stdout=log, stderr=log, check=True)
    return json.loads((folder / "summary.json").read_text())


def table(seeds: dict[str, Summary]) -> str:
    """The README's table: the first seed, and the range over all of them."""
    first, *_ = seeds.values()
    names = ", ".join(seeds)
    lines = ["| | " + " | ".join(title for title, _ in COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row, title in ROWS.items():
        cells = []
        for column, (_, digits) in COLUMNS.items():
            values = [summary[row][column] for summary in seeds.values()]
            several = len(seeds) > 1 and column != "seconds"  # seeds that ran side by side took longer
            spread = f" <br><sub>{min(values):.{digits}f} to {max(values):.{digits}f}</sub>" if several else ""
            cells.append(f"{first[row][column]:.{digits}f}{spread}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(
        [*lines, "", f"Seed {next(iter(seeds))}; below it the range over seeds {names}. Higher is better but for the last two columns."]
    )


def write_table(seeds: dict[str, Summary]) -> None:
    """Put the table between the README's marks."""
    path = ROOT / "README.md"
    before, rest = path.read_text(encoding="utf-8").split(MARKS[0])
    path.write_text(before + MARKS[0] + "\n" + table(seeds) + "\n" + MARKS[1] + rest.split(MARKS[1])[1], encoding="utf-8")


def main() -> None:
    """Run, keep, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time; they share the cores, and `seconds` shows it")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        (ROOT / "runs").mkdir(exist_ok=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            found = dict(zip(map(str, args.seeds), pool.map(lambda seed: run(seed, args.jobs), args.seeds), strict=True))
        result = {
            "seeds": found,
            "jobs": args.jobs,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "versions": {package: version(package) for package in ("torch", "lightning", "transformers")},
            "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip(),  # noqa: S607 - git from the PATH
        }
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    write_table(json.loads(RESULTS.read_text(encoding="utf-8"))["seeds"])


if __name__ == "__main__":
    main()
