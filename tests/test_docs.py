"""The pages tell the truth: snippets parse, configurations are accepted, paths and commands exist, tables are complete."""

from __future__ import annotations

import ast
import csv
import inspect
import json
import logging
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from aapa_lightning.callbacks.anchor import AnchorCallback
from aapa_lightning.cli import COMMANDS, main
from aapa_lightning.commands.parser import import_components
from aapa_lightning.recipe.plan import load_recipe
from aapa_lightning.rewards.instructions import CHECKS

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
FOLDERS = ("aapa_lightning", "benchmarks", "configs", "docs", "kernels", "tests")
TINY = {"model": {"class_path": "GRPOModule", "init_args": {"policy": {"model": "nothing"}}}}


class Block(NamedTuple):
    """A fenced block: its page and line, its language, its text."""

    where: str
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    content = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```", content, re.MULTILINE | re.DOTALL)
    return [Block(f"{page.name}:{content[: match.start()].count(chr(10)) + 1}", match[1], match[2]) for match in found]


def prose_of(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
LOADED = {block: yaml.safe_load(block.text) for block in BLOCKS if block.language == "yaml"}
CONFIGS = [block for block, content in LOADED.items() if content.keys() & {"model", "data", "trainer"}]
RECIPES = [block for block, content in LOADED.items() if "stages" in content]


def table(page: str, marker: str) -> list[list[str]]:
    """Cells of the table that follows a marker, without its head."""
    content = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert marker in content
    rows = content.split(marker, 1)[1].strip().split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in ("python", "json")], ids=lambda block: block.where)
def test_snippets_parse(block):
    if block.language == "python":
        ast.parse(block.text)
        return
    try:
        json.loads(block.text)
    except ValueError:
        for line in block.text.splitlines():  # JSON lines
            json.loads(line)


def test_every_yaml_snippet_is_tried():
    assert set(LOADED) == {*CONFIGS, *RECIPES}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with the modules and files that snippets name."""
    code = {"my_rewards.py": "rewards.md", "caps.py": "anchor.md"}
    for name, page in code.items():
        text = "\n\n".join(block.text for block in BLOCKS if block.language == "python" and block.where.startswith(page))
        (tmp_path / name).write_text(text)
    for name in ("tiny.yaml", "grpo.yaml"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning's handler keeps the stream of the test that imported it
    import_components()
    return tmp_path


@pytest.mark.parametrize("block", CONFIGS, ids=lambda block: block.where)
def test_configurations_are_accepted(block, folder, build_cli):
    words = ["fit"]
    if "class_path" not in LOADED[block].get("model", {}):
        (folder / "base.yaml").write_text(yaml.safe_dump(TINY))
        words += ["--config=base.yaml"]
    (folder / "snippet.yaml").write_text(block.text)
    build_cli(*words, "--config=snippet.yaml")


@pytest.mark.parametrize("block", RECIPES, ids=lambda block: block.where)
def test_recipes_are_accepted(block, folder):
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"run_dir": "runs/recipe"} | LOADED[block]))
    assert load_recipe("recipe.yaml").stages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_exist(page):
    prose = prose_of(page)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]
    missing = [link for link in links if link and not (page.parent / link).exists()]
    everything = [word for text in quoted(prose) + [block.text for block in blocks_of(page)] for word in text.split()]
    paths = [word.rstrip(",.;:") for word in everything if re.match(rf"({'|'.join(FOLDERS)})/[\w./-]*$", word.rstrip(",.;:"))]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page):
    named = quoted(prose_of(page)) + [line for block in blocks_of(page) if block.language == "bash" for line in block.text.splitlines()]
    called = [match[1] for text in named if (match := re.match(r"(?:\w+=\S+ )*aapa ([\w-]+)", text))]
    assert set(called) <= {*COMMANDS, "COMMAND"}


def test_every_page_is_on_the_map():
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert linked == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_the_table_of_instructions_is_the_checks():
    rows = {quoted(name)[0]: sorted(quoted(arguments)) for name, arguments in table("rewards.md", "<!-- instructions -->")}
    assert rows == {name: sorted(check.arguments) for name, check in CHECKS.items()}


def test_the_table_of_anchor_options_has_their_defaults():
    parameters = inspect.signature(AnchorCallback).parameters
    rows = {quoted(name)[0]: yaml.safe_load(default.strip("`")) for name, default, _ in table("anchor.md", "<!-- options -->")}
    assert rows == {name: parameters[name].default for name in rows}
    spoken_of_elsewhere = {"discriminator", "bank", "guard", "encoder", "softmin_temperature", "segmenter", "trust_remote_code"}
    assert parameters.keys() - rows.keys() <= spoken_of_elsewhere


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Tiny runs of everything that logs: anchored CHORD with a reference and a bank, anchored SFT, a discriminator."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "configs").symlink_to(ROOT / "configs")
    anchor = {"class_path": "AnchorCallback", "init_args": {"discriminator": "runs/debug/discriminator/export"}}
    gap = {**anchor["init_args"], "bank": "runs/bank", "transform": "bt_gap"}
    judges = [{"class_path": "aapa_lightning.data.synthetic.TrueSuccess"}]
    chord = {
        "run_dir": "runs/chord",
        "model": {"init_args": {"judges": judges, "beta": 0.1}},
        "trainer": {"callbacks": [{**anchor, "init_args": gap}], "val_check_interval": 1, "max_steps": 2},
    }
    (folder / "chord.yaml").write_text(yaml.safe_dump(chord))
    (folder / "sft.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [anchor]}}))
    base = "--config=configs/debug/base.yaml"
    start = "--model.init_args.policy.model=runs/debug/sft/export"
    commands = [
        ["data", "synthetic", "--out=runs/world", "--train=24", "--val=8", "--test=8"],
        ["fit", base, "--config=configs/debug/sft.yaml", "--trainer.max_steps=1"],
        ["predict", base, "--config=configs/debug/rollouts.yaml"],
        ["fit", "--config=configs/debug/discriminator.yaml", "--test=true"],
        ["bank", "build", "--data=runs/world/train.jsonl", "--discriminator=runs/debug/discriminator/export", "--out=runs/bank"],
        ["fit", base, "--config=configs/debug/chord.yaml", "--config=chord.yaml", start],
        ["fit", base, "--config=configs/debug/sft.yaml", "--config=sft.yaml", "--run_dir=runs/sft", "--trainer.max_steps=1"],
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(logging, "raiseExceptions", False)
        for words in commands:
            assert main(words) == 0, words
    return folder / "runs"


def logged(run: Path, stage: str) -> set[str]:
    """Names logged under a stage, with the names of rewards and judges replaced by ``NAME``."""
    with open(run / "metrics.csv", newline="") as file:
        columns = next(csv.reader(file))
    names = {column.removeprefix(f"{stage}/") for column in columns if column.startswith(f"{stage}/")}
    return {re.sub(r"^true_success$|(?<=^rewards/)constraints$", "NAME", name) for name in names}


def glossary(stage: str) -> set[str]:
    return {name for row in table("training.md", f"<!-- metrics: {stage} -->") for name in quoted(row[0])}


def test_the_glossary_names_what_is_logged(runs):
    assert glossary("train") == logged(runs / "chord", "train") | logged(runs / "sft", "train")
    assert glossary("val") == logged(runs / "chord", "val")


def test_the_figures_of_a_discriminator_are_explained(runs):
    explained = {name for row in table("anchor.md", "<!-- figures -->") for name in quoted(row[0])}
    figures = json.loads((runs / "debug" / "discriminator" / "test_metrics.json").read_text())
    assert {name.removeprefix("test/") for name in figures if not name.endswith(("_low", "_high"))} <= explained
