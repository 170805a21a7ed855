"""Time of ``aapa --help`` beside ``import lightning``, each a fresh process; prints JSON, ratio first.

Run: python benchmarks/startup.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

STATEMENTS = {
    "import_lightning": "import lightning",
    "aapa_help": "from aapa_lightning.cli import main; main(['--help'])",
    "import_aapa_lightning": "import aapa_lightning",
}


def seconds(statement: str) -> float:
    """Wall seconds of a fresh interpreter that runs a statement."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main(repeats: int = 5) -> None:
    """Interleave the statements, so that a slow spell of the machine touches them alike, and print medians."""
    times: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(repeats):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = {name: medians[name] / medians["import_lightning"] for name in STATEMENTS if name != "import_lightning"}
    print(json.dumps({"ratio": ratio, "seconds": medians, "repeats": repeats, "python": sys.version.split()[0]}, indent=2))


if __name__ == "__main__":
    main()
