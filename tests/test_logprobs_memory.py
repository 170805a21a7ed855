"""The bench of memory: a gate before figures, one object of JSON last, a page made from the figures alone."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
memory, memory_report = map(importlib.import_module, ("memory", "memory_report"))
sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's high-water mark of memory")
def test_one_object_comes_last():
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--quick", "--json", "--repeats", "1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["chunked_over_full_memory"] > 0
    assert found["chunked_over_full_time"] > 0
    assert {"full", "chunked"} <= found["cases"][0]["paths"].keys()
    assert {"load", "versions", "threads"} <= found["machine"].keys()


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or torch.cuda.is_available(), reason="reads the kernel's high-water mark of memory"
)
def test_the_meter_sees_what_is_held_for_a_moment():
    with memory.Meter() as meter:
        held = torch.ones(64 << 18)  # 64 MiB
        del held
    assert 62 <= meter.peak / 2**20 < 80  # the kernel counts pages in batches
    with memory.Meter() as meter:
        pass
    assert meter.peak / 2**20 < 8


def test_a_wrong_path_gets_no_figures():
    functions = {"full": memory.full, "chunked": memory.chunked}
    assert memory.check(functions)["chunked"] < 1e-4
    with pytest.raises(SystemExit, match="wrong differs from float64"):
        memory.check({"wrong": lambda *inputs: memory.full(*inputs) * 1.001})


def test_the_page_comes_from_the_kept_figures():
    found = json.loads(memory_report.JSON.read_text(encoding="utf-8"))
    assert memory_report.PAGE.read_text(encoding="utf-8") == memory_report.page(found)


def test_the_kept_figures_reach_the_target():
    found = json.loads(memory_report.JSON.read_text(encoding="utf-8"))
    target = found["cases"][-1]
    assert (target["tokens"], target["vocabulary"], target["width"], target["dtype"]) == (2048, 151_936, 1024, "float32")
    assert found["chunked_over_full_memory"] == target["chunked_over_full_memory"] <= 1 / 8
    assert found["chunked_over_full_time"] == target["chunked_over_full_time"] <= 1.4
