"""The page of objectives lists every row of the table, with what it needs and its defaults."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torch

from aapa_lightning.objectives.preference import PREFERENCES
from aapa_lightning.types import LabelLossInputs, PairLossInputs

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "objectives.md"


def rows() -> dict[str, list[str]]:
    table = PAGE.read_text(encoding="utf-8").split("<!-- objectives -->")[1].split("<!-- end -->")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()[2:]]
    return {row[0].strip("`"): row for row in cells}


def test_every_objective_has_its_row():
    assert list(rows()) != []
    assert set(rows()) == set(PREFERENCES)


def test_what_a_row_needs_is_what_the_table_says():
    for name, (_, _, _, reference, batch, when, source) in rows().items():
        objective = PREFERENCES[name]
        assert (reference, batch) == ("yes" if objective.needs_reference else "no", "yes" if objective.batch_statistics else ""), name
        assert when
        assert source


def test_defaults_are_the_functions_own():
    for name, row in rows().items():
        objective = PREFERENCES[name]
        own = {p.name: p.default for p in inspect.signature(objective.loss).parameters.values() if p.kind is p.KEYWORD_ONLY}
        own |= {**objective.options, "sft_weight": objective.sft_weight}
        for option, value in re.findall(r"(\w+)`? ([\d.]+)", row[2]):
            if option in own:
                assert own[option] == float(value), (name, option)
        assert ("`sft_weight`" in row[2]) == bool(objective.sft_weight), name
        assert not own.get("beta") or f"beta {own['beta']:g}" in row[2] or name in ("cdpo", "rdpo", "ropo", "sympo", "dr_dpo"), name


def test_the_glossary_names_what_preference_objectives_log():
    row, one = -torch.ones(1), torch.ones(1, dtype=torch.int64)
    pair, label = PairLossInputs(row, row, one, one, row, row, row), LabelLossInputs(row, row, one.bool(), row)
    logged = {
        f"preference/{name}" for objective in PREFERENCES.values() for name in objective.loss(label if objective.labels else pair).metrics
    }
    table = (DOCS / "training.md").read_text(encoding="utf-8").split("<!-- metrics: preference -->")[1].split("\n\n")[0]
    named = {name for line in table.splitlines() for name in re.findall(r"`([^`]+)`", line.split("|")[1] if "|" in line else "")}
    assert {name for name in named if name.startswith("preference/")} == logged
