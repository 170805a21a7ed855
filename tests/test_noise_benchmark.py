"""The bench of flipped labels: its weights, its tasks' pairs and its page, without training."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aapa_lightning.data.synthetic import generate_records, judge
from aapa_lightning.types import LossOutputs, Record

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))
noise, noise_report, noise_tasks = map(importlib.import_module, ("noise", "noise_report", "noise_tasks"))
sys.path.remove(str(FOLDER))


def test_quintiles_rank_within_a_step_and_leave_the_first_half_out():
    def loss_terms(window, micro_step):
        return [SimpleNamespace(outputs=LossOutputs(torch.zeros(5, 1), {"weight": weights[window.number][:, None]}))]

    module = SimpleNamespace(loss_terms=loss_terms)
    watched = noise.Weights(module)
    weights = {0: torch.arange(5.0), 1: torch.arange(5.0), 2: 100 - torch.arange(5.0)}
    for number in range(3):
        flags = [number > 0 and i == 0 for i in range(5)]  # the lightest of step 1, the heaviest of step 2; none of step 0
        rows = [SimpleNamespace(record=Record("x", extra={"flipped": flag})) for flag in flags]
        module.loss_terms(SimpleNamespace(number=number, demonstrations_of=lambda micro_step, rows=rows: (rows, None)), 0)
    assert watched.quintiles() == [0.5, 0.0, 0.0, 0.0, 0.5]


def test_pairs_of_the_world_are_in_their_true_order():
    (record,) = generate_records(1, 0, "test")
    expert = record.experts[0]
    pair = noise_tasks._world_pair(record, ["", "Boats.", expert])
    assert (judge(record, pair.chosen).true_success, pair.rejected) == (True, "Boats.")
    assert noise_tasks._world_pair(record, ["Boats."]).chosen == expert
    assert noise_tasks._world_pair(record, [expert, expert]) is None


def test_pairs_of_verdicts_hold_one_that_follows_and_one_that_does_not():
    found = [("a", True), ("b", False), ("c", False), ("d", True)]
    pairs = noise_tasks._verdict_pairs(Record("x", key="1"), found, 0)
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {("a", "b"), ("a", "c"), ("d", "b"), ("d", "c")}


def run(objective, flip, rate, seed, accuracy, quintiles=None):
    row = {"task": "world", "objective": objective, "flip": flip, "rate": rate, "seed": seed, "seconds": 8.0, "lr": 1e-4}
    return row | {"steps": 10, "accuracy": accuracy, "learnt": 0.5, "true_success": accuracy / 2, "flipped": 3, "quintiles": quintiles}


@pytest.fixture
def found():
    runs = [run("dpo", "random", 0.0, seed, 0.7 + seed / 100) for seed in (1, 2)]
    runs += [run("gapo", "length", 0.4, seed, 0.6, [0.5, 0.4, 0.4, 0.4, 0.3]) for seed in (1, 2)]
    machine = {"device": "a machine", "versions": {"torch": "2.13.0"}}
    return {"machine": machine, "batch": 16, "learning_rates": [1e-4], "pairs": {"world": {"train": 9, "test": 3}}, "runs": runs}


def test_the_page_shows_means_ranges_and_quintiles(found):
    page = noise_report.page(found)
    assert "| dpo | 0.715 (0.710 to 0.720) |  |" in page  # clean labels stand in both tables
    assert page.count("| dpo | 0.715") == 2
    assert "**Learnt, random flips**" in page
    assert "| gapo |  | 0.600 (0.600 to 0.600) |" in page
    assert "| world, length | gapo | 40% | 0.500 | 0.400 | 0.400 | 0.400 | 0.300 | +0.200 |" in page
    assert all(len(line) <= 160 for line in page.splitlines())


def test_the_grid_trains_on_clean_labels_once_and_on_all_noise():
    rates = dict.fromkeys([("world", name) for name in noise.OBJECTIVES], 1e-4)
    runs = noise.grid(["world"], [1], {"world": 8.0}, rates, quick=False)
    assert len(runs) == len(set(runs)) == len(noise.OBJECTIVES) * (1 + 2 * 4)
