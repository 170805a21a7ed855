"""The arrows of CONTRIBUTING.md: who may import whom, and the layout that keeps other packages' names free."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
A = "aapa_lightning"
TRAINER = (
    "lightning",
    "pytorch_lightning",
    f"{A}.modules",
    f"{A}.callbacks",
    f"{A}.cli",
    f"{A}.commands",
    f"{A}.runs",
    f"{A}.checkpoint_io",
    f"{A}.strategies",
)

#: What the files of a room never import, anywhere, not even inside a function.
FORBIDDEN = {
    f"{A}/types.py": (A, "aapa_kernels", "lightning", "transformers"),
    f"{A}/errors.py": (A, "torch", "lightning", "transformers"),
    f"{A}/thinking.py": (*TRAINER, "torch", "transformers", *(f"{A}.{room}" for room in ("anchor", "data", "loop", "rewards", "rollout"))),
    f"{A}/reduce.py": (
        *TRAINER,
        "transformers",
        f"{A}.objectives",
        f"{A}.anchor",
        f"{A}.rollout",
        f"{A}.data",
        f"{A}.rewards",
        f"{A}.loop",
    ),
    **{
        f"{A}/{name}": (*TRAINER, f"{A}.objectives", f"{A}.anchor", f"{A}.rollout", f"{A}.data", f"{A}.rewards", f"{A}.loop")
        for name in ("logprobs", "attention.py", "remote.py", "adapters")
    },
    f"{A}/sharding": (*TRAINER, f"{A}.objectives", f"{A}.anchor", f"{A}.rollout", f"{A}.data", f"{A}.loop", f"{A}.policy"),
    f"{A}/advantages.py": (*TRAINER, "transformers", f"{A}.objectives", f"{A}.anchor", f"{A}.rollout", f"{A}.data", f"{A}.loop"),
    f"{A}/objectives": (*TRAINER, "transformers", "datasets", f"{A}.anchor", f"{A}.rollout", f"{A}.rewards", f"{A}.data", f"{A}.loop"),
    f"{A}/anchor": (*TRAINER, f"{A}.objectives", f"{A}.rewards", f"{A}.loop"),
    f"{A}/rollout": (*TRAINER, f"{A}.objectives", f"{A}.anchor", f"{A}.rewards", f"{A}.loop"),
    f"{A}/rewards": (*TRAINER, f"{A}.objectives", f"{A}.anchor", f"{A}.rollout", f"{A}.loop"),
    f"{A}/loop": TRAINER,
    f"{A}/metrics": (*TRAINER, f"{A}.objectives", f"{A}.anchor", f"{A}.rollout", f"{A}.loop"),
    f"{A}/data": (*TRAINER[2:], f"{A}.objectives", f"{A}.anchor", f"{A}.rollout", f"{A}.loop"),
    f"{A}/recipe": (*TRAINER, "torch", "transformers"),
    f"{A}/modules": (f"{A}.callbacks", f"{A}.cli", f"{A}.commands"),
    f"{A}/callbacks": (f"{A}.modules", f"{A}.cli", f"{A}.commands"),
    "kernels/aapa_kernels": (A, "lightning", "transformers", "datasets"),
}
#: The only file of ``data`` that knows Lightning.
DATAMODULES = {f"{A}/data/datamodule.py"}
SOURCES = [path for folder in (A, "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]
LIMITS = {f"{A}/objectives": 120, f"{A}/modules": 300, "kernels": 300, A: 300, "tests": 400}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, and for ``from m import n`` also ``m.n``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_only_what_lies_upstream(room):
    target = ROOT / room
    files = [target] if target.is_file() else sorted(target.rglob("*.py"))
    files = [path for path in files if str(path.relative_to(ROOT)) not in DATAMODULES]
    assert files, f"{room} is gone; update the arrows"
    bad = [f"{path.relative_to(ROOT)} imports {name}" for path in files for name in imports(path) if under(name, FORBIDDEN[room])]
    assert not bad


def test_in_data_only_the_datamodule_knows_lightning():
    files = list((ROOT / A / "data").rglob("*.py"))
    knows = {
        str(path.relative_to(ROOT)) for path in files if any(under(name, ("lightning", "pytorch_lightning")) for name in imports(path))
    }
    assert knows <= DATAMODULES


def test_one_class_tree_of_lightning():
    assert not [path for path in SOURCES if any(under(name, ("pytorch_lightning",)) for name in imports(path))]


def test_nobody_imports_the_source_root_as_a_package():
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert not [path for path in files if any(under(name, ("kernels",)) for name in imports(path))]


def test_the_name_kernels_stays_free():
    assert not list((ROOT / "kernels").glob("__init__.py"))
    assert not [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("__init__.py")]
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)


def test_files_stay_small():
    def limit(path: str) -> int:
        return LIMITS[max((folder for folder in LIMITS if path.startswith(folder)), key=len)]

    files = [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {path: count for path, count in lines.items() if count > limit(path)}


def test_a_planted_import_is_found(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text("def f():\n    from lightning.pytorch import Trainer\n    from aapa_lightning import modules\n")
    found = [name for name in imports(planted) if under(name, TRAINER)]
    assert found == ["lightning.pytorch", "lightning.pytorch.Trainer", "aapa_lightning.modules"]


def test_no_pickle_and_no_unsafe_load():
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not [name for name in imports(path) if under(name, ("pickle", "cloudpickle", "dill", "joblib"))], path
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "torch.load":
                assert any(
                    k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords
                ), path
