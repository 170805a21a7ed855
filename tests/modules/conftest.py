"""Fixtures of the module tests: ``kit`` builds tiny runs, ``spec`` is their policy."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from aapa_lightning.policy import PolicySpec


@pytest.fixture(scope="session")
def kit():
    """The builders of ``kit.py``, which worker processes import too."""
    source = importlib.util.spec_from_file_location("modules_kit", Path(__file__).with_name("kit.py"))
    module = importlib.util.module_from_spec(source)
    sys.modules["modules_kit"] = module
    source.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def spec(tiny_model_dir):
    """The policy in every test."""
    return PolicySpec(str(tiny_model_dir))


@pytest.fixture(scope="session")
def same():
    """Assert that two state dictionaries are equal bit for bit (or to ``atol``)."""

    def check(a, b, atol=0.0):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")

    return check


@pytest.fixture(scope="session")
def differ():
    """Whether two state dictionaries differ anywhere."""
    return lambda a, b: any(not torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """Lightning's chatter would bury a failure's own output."""
    import logging

    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        caplog.set_level(logging.WARNING, logger=name)
