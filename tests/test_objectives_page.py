"""The page of objectives lists every row of the table, with what it needs and its defaults."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from aapa_lightning.objectives.preference import PREFERENCES

PAGE = Path(__file__).parents[1] / "docs" / "objectives.md"


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
