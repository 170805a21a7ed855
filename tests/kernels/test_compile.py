"""Every Triton kernel compiles for every chip it is meant for, within its registers; needs no GPU."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "compile_kernels.py"
CHIPS = {80, 90, 100}


def entry_kernels():
    """Names of the functions that launchers start, as against those that kernels call."""
    for path in sorted((ROOT / "kernels" / "aapa_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.FunctionDef)
                and node.name.endswith("_kernel")
                and any("jit" in ast.unparse(d) for d in node.decorator_list)
            ):
                yield node.name


def spilled_bytes():
    """What a thread may spill: nothing with a Triton of today."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    return 0 if Version(triton.__version__) >= Version("3.7") else 40


def compile_kernels(*words, **environment):
    knobs = pytest.importorskip("triton.knobs", reason="triton is not installed")
    for name in ("ptxas", "cuobjdump"):
        try:
            getattr(knobs.nvidia, name).path  # noqa: B018  # looking is what fails
        except RuntimeError:
            pytest.skip(f"the installed triton has no {name}, so that no binary can be made or read")
    command = [sys.executable, str(SCRIPT), "--json", *words]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert run.returncode == 0 or spilled_bytes(), run.stderr[-4000:]
    result = json.loads(run.stdout.splitlines()[-1])
    return [dict(zip(result["columns"], row, strict=True)) for row in result["rows"]]


def check(rows):
    expected = sorted(entry_kernels())
    assert len(expected) > 1
    for arch in CHIPS:
        assert sorted({row["kernel"] for row in rows if row["arch"] == arch}) == expected
    assert {row["arch"] for row in rows} == CHIPS
    assert not [row for row in rows if row["stack"] > spilled_bytes()]
    assert all(16 <= row["registers"] <= 255 and row["programs"] >= 1 for row in rows)


@pytest.fixture(scope="module")
def quick():
    """Rows of the defaults; the interpreter's switch, which the tests of results set, must not reach the script."""
    return compile_kernels("--quick", TRITON_INTERPRET="1")


def test_defaults_fit_their_chips(quick):
    check(quick)


def test_default_kernels_read_16_bytes_at_a_time(quick):
    streaming = {"sentence_pool_fwd_kernel", "linear_logits_kernel", "mlp_logits_kernel"}
    assert {row["kernel"] for row in quick if row["wide_loads"]} >= streaming


def test_two_programs_of_the_default_perceptron_share_a_multiprocessor(quick):
    rows = [row for row in quick if "weight=fp16, units=256" in row["variant"]]
    assert [row["programs"] for row in rows] == [2] * len(CHIPS)


@pytest.mark.parametrize("words", [("--write", "--quick"), ("--write", "--arch", "90"), ("--write", "--op", "sentence_pool")], ids=" ".join)
def test_a_subset_never_replaces_the_kept_results(words):
    pytest.importorskip("triton", reason="triton is not installed")
    run = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "--write keeps all variants" in run.stderr


@pytest.mark.slow
def test_every_variant_fits_its_chips():
    check(compile_kernels())
