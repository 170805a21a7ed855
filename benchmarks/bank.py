"""A bank of up to a million experts: memory while it is built, rows per second, and the time of a look-up.

Run: python benchmarks/bank.py [--rows 100000 1000000] [--lookups 20000] [--json] [--write]
Every size is built in a process of its own by `ExpertBank.build`, as `aapa bank build` does it: records made one by one, segmented, scored
in batches, written in parts, joined. The judge alone is replaced: its logits are arithmetic, since an encoder would take days for a million
texts on a CPU and its memory does not depend on their number (a last line times a real one, on the tiny Qwen3 of anchor_case.py).
Look-ups go to records drawn at random, through the memory-mapped file, and each is timed alone, on the wall. `first` is the first go, in
which the machine does what else it does and may read from disk; `best` is each record's least of five more: what a look-up itself takes.
--write keeps benchmarks/results/bank.json and makes the page
docs/results/scaling.md again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timing

ROOT = timing.ROOT
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

JSON = ROOT / "benchmarks/results/bank.json"
#: Microseconds that the median look-up may take, and the 99th percentile is held to as well.
LIMIT = 50.0
WORDS = (
    "harbor",
    "boats",
    "gulls",
    "calm",
    "water",
    "stone",
    "light",
    "morning",
    "evening",
    "quiet",
    "slow",
    "bright",
    "along",
    "under",
    "over",
    "rest",
    "call",
    "drift",
    "wait",
    "shine",
)


def make_record(number: int) -> Any:
    """One of endlessly many records, with an expert response of two to six sentences."""
    from aapa_lightning.types import Record

    rng = random.Random(number)
    sentences = [" ".join(rng.choices(WORDS, k=rng.randint(5, 14))).capitalize() + "." for _ in range(rng.randint(2, 6))]
    return Record(f"Describe scene {number} of the harbor.", experts=(" ".join(sentences),), source=f"made:{number}")


class Arithmetic:
    """A judge whose logits cost nothing."""

    needs_experts = whole_response = False

    def score(self, responses: Any, records: Any, spans: Any) -> Any:
        """A logit that tells sentences apart."""
        import torch

        return torch.tensor([(end - start) / 10 for row in spans.char_spans for start, end in row])

    def fingerprint(self) -> str:
        """Of no weights."""
        return "arithmetic"


def memory(name: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


@contextmanager
def watched() -> Iterator[list[float]]:
    """The most anonymous memory so far, in MiB, looked at every 2 ms. Mapped pages of files do not count: the system drops them at will."""
    peak, done = [memory("RssAnon")], threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], memory("RssAnon"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def build(folder: Path, rows: int) -> dict[str, Any]:
    """Build a bank here; memory above that of the same process after a bank of one part."""
    from aapa_lightning.anchor.bank import ExpertBank
    from aapa_lightning.data.records import LazyRecords

    ExpertBank.build(folder / "first", LazyRecords(make_record, 4096), Arithmetic())  # imports, pools, caches
    before, start = memory("RssAnon"), time.perf_counter()
    with watched() as peak:
        bank = ExpertBank.build(folder / "bank", LazyRecords(make_record, rows), Arithmetic())
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in (folder / "bank").iterdir())
    found = {"rows": len(bank), "seconds": seconds, "rows_per_second": rows / seconds, "file_mib": size / 2**20}
    return {**found, "peak_mib": peak[0], "above_mib": peak[0] - before, "index_mib": 16 * rows / 2**20}


def look_up(folder: Path, rows: int, count: int) -> dict[str, Any]:
    """Time look-ups of logits; every value is compared with what the judge says."""
    import torch

    from aapa_lightning.anchor.bank import ExpertBank
    from aapa_lightning.anchor.segment import Segmenter

    bank, rng, segmenter = ExpertBank(folder / "bank"), random.Random(0), Segmenter()
    records = [make_record(rng.randrange(rows)) for _ in range(count)]
    anonymous, first, best = memory("RssAnon"), [], []
    for record in records:
        start = time.perf_counter()
        found = bank.expert_logits(record)
        first.append(1e6 * (time.perf_counter() - start))
        expected = torch.tensor([(b - a) / 10 for a, b in segmenter(record.experts[0])])
        if found is None or not torch.equal(found, expected):
            raise SystemExit(f"{record.source}: the bank says {found}, the judge {expected}")
    for record in records:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            bank.expert_logits(record)
            times.append(1e6 * (time.perf_counter() - start))
        best.append(min(times))
    out = {name: {"p50_us": percentile(us, 50), "p99_us": percentile(us, 99)} for name, us in (("first", first), ("best", best))}
    start = time.perf_counter()
    ExpertBank(folder / "bank")
    return {**out, "open_ms": 1e3 * (time.perf_counter() - start), "grown_mib": memory("RssAnon") - anonymous, "lookups": count}


def percentile(values: list[float], share: int) -> float:
    """The value that ``share`` per cent do not exceed."""
    return sorted(values)[min(len(values) * share // 100, len(values) - 1)]


def encoded(rows: int) -> dict[str, Any]:
    """Rows a second with a real judge, whose encoder is a tiny Qwen3."""
    from anchor_case import make_anchor, write_policy

    from aapa_lightning.anchor.bank import ExpertBank

    with tempfile.TemporaryDirectory() as name:
        judge = make_anchor(write_policy(Path(name) / "policy")).discriminator
        records = [make_record(i) for i in range(rows)]
        start = time.perf_counter()
        ExpertBank.build(Path(name) / "bank", records, judge)
        return {"rows": rows, "rows_per_second": rows / (time.perf_counter() - start)}


def apart(*words: str) -> dict[str, Any]:
    """Run a part of this script in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{words} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(sizes: list[int], lookups: int) -> dict[str, Any]:
    """Every size, then a real judge."""
    cases = []
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            built = apart("--part", "build", "--folder", folder, "--rows", str(rows))
            cases.append({**built, "lookup": apart("--part", "lookup", "--folder", folder, "--rows", str(rows), "--lookups", str(lookups))})
        print(line(cases[-1]), flush=True)
    first, last = cases[0], cases[-1]
    growth = (last["above_mib"] - first["above_mib"]) * 2**20 / max(last["rows"] - first["rows"], 1)
    return {
        "lookup_p50_us": last["lookup"]["best"]["p50_us"],
        "lookup_p99_us": last["lookup"]["best"]["p99_us"],
        "bytes_per_row": growth,
        "cases": cases,
        "encoded": encoded(512),
        "machine": timing.machine(),
    }


def line(case: dict[str, Any]) -> str:
    """One size."""
    best, first = case["lookup"]["best"], case["lookup"]["first"]
    return (
        f"look-up {best['p50_us'] / LIMIT:.2f} of {LIMIT:.0f} us (p50 {best['p50_us']:.1f}, p99 {best['p99_us']:.1f}; "
        f"first go {first['p50_us']:.1f}, {first['p99_us']:.1f}) | {case['rows']:,} rows: built with {case['above_mib']:.0f} MiB "
        f"(index {case['index_mib']:.0f}), {case['rows_per_second']:,.0f} rows/s, file {case['file_mib']:,.0f} MiB"
    )


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--lookups", type=int, default=20_000)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--part", choices=["build", "lookup"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        found = build(args.folder, args.rows[0]) if args.part == "build" else look_up(args.folder, args.rows[0], args.lookups)
        print(json.dumps(found))
        return
    found = timing.rounded(measure(args.rows, args.lookups))
    slow = [name for name in ("lookup_p50_us", "lookup_p99_us") if found[name] > LIMIT]
    print(f"encoder included: {found['encoded']['rows_per_second']:.0f} rows/s | memory grows by {found['bytes_per_row']:.1f} bytes a row")
    print(f"above {LIMIT:.0f} us: {', '.join(slow) or 'nothing'}")
    if args.write:
        from scaling_report import write_page

        JSON.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_page()
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
