"""Recipes: planning, references, rounds, skipping, resuming, failures and the summary. Stages are small scripts behind a launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from aapa_lightning.cli import main
from aapa_lightning.errors import ConfigError
from aapa_lightning.locks import hold
from aapa_lightning.recipe.plan import load_recipe
from aapa_lightning.recipe.summary import text_table

#: Stands in for the interpreter: notes its arguments, then does what its environment says.
STAGE = """
import json, os, pathlib, sys, time
words = sys.argv[3:]  # after -m aapa_lightning.cli
run = pathlib.Path(next(w.removeprefix("--run_dir=") for w in words if w.startswith("--run_dir=")))
with open("calls.jsonl", "a") as calls:
    calls.write(json.dumps([os.environ.get("STAGE", ""), *words]) + "\\n")
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
if os.environ.get("CHECKPOINT"):
    (run / "checkpoints" / "last.ckpt").write_text("")
print("working\\r50%\\r100%")
if pathlib.Path("fail").exists() and os.environ.get("STAGE") == pathlib.Path("fail").read_text():
    sys.exit("it broke")
if os.environ.get("WAIT"):
    pathlib.Path("pid").write_text(str(os.getpid()))
    time.sleep(600)
(run / "test_metrics.json").write_text(os.environ.get("METRICS", "{}"))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "stage.py").write_text(STAGE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stage(name: str, **extra) -> dict:
    env = {"STAGE": name, **extra.pop("env", {})}
    return {"name": name, "launcher": [sys.executable, "stage.py"], "env": env, **extra}


def write(*stages: dict, name: str = "recipe.yaml", **extra) -> str:
    Path(name).write_text(yaml.safe_dump({"run_dir": "out", "stages": list(stages), **extra}, sort_keys=False))
    return name


def calls() -> list[list[str]]:
    return [json.loads(line) for line in Path("calls.jsonl").read_text().splitlines()] if Path("calls.jsonl").exists() else []


def names() -> list[str]:
    return [call[0] for call in calls()]


def test_stages_run_in_order_and_only_once():
    recipe = write(stage("a"), stage("b", args={"model.init": "${stages.a.run_dir}/export", "trainer.max_steps": 3}))
    assert main(["recipe", recipe]) == 0
    assert calls() == [
        ["a", "fit", "--run_dir=out/a"],
        ["b", "fit", "--run_dir=out/b", "--model.init=out/a/export", "--trainer.max_steps=3"],
    ]
    assert main(["recipe", recipe]) == 0
    assert names() == ["a", "b"]
    assert Path("out/logs/a.log").read_text() == "100%\n"


def test_a_failing_stage_stops_the_recipe_and_shows_its_log(capfd):
    recipe = write(stage("a"), stage("b"), stage("c"))
    Path("fail").write_text("b")
    assert main(["recipe", recipe]) == 1
    error = capfd.readouterr().err
    assert "stage b ended with exit code 1" in error
    assert "  it broke" in error
    Path("fail").unlink()
    assert main(["recipe", recipe]) == 0
    assert names() == ["a", "b", "b", "c"]


@pytest.mark.parametrize("checkpoint", [True, False])
def test_an_interrupted_fit_continues_its_checkpoint_or_starts_again(checkpoint):
    recipe = write(stage("a", env={"CHECKPOINT": "1"} if checkpoint else {}))
    Path("fail").write_text("a")
    assert main(["recipe", recipe]) == 1
    Path("out/a/leftover").write_text("")
    Path("fail").unlink()
    assert main(["recipe", recipe]) == 0
    assert ("--resume" in calls()[-1]) == checkpoint
    assert Path("out/a/leftover").exists() == checkpoint


def test_a_terminated_recipe_ends_its_stage_and_goes_on_with_it(folder):
    recipe = write(stage("a", env={"CHECKPOINT": "1", "WAIT": "1"}))
    command = [sys.executable, "-m", "aapa_lightning.cli", "recipe", recipe]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, cwd=folder)
    while not (Path("pid").exists() and Path("pid").read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)
    assert json.loads(Path("out/recipe_state.json").read_text())["a"]["status"] == "running"
    Path("stage.py").write_text(STAGE.replace("600", "0"))
    assert main(["recipe", recipe]) == 0
    assert "--resume" in calls()[-1]


def test_a_changed_stage_is_refused_until_asked(capsys):
    assert main(["recipe", write(stage("a", args={"x": 1}), stage("b"))]) == 0
    changed = write(stage("a", args={"x": 2}), stage("b"))
    assert main(["recipe", changed]) == 2
    assert "--from a" in capsys.readouterr().err
    assert names() == ["a", "b"]
    assert main(["recipe", changed, "--from", "a"]) == 0
    assert names() == ["a", "b", "a", "b"]
    assert "--x=2" in calls()[2]


def test_a_change_upstream_or_in_a_file_counts(folder):
    (folder / "conf.yaml").write_text("x: 1\n")
    used = stage("b", args={"init": "${stages.a.run_dir}"})
    before = [s.fingerprint for s in load_recipe(write(stage("a", config=["conf.yaml"]), used, stage("c"))).stages]
    (folder / "conf.yaml").write_text("x: 2\n")
    after = [s.fingerprint for s in load_recipe("recipe.yaml").stages]
    assert [x != y for x, y in zip(before, after, strict=True)] == [True, True, False]


def test_only_and_force_select_stages():
    recipe = write(stage("a"), stage("b"))
    assert main(["recipe", recipe, "--only", "b"]) == 0
    assert main(["recipe", recipe, "--only", "b"]) == 0
    assert main(["recipe", recipe, "--only", "b", "--force"]) == 0
    assert names() == ["b", "b"]


def test_rounds_repeat_stages_and_refer_to_the_round_before():
    model = "${previous.train.run_dir or stages.start.run_dir}/export"
    block = {"rounds": 3, "stages": [stage("train", args={"model": model, "seed": "${round}"})]}
    recipe = load_recipe(write(stage("start"), block, stage("end", args={"model": "${stages.train.run_dir}"})))
    assert [s.name for s in recipe.stages] == ["start", "train-1", "train-2", "train-3", "end"]
    assert [s.arguments for s in recipe.stages[1:]] == [
        ("--run_dir=out/train-1", "--model=out/start/export", "--seed=1"),
        ("--run_dir=out/train-2", "--model=out/train-1/export", "--seed=2"),
        ("--run_dir=out/train-3", "--model=out/train-2/export", "--seed=3"),
        ("--run_dir=out/end", "--model=out/train-3"),
    ]


def test_rounds_of_the_whole_recipe():
    assert [s.name for s in load_recipe(write(stage("a"), stage("b"), rounds=2)).stages] == ["a-1", "b-1", "a-2", "b-2"]


def test_settings_become_a_configuration_file():
    recipe = write(stage("a", settings={"model": {"lr": "${vars.lr}", "path": "${self.run_dir}/x"}}), vars={"lr": 0.5})
    assert main(["recipe", recipe, "--set", "vars.lr=0.25", "--set", "stages.a.settings.trainer.max_steps=7"]) == 0
    assert calls() == [["a", "fit", "--config=out/configs/a.yaml", "--run_dir=out/a"]]
    written = yaml.safe_load(Path("out/configs/a.yaml").read_text())
    assert written == {"model": {"lr": 0.25, "path": "out/a/x"}, "trainer": {"max_steps": 7}}


def test_configurations_lie_beside_the_recipe(folder):
    (folder / "recipes").mkdir()
    for path in ("recipes/a.yaml", "b.yaml"):
        (folder / path).write_text("{}\n")
    (only,) = load_recipe(write(stage("a", config=["a.yaml", "b.yaml", "../b.yaml"]), name="recipes/r.yaml")).stages
    assert only.arguments[:3] == ("--config=recipes/a.yaml", "--config=b.yaml", "--config=recipes/../b.yaml")


def test_other_commands_take_plain_flags():
    entry = {"name": "w", "command": "data synthetic", "args": {"out": "${self.run_dir}", "json": True, "off": False, "many": [1, 2]}}
    (only,) = load_recipe(write(entry)).stages
    assert (*only.command, *only.arguments) == ("data", "synthetic", "--out=out/w", "--json", "--many", "1", "2")


def test_environment_is_read(monkeypatch):
    monkeypatch.setenv("SOME_DATA", "/data")
    (only,) = load_recipe(write(stage("a", args={"data": "${env.SOME_DATA}/x.jsonl"}))).stages
    assert only.arguments[-1] == "--data=/data/x.jsonl"


def test_a_dry_run_prints_commands_and_runs_nothing(capsys):
    launcher = ["torchrun", "--nproc_per_node=2"]
    assert main(["recipe", write({"name": "a", "launcher": launcher, "env": {"X": 1}}), "--dry-run"]) == 0
    assert (
        capsys.readouterr().out
        == f"X=1 {sys.executable} -m torch.distributed.run --nproc_per_node=2 -m aapa_lightning.cli fit --run_dir=out/a\n"
    )
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"run_dir": "o", "stages": [{"name": "a"}], "stagez": 1}, r"r\.yaml: unknown keys stagez"),
        ({"run_dir": "o", "stages": [{"name": "a", "arg": {}}]}, r"stage a: unknown keys arg"),
        (
            {"run_dir": "o", "stages": [{"name": "a", "args": {"m": "${stages.b.run_dir}"}}, {"name": "b"}]},
            r"stages\.b\.run_dir.* refers to nothing",
        ),
        ({"run_dir": "o", "stages": [{"name": "a", "args": {"m": "${env.SURELY_NOT_SET}"}}]}, "SURELY_NOT_SET"),
        ({"run_dir": "o", "stages": [{"name": "a"}, {"name": "a"}]}, "found twice: a"),
        ({"run_dir": "o", "stages": [{"name": "../a"}]}, "needs a `name`"),
        ({"run_dir": "o", "stages": [{"name": "a", "config": ["absent.yaml"]}]}, r"no file absent\.yaml"),
        ({"run_dir": "o", "stages": [{"rounds": 0, "stages": [{"name": "a"}]}]}, "rounds: expected"),
        ({"run_dir": "o", "stages": [{"name": "a", "command": "bank build", "settings": {"x": 1}}]}, "`settings` belong"),
        ({"run_dir": "o"}, "expected `run_dir` and"),
        (["run_dir"], "expected a mapping"),
    ],
)
def test_mistakes_are_named(recipe, message):
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ConfigError, match=message):
        load_recipe("r.yaml")


@pytest.mark.parametrize("override", ["novalue", "stages.zzz.args.x=1"])
def test_a_bad_override_is_named(override, capsys):
    assert main(["recipe", write(stage("a")), "--set", override]) == 2
    assert "--set" in capsys.readouterr().err


def test_an_absent_recipe_is_exit_code_2(capsys):
    assert main(["recipe", "absent.yaml"]) == 2
    assert "absent.yaml" in capsys.readouterr().err


def test_the_summary_has_one_object_a_row(capsys):
    first, second = ({"METRICS": json.dumps(found)} for found in ({"test/accuracy": 0.5, "test/loss": 123.4}, {"test/accuracy": 0.75}))
    section = {"rows": {"base": "a", "best": "b"}, "columns": ["accuracy", "loss", "seconds"]}
    assert main(["recipe", write(stage("a", env=first), stage("b", env=second), summary=section)]) == 0
    summary = json.loads(Path("out/summary.json").read_text())
    assert list(summary) == ["base", "best"]
    assert (summary["base"]["accuracy"], summary["base"]["loss"], summary["best"]["loss"]) == (0.5, 123.4, None)
    assert 0 < summary["best"]["seconds"] < 60
    table = Path("out/summary.md").read_text()
    assert table in capsys.readouterr().out
    assert table.splitlines()[0].split() == ["|", "|", "accuracy", "|", "loss", "|", "seconds", "|"]
    assert table.splitlines()[3].split()[:6] == ["|", "best", "|", "0.750", "|", "-"]


def test_table_cells_cannot_break_the_table():
    assert text_table({"a|b": {"x\ny": 1.0}}).splitlines()[2] == r"| a\|b | 1.000 |"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rows": {"x": "zzz"}, "columns": ["accuracy"]}, "summary.rows.x: no stage 'zzz'"),
        ({"rows": {"x": "a"}}, "expected `rows`, `columns`"),
        ({"rows": {"x": "a"}, "columns": ["accuracy"], "given": {"y": {"loss": 1.0}}}, "summary.given.y: expected numbers for columns"),
    ],
)
def test_a_summary_is_checked_before_anything_runs(section, message, capsys):
    assert main(["recipe", write(stage("a"), summary=section)]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out/a").exists()


def test_given_figures_stand_beside_the_stages():
    section = {"rows": {"base": "a"}, "columns": ["accuracy", "loss"], "given": {"elsewhere": {"accuracy": 0.9}}}
    assert main(["recipe", write(stage("a", env={"METRICS": json.dumps({"test/accuracy": 0.5})}), summary=section)]) == 0
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["base"]["accuracy"] == 0.5
    assert summary["elsewhere"] == {"accuracy": 0.9, "loss": None}


def test_variables_name_the_environment_and_earlier_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("AAPA_TEST_ROOT", "/data")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "run_dir: runs/x\nvars: {root: '${env.AAPA_TEST_ROOT}/a', file: '${vars.root}/b.jsonl'}\n"
        "stages: [{name: check, command: data check, args: ['${vars.file}']}]\n"
    )
    assert load_recipe(str(path)).stages[0].arguments == ("/data/a/b.jsonl",)


def test_two_recipes_in_one_folder_exclude_each_other(capsys):
    recipe = write(stage("a"))
    with hold(Path("out/.recipe.lock"), ["aapa", "recipe", "other.yaml"], "wait"):
        assert main(["recipe", recipe]) == 2
    error = capsys.readouterr().err
    assert f"out is in use by process {os.getpid()} on" in error
    assert "aapa recipe other.yaml" in error
    assert names() == []
    assert main(["recipe", recipe]) == 0
    assert not list(Path("out").glob(".*"))


def test_a_checkpoint_behind_a_link_that_leads_nowhere_does_not_cost_the_run():
    recipe = write(stage("a", env={"CHECKPOINT": "1"}))
    Path("fail").write_text("a")
    assert main(["recipe", recipe]) == 1
    last = Path("out/a/checkpoints/last.ckpt")
    last.unlink()
    last.symlink_to(".last.ckpt.0123abcd")
    main(["recipe", recipe])
    assert calls()[-1][-1] == "--resume"
    assert last.is_symlink()


@pytest.mark.parametrize("state", [b"{", b"\xff", b"[]", b'{"a": 3}', b'{"a": {"status": "done"}}'])
def test_a_damaged_state_is_named(state, capsys):
    recipe = write(stage("a"))
    Path("out").mkdir()
    Path("out/recipe_state.json").write_bytes(state)
    assert main(["recipe", recipe]) == 2
    assert "out/recipe_state.json" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["recipe.yaml", "/dev/null", "n" * 300])
def test_a_folder_that_cannot_be_written_is_one_line(place, capsys):
    assert main(["recipe", write(stage("a")), "--set", f"run_dir={place}"]) == 2
    assert "aapa: error: cannot write " in capsys.readouterr().err
