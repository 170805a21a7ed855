"""``import aapa_lightning`` and ``aapa --help`` stay light."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import aapa_lightning


def modules_after(statement: str) -> set[str]:
    """Top-level modules loaded by a fresh interpreter."""
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(json.loads(output.splitlines()[-1]))


def test_importing_the_package_loads_nothing_that_lightning_does_not():
    assert modules_after("import aapa_lightning") - modules_after("import lightning") == {"aapa_lightning"}


def test_help_loads_no_framework():
    loaded = modules_after("from aapa_lightning.cli import main\nassert main(['--help']) == 0")
    assert not loaded & {"torch", "lightning", "transformers", "datasets", "pandas", "pyarrow", "numpy"}


@pytest.mark.parametrize("name", aapa_lightning.__all__)
def test_public_names_resolve(name):
    assert getattr(aapa_lightning, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Nothing"):
        aapa_lightning.Nothing  # noqa: B018
