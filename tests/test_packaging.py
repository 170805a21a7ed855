"""What a newcomer installs: the metadata, the pins and the make targets."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), (
        "every line is name==version, without a local suffix"
    )
    return {canonical(name): Version(version) for name, version in (line.split("==") for line in lines)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(*extras: str) -> list[Requirement]:
    found = [Requirement(text) for extra in extras for text in PROJECT["optional-dependencies"][extra]]
    nested = {extra for requirement in found if requirement.name == PROJECT["name"] for extra in requirement.extras}
    plain = [requirement for requirement in found if requirement.name != PROJECT["name"]]
    return plain + (requirements(*nested) if nested else [])


def test_torch_is_pinned_to_the_known_good_release():
    assert pins()["torch"] == Version("2.13.0")


def test_every_requirement_has_a_pin_that_satisfies_it():
    pinned = pins()
    for requirement in [*map(Requirement, PROJECT["dependencies"]), *requirements("dev")]:
        assert pinned[canonical(requirement.name)] in requirement.specifier, requirement


def test_the_extras_of_the_readme_exist():
    assert {"test", "dev", "flash", "peft", "vllm", "bench"} <= set(PROJECT["optional-dependencies"])


def test_releases_of_lightning_without_a_source_tag_are_excluded():
    (lightning,) = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "lightning"]
    assert [version for version in ("2.6.2", "2.6.3", "2.7.0") if version in lightning.specifier] == []
    assert "2.6.4" in lightning.specifier


def test_licence_is_complete():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == "Apache-2.0"


def make(*targets: str) -> str:
    return subprocess.run(["make", "-n", "-B", *targets], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_sets_up_before_it_runs():
    for target, extra, command in (("quickstart", "-e .", "bin/aapa recipe"), ("test", "-e '.[dev]'", "-m pytest")):
        plan = make(target)
        order = [plan.index("-m venv .venv"), plan.index(f"-c constraints.txt {extra}"), plan.index(command)]
        assert order == sorted(order)
    assert "mypy" in make("test")
    assert "ruff format --check" in make("test")


def test_make_takes_another_interpreter():
    assert "python3.12 -m venv" in make("PYTHON=python3.12", "quickstart")


def test_ci_runs_make_test_and_keeps_its_exit_code(tmp_path):
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    fake = tmp_path / "make"
    fake.write_text('#!/bin/sh\necho "$@" "${AAPA_DATA:-unset}"\nexit 7\n')
    fake.chmod(0o755)
    result = subprocess.run(
        [script], check=False, env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "AAPA_DATA": "/data"}, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (7, "test /data\n")
