"""The examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [(ROOT, "aapa_lightning"), (ROOT / "kernels", "aapa_kernels")]
MODULES = [
    ".".join(path.relative_to(root).with_suffix("").parts)
    for root, package in SOURCES
    for path in sorted((root / package).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


def test_there_are_some():
    assert "aapa_lightning.objectives.grpo" in MODULES


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
