"""The step and rollout benchmarks run, the kinds generate alike, and their pages come from the JSON alone."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
rollouts, step_time_report = map(importlib.import_module, ("rollouts", "step_time_report"))
sys.path.remove(str(ROOT / "benchmarks"))


def run(script: str, *words: str) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--quick", "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_quick_run_of_steps_gives_ratios_and_parts():
    pytest.importorskip("trl", reason="TRL is the rival; it comes with the extra `test`")
    found = run("step_time.py", "--rounds=1", "--steps=2")
    assert found["speedup_over_trl"] == pytest.approx(found["ms"]["trl"] / found["ms"]["bare"], rel=1e-2)
    assert found["anchored_over_bare"] == pytest.approx(found["ms"]["anchored"] / found["ms"]["bare"], rel=1e-2)
    assert found["generated"] == [4, 8]
    assert {"generate", "reward", "anchor", "log-probs", "backward", "optimiser and rest"} <= found["breakdown_ms"].keys()
    assert sum(found["breakdown_ms"].values()) == pytest.approx(found["ms"]["anchored"], rel=0.5)


@pytest.mark.slow
def test_a_quick_run_of_engines_draws_what_was_asked():
    found = run("rollouts.py", "--repeats=1")
    assert set(found["seconds"]["equal"]) == set(rollouts.ENGINES)
    assert set(found["seconds"]["mixed"]) == set(rollouts.ENGINES) - {"continuous"}


@pytest.mark.parametrize("name", ["rollouts", "step_time"])
def test_the_page_is_made_of_the_kept_figures(name, monkeypatch, tmp_path):
    module = {"rollouts": rollouts, "step_time": step_time_report}[name]
    kept = json.loads(module.path("cpu").read_text(encoding="utf-8"))
    page = module.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(module, "path", lambda kind: tmp_path / f"{kind}.json")
    monkeypatch.setattr(module, "PAGE", tmp_path / "page.md")
    module.write(kept)
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page
