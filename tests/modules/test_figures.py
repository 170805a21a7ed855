"""Names of logged figures, over all modules: a logger may keep each as a file, so that none can be another's folder."""

from __future__ import annotations

import pytest


def folders(names):
    """Names that are a folder of another name."""
    return sorted({name for name in names for other in names if other.startswith(f"{name}/")})


@pytest.mark.parametrize("name", ["sft", "grpo", "chord", "uniapl", "preference"])
def test_no_figure_is_a_folder_of_another(name, kit, spec):
    rows = kit.Rows()
    module = kit.make_module(name, spec, term_norms_every=1)
    kit.fit(module, kit.make_trainer(2, logger=rows, callbacks=[kit.make_anchor()], val_check_interval=1), val=kit.make_records(3))
    names = {name for _, row in rows.rows for name in row}
    assert {"train/loss", "train/losses/anchor", "train/grad_norm", "train/grad_norms/anchor"} <= names
    assert folders(names) == []


def test_a_folder_is_found():
    assert folders({"a/b", "a/b/c", "a/bc"}) == ["a/b"]
