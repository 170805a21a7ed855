"""The benches of the anchor's cost: their fits, their inputs, what they check, and pages made from the kept figures alone."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from aapa_lightning.anchor.bank import ExpertBank
from aapa_lightning.anchor.signal import AnchorOptions, build_signal

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
anchor_case, bank, scaling, scaling_precision, scaling_report, scaling_runs = map(
    importlib.import_module, ("anchor_case", "bank", "scaling", "scaling_precision", "scaling_report", "scaling_runs")
)
sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_exponents_are_slopes(power):
    points = [{"size": size, "seconds": 3e-4 * size**power} for size in (8, 64, 100)]
    assert scaling.exponent(points, "seconds") == pytest.approx(power)
    bent = [{"size": size, "seconds": seconds} for size, seconds in ((1, 1), (10, 10), (100, 1000))]
    assert scaling.exponent(bent, "seconds") == pytest.approx(1.5)
    assert scaling.last_exponent(bent, "seconds") == pytest.approx(2)


def test_made_up_rollouts_are_sound():
    logits, spans, rollouts = scaling_runs.fixed_logits(3, 4, 20)
    assert len(rollouts) == 12
    assert spans.token_counts.tolist() == [8, 8, 4] * 12
    assert spans.response_index.tolist() == [i for i in range(12) for _ in range(3)]
    signal = build_signal(logits, spans, rollouts, AnchorOptions())
    assert bool((signal.advantages != 0).any(-1).all())
    assert {name: value for name, value in scaling_runs.take_time(lambda: None, 2).items() if value < 0} == {}


def test_batches_as_they_come():
    assert list(scaling_runs.by_rows(2)([4, 0, 3], {}, 99)) == [[4, 0], [3]]


def test_a_step_learns_and_the_anchor_joins_it(tmp_path):
    case = anchor_case.Case.make(anchor_case.write_policy(tmp_path))
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    assert case.rollouts(2, 2, 8).response_mask.all()
    assert abs(case.step(2, 4, 8)) < 1  # on policy and with equal lengths it is all but 0, whatever its gradient
    bare = case.model.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in bare.items())
    again = anchor_case.Case.make(str(tmp_path))
    anchor = anchor_case.make_anchor(str(tmp_path))
    seen = []
    again.step(2, 4, 8, anchor, over_ranks=lambda value: seen.append(value.shape) or value)
    assert any(not torch.equal(value, bare[name]) for name, value in again.model.state_dict().items())
    assert anchor.windows == 1
    assert max(shape.numel() for shape in seen) == sum(weight.numel() for weight in again.model.parameters())


def test_the_bank_bench_holds_every_look_up_to_its_judge(tmp_path):
    found = bank.build(tmp_path, 700)
    assert found["rows"] == 700
    assert found["peak_mib"] > 0
    figures = bank.look_up(tmp_path, 700, 50)
    assert 0 < figures["best"]["p50_us"] <= figures["first"]["p99_us"]
    assert "700 rows" in bank.line({**found, "lookup": figures})

    class Twice(bank.Arithmetic):
        def score(self, *args):
            return 2 * super().score(*args)

    ExpertBank.build(tmp_path / "bank", [bank.make_record(i) for i in range(700)], Twice())
    with pytest.raises(SystemExit, match="the bank says"):
        bank.look_up(tmp_path, 700, 3)


def test_auroc_by_hand():
    assert scaling_precision.auroc(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0])) == (0.5 + 0 + 1 + 1) / 4
    assert scaling_precision.response_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])).tolist() == [2, 5]


def test_the_page_is_made_from_what_is_kept():
    found, experts = (json.loads(path.read_text(encoding="utf-8")) for path in (scaling_report.JSON, scaling_report.BANK))
    assert scaling_report.PAGE.read_text(encoding="utf-8") == scaling_report.page(found, experts)
    assert len(scaling_report.lines(found, found["limit"])) >= len(found["curves"]) + 4


def test_kept_figures_hold_what_is_promised():
    found, experts = (json.loads(path.read_text(encoding="utf-8")) for path in (scaling_report.JSON, scaling_report.BANK))
    assert found["largest_exponent"] == max(curve["exponent"] for curve in found["curves"].values()) <= found["limit"]
    assert experts["cases"][-1]["rows"] == 1_000_000
    assert max(experts["lookup_p50_us"], experts["lookup_p99_us"]) < bank.LIMIT
    assert experts["bytes_per_row"] < 32
    worst = max(
        abs(found["precision"]["bfloat16"][name] - found["precision"]["float32"][name]) for name in ("sentence_auroc", "response_auroc")
    )
    assert worst < 0.005


def test_parts_are_kept_when_others_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling_report, "JSON", tmp_path / "scaling.json")
    monkeypatch.setattr(scaling_report, "write_page", lambda: None)
    scaling_report.write({"curves": {"a": {"exponent": 1.0}}, "step": 1})
    kept = scaling_report.write({"curves": {"b": {"exponent": 0.5}}, "weak": 2})
    assert kept == {"curves": {"a": {"exponent": 1.0}, "b": {"exponent": 0.5}}, "step": 1, "weak": 2, "largest_exponent": 1.0}
    assert json.loads((tmp_path / "scaling.json").read_text()) == kept
