"""YAML and JSON that would hang, overflow or lie: every command that reads it ends with one message and code 2."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from aapa_lightning.cli import main
from aapa_lightning.documents import MOST_CHARACTERS, load_yaml, parse_json, parse_yaml, read_json
from aapa_lightning.errors import LONGEST_MESSAGE, ConfigError, DataError
from aapa_lightning.recipe.plan import MOST_STAGES, load_recipe

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
BAD = {
    "aliases of aliases": (LAUGHS, "values"),
    "an alias of itself": ("a: &a [*a]", "holds itself"),
    "nested maps": ("a: " + "{b: " * 2000 + "1" + "}" * 2000, "levels"),
    "open brackets": ("a: " + "[" * 100_000, "levels"),
    "a large text": ("a: " + "x" * MOST_CHARACTERS, "characters"),
    "a large number": ("a: " + "1" * 5000, "digits"),
    "a list as a key": ("? [a]\n: b", "key"),
    "an object": ("a: !!python/object/apply:os.system [true]", "tag"),
    "bytes": ("a: !!binary aGk=", "tag"),
    "an open list": ("a: [", "line 2"),
    "a control character": ("a: \x00", "character"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_document_is_one_message(name):
    text, part = BAD[name]
    with pytest.raises(ConfigError, match=part) as error:
        parse_yaml(text, "here")
    assert str(error.value).startswith("here: ")
    assert len(str(error.value)) <= LONGEST_MESSAGE + 100


@pytest.mark.parametrize(
    "name", ["aliases of aliases", "an alias of itself", "nested maps", "open brackets", "an open list", "a large number"]
)
@pytest.mark.parametrize("command", [["fit", "--run_dir=run", "--config"], ["recipe", "--dry-run"], ["recipe"]])
def test_every_command_that_reads_yaml_ends(name, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(BAD[name][0])
    assert main([*command, "bad.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.count("aapa: error: ") == 1
    assert "bad.yaml" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("content", [b"run_dir: caf\xe9\n", b"\x00\xff\xfe", "run_dir: x\n".encode("utf-16")])
@pytest.mark.parametrize("command", [["fit", "--run_dir=run", "--config"], ["recipe"]])
def test_a_file_that_is_no_utf_8(content, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_bytes(content)
    assert main([*command, "bad.yaml"]) == 2
    assert "bad.yaml: expected UTF-8 text, found byte 0x" in capsys.readouterr().err


def test_a_value_keeps_the_kind_that_it_is_written_as():
    found = load_yaml("a: 1e-6\nb: 2020-13-45\nc: [1, true, null, 0.5, x]\nd: {e: &f {g: 1}, h: *f}\n")
    assert found == {"a": 1e-6, "b": "2020-13-45", "c": [1, True, None, 0.5, "x"], "d": {"e": {"g": 1}, "h": {"g": 1}}}


def recipe(tmp_path: Path, text: str) -> str:
    (tmp_path / "r.yaml").write_text(text)
    return str(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "rounds", ["rounds: 1000000000\nstages: [{name: a}]", f"stages: [{{rounds: {MOST_STAGES}, stages: [{{name: a}}, {{name: b}}]}}]"]
)
def test_a_recipe_of_endless_rounds(rounds, tmp_path):
    with pytest.raises(ConfigError, match=f"expected at most {MOST_STAGES} stages in all"):
        load_recipe(recipe(tmp_path, f"run_dir: o\n{rounds}\n"))


@pytest.mark.parametrize("quoted", ["'{}'", "[{}]"])
def test_references_that_multiply(quoted, tmp_path):
    names = ["x", *(f"v{i}" for i in range(12))]
    separator = "" if quoted == "'{}'" else ", "
    one = "${{vars.{}}}" if quoted == "'{}'" else "'${{vars.{}}}'"
    lines = [f"  {name}: {quoted.format(separator.join([one.format(before)] * 10))}" for before, name in itertools.pairwise(names)]
    with pytest.raises(ConfigError, match="references come to more than"):
        load_recipe(recipe(tmp_path, "run_dir: o\nvars:\n  x: hello\n" + "\n".join(lines) + "\nstages: [{name: a}]\n"))


@pytest.mark.parametrize("override", ["vars.x=[", "vars.x=" + "[" * 2000, "vars.x=&a [*a]"])
def test_an_override_that_is_no_yaml(override, tmp_path, capsys):
    path = recipe(tmp_path, "run_dir: o\nstages: [{name: a}]\n")
    assert main(["recipe", path, "--set", override]) == 2
    assert "aapa: error: --set vars.x: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ("vars: [1]", "vars: expected a mapping"),
        ("1: 2", "unknown keys 1"),
        ("summary: {rows: {a: [1]}, columns: [[1]]}", "summary: expected names of stages"),
        ("stages: [{name: a, command: 5}]", "command: expected the words"),
        ("stages: [{name: a, config: x.yaml}]", "config: expected a list"),
        ("stages: [{name: a, env: [1]}]", "env: expected a mapping"),
        ("stages: [{name: a, launcher: torchrun}]", "launcher: expected a list"),
        ("stages: [{name: a, launcher: [no-such-program]}]", "launcher: expected a program on the PATH"),
    ],
)
def test_a_recipe_with_another_kind_of_value(section, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stages = "" if section.startswith("stages") else "stages: [{name: a}]\n"
    assert main(["recipe", recipe(tmp_path, f"run_dir: o\n{section}\n{stages}")]) == 2
    assert part in capsys.readouterr().err
    assert not Path("o/logs").exists()


@pytest.mark.parametrize(
    "state",
    [
        b"{",
        b"[]",
        b"5",
        b"\xff",
        b"[" * 100_000,
        b'{"a": 5}',
        b'{"a": {}}',
        b'{"a": {"status": "done", "fingerprint": "x", "seconds": "y"}}',
    ],
)
def test_a_damaged_state_file_of_a_recipe(state, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("o").mkdir()
    Path("o/recipe_state.json").write_bytes(state)
    assert main(["recipe", recipe(tmp_path, "run_dir: o\nstages: [{name: a}]\n")]) == 2
    error = capsys.readouterr().err
    assert "o/recipe_state.json" in error
    assert "put a sound copy back, or remove it" in error


@pytest.mark.parametrize(
    ("text", "part"), [("[" * 100_000, "levels"), ("[" * 200 + "]" * 200, "levels"), ("1" * 5000, "digits"), ("{", "JSON")]
)
def test_json_out_of_bounds(text, part):
    with pytest.raises(DataError, match=f"here is damaged: .*{part}"):
        parse_json(text, "here", DataError)


@pytest.mark.parametrize(
    ("found", "kinds", "part"),
    [
        ({"metrics": "good"}, {"metrics": dict}, "expected dict under 'metrics', found str"),
        ({"fingerprint": 5}, {"fingerprint": str}, "expected str under 'fingerprint', found int"),
        ({"rows": True}, {"rows": int}, "expected int under 'rows', found bool"),
        ({"x": "1"}, {"x": (float, type(None))}, "expected float or null under 'x', found str"),
    ],
)
def test_a_key_of_another_type(found, kinds, part, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(found))
    with pytest.raises(ConfigError, match=part):
        read_json(tmp_path / "x.json", **kinds)
    assert read_json(tmp_path / "x.json", other=str) == found


def test_a_whole_number_will_do_for_a_float(tmp_path):
    (tmp_path / "x.json").write_text('{"x": 1, "y": null}')
    assert read_json(tmp_path / "x.json", x=float, y=(str, type(None)), absent=str) == {"x": 1, "y": None}
