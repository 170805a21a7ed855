"""benchmarks/packing.py: no figures of another computation, and one JSON object with the ratio last."""

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))
bench = importlib.import_module("packing")
sys.path.remove(str(FOLDER))
del sys.modules["packing"]  # a common name


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "SIZES", bench.SIZES | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8})
    monkeypatch.setattr(bench, "ROWS", 4)


def test_the_last_line_is_the_result(small, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["packing.py", "--repeats", "1", "--json"])
    bench.main()
    *page, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert [case["spread"] for case in found["cases"]] == [0, 0.5, 1]
    assert found["cases"][0]["packed_over_padded_predicted"] == 1
    assert 0 < found["packed_over_padded_predicted"] < 1
    assert found["packed_over_padded_time"] == found["cases"][-1]["packed_over_padded_time"] > 0
    for case in found["cases"]:
        padded = case["paths"]["padded"]
        assert case["padding_share"] == pytest.approx(1 - case["tokens"] / (padded["rows"] * padded["width"]), abs=1e-3)
        assert case["paths"]["one_row"]["width"] == case["tokens"]
    assert len([row for row in page if row.startswith("| ")]) == 4


def test_no_figures_of_another_computation(small, monkeypatch):
    model, batch = bench.make_model("cpu"), bench.make_batch(1.0, 3, "cpu")
    step = bench.step
    right = bench.check(model, batch, ["padded", "packed", "one_row"])
    assert max(right.values()) < 1e-4
    offsets = iter((0, 1e-3))
    monkeypatch.setattr(bench, "step", lambda *args: step(*args) + next(offsets))
    with pytest.raises(SystemExit, match="packed differs from padded"):
        bench.check(model, batch, ["padded", "packed"])


def test_the_kept_page_is_that_of_the_kept_figures():
    kept = json.loads((FOLDER / "results" / "packing.json").read_text(encoding="utf-8"))
    assert (FOLDER.parent / "docs" / "results" / "packing.md").read_text(encoding="utf-8") == bench.report(kept)
